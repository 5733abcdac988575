"""docs/extending.md does what it says: its files, written as they stand there, run under its commands."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.train.conftest import stop_at
from thresher.cli import main
from thresher.train.dictionary import rules, topologies
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.files import load_run
from thresher.train.plugins import import_plugin

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
SMALL = (
    *("data.max_tokens=8000", "data.context=64", "data.test_fraction=0.3", "data.validation_fraction=0.3"),
    *("dictionary.expansion=0.5", "dictionary.aux_k=8", "train.batch_rows=256", "train.steps=8", "train.log_every=2"),
    *("train.checkpoint_every=3", "train.calibrate_rows=2000", "evaluate.tokens=300", "evaluate.resamples=100"),
)
"""Overrides that make the page's recipe a matter of seconds."""


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test registers is there afterwards."""
    monkeypatch.setattr(rules.registry, "_RULES", dict(rules.registry._RULES))
    monkeypatch.setattr(topologies, "_TOPOLOGIES", dict(topologies.known_topologies()))


@pytest.fixture
def folder(registries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the page's files lie, as the working directory."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("THRESHER_CACHE", raising=False)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("thresher_plugin_")]:
        del sys.modules[name]


def test_both_take_less_than_sixty_lines() -> None:
    assert FILES.keys() == {"truncated.py", "nearby.py", "own.toml"}
    for text in FILES.values():
        assert len(text.splitlines()) < 60


def commands() -> list[list[str]]:
    """The lines that the page shows, as words."""
    (block,) = re.findall(r"^```bash\n(thresher harvest.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [line.split() for line in block.splitlines()]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """A command in this process; its exit code, None being success."""
    sets = [part for item in SMALL for part in ("--set", item)]
    monkeypatch.setattr(sys, "argv", [*words, *sets])
    try:
        main()
    except SystemExit as end:
        return end.code or None
    return None


def weights(runs: Path) -> dict[str, dict[str, Tensor]]:
    return {path.parent.name: safetensors.torch.load_file(path) for path in sorted(runs.glob("*/weights.safetensors"))}


@pytest.mark.usefixtures("no_pictures")
def test_the_commands_of_the_page_train_resume_and_judge_both(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest, train, resume, evaluate = commands()
    assert run(harvest, monkeypatch) is None
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert run(train, monkeypatch) == 130
    assert run(resume, monkeypatch) is None
    assert run([*train, "--runs", "runs/whole"], monkeypatch) is None
    found, whole = weights(folder / "runs" / "own"), weights(folder / "runs" / "whole")
    kinds = {path.name: json.loads((path / "config.json").read_text()) for path in (folder / "runs" / "own").iterdir()}
    assert {config["dictionary"]["kind"] for config in kinds.values()} == {"transcoder", "nearby"}
    assert len(found) == 4 + 1
    for name, tensors in whole.items():
        for key, tensor in tensors.items():
            assert torch.equal(found[name][key], tensor), f"{name}: {key}"
    assert run(resume, monkeypatch) is None
    assert run(evaluate, monkeypatch) is None
    results = json.loads((folder / "reports" / "own" / "results.json").read_text())
    names = {row["name"] for row in results["rows"] if row["kind"] == "replacement"}
    assert len(names) == 2
    assert {row["protocol"] for row in results["rows"]} == {"cascade", "clean_input", "single_site"}
    own = next(folder.glob("runs/own/transcoder-*"))
    rules.registry._RULES.pop("truncated")
    assert load_run(own).dictionary.encode(0, torch.ones(3, 128)).tokens == 3  # without the plugin


def helpers(old: str = "", new: str = "") -> dict[str, Any]:
    """The page's test helper and formula, with something in it exchanged."""
    scope: dict[str, Any] = {}
    for text in re.findall(r"^```python\n(.*?)^```", PAGE.split("## Testing it")[1], re.MULTILINE | re.DOTALL):
        exec(text.replace(old, new) if old else text, scope)
    return scope


def spec_of(kind: str, **settings: Any) -> DictionarySpec:
    many = 4 if kind == "nearby" else 1
    sites = {side: tuple(f"{side}{i}" for i in range(many)) for side in ("reads", "writes")}
    return DictionarySpec(
        kind=kind, **sites, layers=tuple(range(many)), d_in=5, d_out=6, n_latents=12, unit_norm=False, **settings
    )


def truncated(p: dict[str, Tensor], xs: list[Tensor]) -> list[Tensor]:
    a = xs[0] @ p["encoders.0.W_enc"].T + p["encoders.0.b_enc"]
    return [a * (a > 0.7) @ p["W_dec.0"][:, 0] + p["b_dec"][0]]


def test_the_gradient_check_of_the_page_holds_for_both_and_fails_for_another_formula(folder: Path) -> None:
    scope = helpers()
    check: Callable[..., None] = scope["assert_gradients"]
    for name in ("truncated.py", "nearby.py"):
        import_plugin(folder / name)
    check(spec_of("nearby", firing="topk", k=4), scope["formula"])
    every = helpers(".topk(4)", ".topk(12)")["formula"]  # of 12 latents: codes that are not sparse
    check(spec_of("nearby", firing="relu", sparsity=1.0), every)
    check(spec_of("transcoder", firing="truncated", theta=0.7, sparsity=1.0), truncated)
    with pytest.raises(AssertionError, match="not close"):
        check(spec_of("transcoder", firing="relu", sparsity=1.0), truncated)
