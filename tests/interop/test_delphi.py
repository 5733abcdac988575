"""delphi's cache holds every activation of every latent on a text, where delphi will look for it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

from tests.interop.conftest import CONTEXT, LATENTS, LAYERS, TAPS, Made, finished, written
from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.interop import delphi
from thresher.interop.adapting import Thresholds
from thresher.interop.canonical import Canonical, codes, to_coder
from thresher.interop.export import export
from thresher.interop.formats import Coded, Text

VOCABULARY = 50


class Looking:
    """A target whose sites are tables looked up by token, so that every activation is known."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(1)
        self.tables = {
            f"L{layer:02d}.{tap}": torch.randn(VOCABULARY, width, generator=rng)
            for layer in range(LAYERS)
            for tap, width in TAPS.items()
        }
        self.seen: list[int] = []

    def sites(self, patterns: Sequence[str], layers: Sequence[int] | None = None) -> tuple[Site, ...]:
        return tuple(
            Site(name, int(name[1:3]), name[4:], table.shape[1])
            for name, table in self.tables.items()
            if name in patterns
        )

    def record(self, tokens: Tensor, sites: Sequence[Site]) -> dict[str, Tensor]:
        self.seen.append(len(tokens))
        return {site.name: self.tables[site.name][tokens] for site in sites}


def contexts(count: int = 7, length: int = CONTEXT) -> Contexts:
    """BOS first, the last context half empty."""
    rng = np.random.default_rng(4)
    keep = np.ones((count, length), np.uint8)
    keep[:, 0] = 2
    keep[-1, length // 2 :] = 0
    token = rng.integers(0, VOCABULARY, (count, length)).astype(np.int32)
    return Contexts(token, np.zeros((count, length), np.int32), keep)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, facts) -> Write:
    """Write dictionaries' latents on a text."""

    def do(*dictionaries: Canonical, some: Contexts | None = None, splits: int = 5, **settings: Any) -> Path:
        folder = tmp_path / "latents"
        folder.mkdir()
        text = Text(Looking(), some or contexts(), **settings)  # type: ignore[arg-type]
        delphi.write_latents(folder, [Coded(to_coder(each), facts) for each in dictionaries], text, splits)
        return folder

    return do


def loaded(folder: Path) -> np.ndarray:
    """[contexts, T, F] as delphi's loader puts locations and activations together."""
    files = {path.stem: safetensors.numpy.load_file(path) for path in folder.glob("*.safetensors")}
    tokens = next(iter(files.values()))["tokens"]
    dense = np.zeros((*tokens.shape, LATENTS))
    covered: list[int] = []
    for stem, arrays in files.items():
        start, end = (int(part) for part in stem.split("_"))
        covered += range(start, end + 1)
        np.testing.assert_array_equal(arrays["tokens"], tokens)
        assert arrays["tokens"].dtype == np.int64
        assert arrays["activations"].dtype == np.float16
        assert len(arrays["activations"]) == len(arrays["locations"]) > 0
        place = arrays["locations"].astype(np.int64)
        assert int(place[:, 2].max()) <= end - start
        dense[place[:, 0], place[:, 1], place[:, 2] + start] = arrays["activations"]
    assert sorted(covered) == list(range(LATENTS)), "every latent belongs to one range"
    return dense


def expected(dictionary: Canonical, source: int, some: Contexts) -> np.ndarray:
    """[contexts, T, F] from the equation, 0 where nothing is encoded."""
    token = torch.from_numpy(some.token_id.astype(np.int64))
    x = Looking().tables[dictionary.reads[source]][token.flatten()]
    z = codes(dictionary, source, x).reshape(*token.shape, -1).numpy()
    return np.where(np.abs(z) > 1e-5, z, 0) * (some.keep == 1)[..., None]


@pytest.mark.parametrize("splits", [1, 5, 48, 100])
@pytest.mark.parametrize("batch", [3, 64])
def test_every_activation_is_where_delphi_looks(splits: int, batch: int, made: Made, write: Write) -> None:
    dictionary = made("sae", "threshold")
    done: list[int] = []
    folder = write(dictionary, splits=splits, batch_contexts=batch, advance=done.append)
    assert [path.name for path in folder.iterdir()] == ["layers.1"]
    assert {path.suffix for path in (folder / "layers.1").iterdir()} == {".safetensors", ".json"}
    dense = loaded(folder / "layers.1")
    np.testing.assert_allclose(dense, expected(dictionary, 0, contexts()), rtol=2e-3, atol=1e-6)
    assert sum(done) == 7
    assert (dense > 0).any()


def test_entries_stand_in_the_order_of_the_text(made: Made, write: Write) -> None:
    folder = write(made("sae", "threshold"), batch_contexts=2)
    for path in (folder / "layers.1").glob("*.safetensors"):
        place = safetensors.numpy.load_file(path)["locations"].astype(np.int64)
        order = np.lexsort((place[:, 2], place[:, 1], place[:, 0]))
        np.testing.assert_array_equal(order, np.arange(len(place)))


def test_a_layer_of_a_crosslayer_transcoder_is_a_hookpoint(made: Made, write: Write) -> None:
    dictionary = made("clt", "threshold")
    folder = write(dictionary)
    assert sorted(path.name for path in folder.iterdir()) == [f"layers.{i}.mlp" for i in range(LAYERS)]
    for layer in range(LAYERS):
        dense = loaded(folder / f"layers.{layer}.mlp")
        np.testing.assert_allclose(dense, expected(dictionary, layer, contexts()), rtol=2e-3, atol=1e-6)


def test_an_empty_range_joins_its_neighbour(made: Made, write: Write) -> None:
    dictionary = made("sae", "threshold")
    part = dictionary.sources[0]
    silent = torch.ones(LATENTS, dtype=torch.bool)
    silent[[20, 21]] = False
    quiet = part._replace(threshold=torch.where(silent, torch.tensor(1e6).double(), 0.0))
    folder = write(dictionary._replace(sources=(quiet,)), splits=6) / "layers.1"
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["0_47.safetensors"]
    assert json.loads((folder / "config.json").read_text())["n_splits"] == 1
    assert set(np.flatnonzero(loaded(folder).sum((0, 1)))) == {20, 21}
    nothing = part._replace(threshold=torch.full((LATENTS,), 1e6).double())
    (folder.parent / "again").mkdir()
    run = Coded(to_coder(dictionary._replace(sources=(nothing,))), {})
    with pytest.raises(UserError, match=r"At layers\.1 no latent fires"):
        delphi.write_latents(folder.parent / "again", [run], Text(Looking(), contexts()))  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_what_fp16_cannot_hold_is_divided_and_recorded(scale: float, made: Made, write: Write) -> None:
    dictionary = made("sae", "relu")
    part = dictionary.sources[0]
    grown = dictionary._replace(sources=(part._replace(W_enc=part.W_enc * scale, b_enc=part.b_enc * scale),))
    folder = write(grown) / "layers.1"
    config = json.loads((folder / "config.json").read_text())
    said = config["thresher"]["activations_divided_by"]
    dense, truth = loaded(folder), expected(grown, 0, contexts())
    assert np.isfinite(dense).all()
    np.testing.assert_allclose(dense * said, truth, rtol=2e-3, atol=1e-6 * truth.max())
    assert said == 2.0 ** max(0, np.ceil(np.log2(truth.max() / 65504)))
    assert (said > 1) == (scale > 1)


def test_activations_of_next_to_nothing_are_left_out(made: Made, write: Write) -> None:
    dictionary = made("sae", "relu")
    part = dictionary.sources[0]
    faint = dictionary._replace(sources=(part._replace(W_enc=part.W_enc * 1e-5, b_enc=part.b_enc * 1e-5),))
    folder = write(faint) / "layers.1"
    entries = [len(safetensors.numpy.load_file(path)["activations"]) for path in folder.glob("*.safetensors")]
    truth = expected(faint, 0, contexts())
    assert 0 < (truth > 1e-5).sum() == sum(entries) < (expected(dictionary, 0, contexts()) > 0).sum()


def test_the_length_is_cut_to_whole_examples(made: Made, write: Write) -> None:
    dictionary = made("transcoder", "relu")
    some = contexts(length=40)
    folder = write(dictionary, some=some) / "layers.1.mlp"
    whole = Contexts(*(array[:, :32] for array in some))
    dense = loaded(folder)
    assert dense.shape[1] == 32
    np.testing.assert_allclose(dense, expected(dictionary, 0, whole), rtol=2e-3, atol=1e-6)
    config = json.loads((folder / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_tokens"]) == (32, 7 * 32)


def test_contexts_shorter_than_an_example_are_refused(made: Made, write: Write) -> None:
    with pytest.raises(UserError, match=r"7 contexts of 31 tokens; delphi shows examples of 32"):
        write(made("sae", "relu"), some=contexts(length=31))


@pytest.mark.parametrize(("count", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_locations_are_as_narrow_as_they_can_be(count: int, dtype: type, made: Made, write: Write) -> None:
    some = contexts(count)
    some.keep[:] = 0
    some.keep[[0, -1], 3] = 1
    folder = write(made("sae", "relu"), some=some, splits=1, batch_contexts=8192) / "layers.1"
    arrays = safetensors.numpy.load_file(folder / "0_47.safetensors")
    assert arrays["locations"].dtype == dtype
    assert set(arrays["locations"][:, 0].tolist()) == {0, count - 1}


def test_config_has_what_delphi_asks_for(made: Made, write: Write) -> None:
    folder = write(made("sae", "threshold"), source="held-out books", batch_contexts=4)
    config = json.loads((folder / "layers.1" / "config.json").read_text())
    theirs = {name: value for name, value in config.items() if name != "thresher"}
    assert theirs == {
        "dataset_repo": "books", "dataset_split": "train", "dataset_name": "", "dataset_column": "text",
        "batch_size": 4, "cache_ctx_len": 32, "n_tokens": 7 * 32, "n_splits": 5, "model_name": "gpt2",
    }  # fmt: skip
    assert config["thresher"]["weights_sha256"] == "00"
    assert config["thresher"]["contexts"] == "held-out books"


def test_two_dictionaries_of_one_module_are_refused(made: Made, write: Write) -> None:
    with pytest.raises(UserError, match=r"all belong to layers\.1, and a cache has one of each"):
        write(made("sae", "threshold"), made("sae", "topk")._replace(name="other"))


def test_export_writes_runs_of_a_group_together_and_only_with_a_text(made: Made, facts, tmp_path: Path) -> None:
    runs = [finished(tmp_path / "runs" / kind, made(kind, "threshold"), facts) for kind in ("sae", "transcoder")]
    with pytest.raises(UserError, match="needs the target and a text"):
        export(runs, "delphi-cache", tmp_path / "out")
    text = Text(Looking(), contexts())  # type: ignore[arg-type]
    [done] = export(runs, "delphi-cache", tmp_path / "out", text=text)
    assert done.runs == ("sae", "transcoder")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["layers.1", "layers.1.mlp"]
    with pytest.raises(UserError, match="is there already"):
        export(runs, "delphi-cache", tmp_path / "out", text=text)
    with pytest.raises(UserError, match="--thresholds has no effect with --to delphi-cache"):
        export(runs, "delphi-cache", tmp_path / "new", text=text, thresholds=Thresholds(100))


def test_an_interrupted_export_leaves_nothing(made: Made, facts, tmp_path: Path) -> None:
    run = finished(tmp_path / "runs" / "sae", made("sae", "threshold"), facts)

    def interrupt(count: int) -> None:
        assert written(tmp_path), "it was under way"
        raise KeyboardInterrupt

    before = written(tmp_path)
    text = Text(Looking(), contexts(), batch_contexts=2, advance=interrupt)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        export([run], "delphi-cache", tmp_path / "out", text=text)
    assert written(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
