"""Which text is judged on, and which rows baselines are fitted to: from a cache, from the text again, from the user."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.harvest.corpus import Corpus, DataConfig, read_corpus
from thresher.harvest.run import HarvestConfig, harvest, identity
from thresher.harvest.target import TargetConfig
from thresher.harvest.texts import TRAINING_TOKENS, Read, Texts, evenly, held_out, own_config, own_text

TARGET = TargetConfig(device="cpu", dtype="float32")
DATA = DataConfig(context=64, max_tokens=8_000, test_fraction=0.2, separator="none")
HARVEST = HarvestConfig(layers=(0,), sites=("mlp_out",), codec="bf16")
SHIPS = ("Hispaniola", "Walrus", "Arrow", "Royal Fortune", "Pandora", "Nautilus", "Swallow", "Bounty")
LINES = [f"The {ship} lay at anchor, and nobody on board slept before {hour}." for hour in "123" for ship in SHIPS]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What config.json of a run says of the cache that it was trained from."""
    path = tmp_path_factory.mktemp("texts") / "cache"
    harvest(TARGET, DATA, HARVEST, path=path, console=Console(quiet=True))
    return {"name": "mine", "cache": {"path": str(path), "identity": identity(TARGET, DATA, HARVEST)}}


@pytest.fixture
def read(tokenizer: Any) -> Read:
    def read(data: DataConfig) -> Corpus:
        return read_corpus(data, tokenizer, 256, 4096, Console(quiet=True))

    return read


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


def never(data: DataConfig) -> Corpus:
    raise AssertionError("the text was read although the cache is there")


def same(a: Contexts | None, b: Contexts | None) -> bool:
    assert a is not None
    assert b is not None
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_cache_and_text_give_the_same_contexts_to_judge_on_and_to_fit_to(run: dict[str, Any], read: Read) -> None:
    cached = held_out(run, DATA, "test", None, never)
    again = held_out(run, DATA, "test", Path("no-such-cache"), read)
    assert same(cached.contexts, again.contexts)
    assert same(cached.training, again.training)
    assert same(cached.training, held_out(run, DATA, "train", None, never).contexts)
    assert cached.source == f"split test of {run['cache']['path']}"
    assert again.source == "split test of bundled:books"
    assert cached.notes == again.notes == ()
    apart = set(cached.contexts.document_id.flat) & set(cached.training.document_id.flat)  # type: ignore[union-attr]
    assert apart <= {-1}


def test_text_that_changed_is_refused_and_so_is_a_split_that_was_not_made(run: dict[str, Any], read: Read) -> None:
    gone = Path("no-such-cache")
    with pytest.raises(UserError, match=r"no-such-cache of run mine is gone.*split_seed: expected 0, got 3"):
        held_out(run, dataclasses.replace(DATA, split_seed=3), "test", gone, read)
    with pytest.raises(UserError, match=r"evaluate\.split is 'validation'.*it has train, test"):
        held_out(run, DATA, "validation", gone, read)


def test_training_rows_are_evenly_spaced_and_bounded() -> None:
    token_id = np.arange(40 * 8).reshape(40, 8)
    contexts = Contexts(token_id, token_id, np.ones_like(token_id))
    assert evenly(contexts, 33).token_id[:, 0].tolist() == [0, 64, 128, 192, 256]
    assert same(evenly(contexts), contexts)
    assert same(evenly(contexts, 8 * 40), contexts)
    assert evenly(Contexts(*(array[:0] for array in contexts))).token_id.shape == (0, 8)
    wide = np.zeros((TRAINING_TOKENS // 128 + 7, 128), np.int32)
    assert evenly(Contexts(wide, wide, wide)).token_id.size == TRAINING_TOKENS


def test_all_documents_of_the_users_own_text_are_judged_on(run: dict[str, Any], read: Read, lines: Path) -> None:
    text = own_config(DATA, str(lines), {})
    found = own_text(run, DATA, text, None, read)
    body = 63  # of 64, behind the BOS
    assert len(set(found.contexts.document_id.flat)) >= len(LINES) - 2  # all but what the last, cut context held
    assert found.facts["text"]["documents"] == len(LINES)
    assert found.facts["text"]["tokens"] // body == len(found.contexts.token_id) == found.facts["text"]["contexts"]
    assert json.loads(json.dumps(found.facts)) == found.facts
    assert same(found.training, held_out(run, DATA, "test", None, never).training)
    assert found.source == f"all of {lines}"
    [note] = found.notes
    assert "not the held-out split" in note


def test_own_text_is_packed_as_the_runs_text_was(run: dict[str, Any], read: Read) -> None:
    text = own_config(DATA, "bundled:books", {"max_tokens": 8_000})
    found = own_text(run, DATA, text, None, read)
    whole = read(dataclasses.replace(DATA, test_fraction=0)).splits["train"]
    assert same(found.contexts, whole)
    assert "is the one that the runs were trained on" in found.notes[0]


def test_settings_that_would_make_other_contexts_are_refused(lines: Path) -> None:
    assert own_config(DATA, str(lines), {"column": "body", "max_documents": 3}).column == "body"
    for key, value in (("context", 32), ("packing", "document"), ("test_fraction", 0.5), ("contxt", 3)):
        with pytest.raises(UserError, match=rf"--set data\.{key}.*expected one of subset"):
            own_config(DATA, str(lines), {key: value})
    with pytest.raises(UserError, match=r"data\.max_tokens is 'many'"):
        own_config(DATA, str(lines), {"max_tokens": "many"})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"--text: data\.source .*mine\.txt.*not there"),
        ("Too short.", r"--text: data\.source .*mine\.txt' fills no context: 1 documents have \d+ tokens.*takes 64"),
        ("", r"--text: data\.source .*mine\.txt' gave no document"),
    ],
)
def test_text_that_gives_no_context_is_one_paragraph(
    content: str | None, says: str, run: dict[str, Any], read: Read, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "mine.txt").write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        own_text(run, DATA, own_config(DATA, str(tmp_path / "mine.txt"), {}), None, read)
    assert "\n" not in str(caught.value)


def test_a_column_that_ones_own_text_lacks_is_named(run: dict[str, Any], read: Read, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(UserError, match=r"--text: data\.column is 'text'.*It has: body"):
        own_text(run, DATA, own_config(DATA, str(tmp_path / "own.jsonl"), {}), None, read)


def test_own_text_is_judged_without_baselines_where_the_training_text_is_gone(
    run: dict[str, Any], read: Read, lines: Path
) -> None:
    moved = {**run, "cache": {**run["cache"], "path": "no-such-cache"}}
    other = dataclasses.replace(DATA, split_seed=3)
    text = own_config(DATA, str(lines), {})
    found: Texts = own_text(moved, other, text, None, read)
    assert found.training is None
    assert "no baseline was fitted: The cache no-such-cache of run mine is gone" in found.notes[1]
    with pytest.raises(UserError, match="no-such-cache of run mine is gone"):
        own_text(run, other, text, Path("no-such-cache"), read)
