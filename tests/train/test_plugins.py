"""Rules of a user's own module: found by name, trained, saved, and loaded where the module is not."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.train.conftest import plans_for
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.cli import _plugins_first
from thresher.train.dictionary.rules import Rule, names, register, registry
from thresher.train.files import load_run
from thresher.train.plugins import import_plugin
from thresher.train.run import train

PLUGIN = textwrap.dedent(
    """
    import torch

    from thresher.train.dictionary.rules import Rule, register
    from thresher.train.kernels import firing


    @register
    class FarAbove(Rule):
        '''Positive entries above half a unit.'''

        name = "far above"
        penalties = ("l1",)

        def select(self, a_NF):
            return firing.select_above(a_NF, 0.5, self.room, kernels=self.kernels)

        def fire(self, a, selection, b_enc):
            return torch.where(a > 0.5, a, 0.0), None

        def thresholds(self):
            return torch.full((self.width,), 0.5)
    """
)
SERVED = """
def fire_frozen(self, a_NF):
    chosen = firing.select_topk(a_NF, 1)
    return chosen, chosen.take(a_NF).relu()
"""
PER_TOKEN = PLUGIN.replace("far above", "best").replace("FarAbove", "Best").replace(
    'penalties = ("l1",)', "thresholded = False"
) + textwrap.indent(SERVED, "    ")  # fmt: skip


@pytest.fixture(autouse=True)
def rules_as_they_were() -> Iterator[None]:
    before = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    file = folder / name
    file.write_text(text)
    return file


@pytest.mark.parametrize("kind", ["sae", "clt"])
def test_a_rule_of_a_module_trains_and_its_dictionary_loads_without_the_module(
    kind: str, cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    import_plugin(written(tmp_path, PLUGIN))
    plans = plans_for(cache, "own", {"steps": 6}, kind=kind, firing="far above", sparsity=1e-3)
    (first, *_) = train(plans, cache, out=tmp_path / "runs", device="cpu", console=console)
    x_ND = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    here = load_run(first.path).dictionary.encode(0, x_ND)
    del registry._RULES["far above"]
    there = load_run(first.path)
    assert torch.equal(there.dictionary.encode(0, x_ND).dense(), here.dense())
    assert (there.dictionary.spec.firing, there.dictionary.spec.sparsity_label) == ("far above", "far above 0.001")
    with pytest.raises(UserError, match="can be used but not trained"):
        type(there.dictionary)(there.dictionary.spec)


def test_a_rule_without_constant_threshold_needs_its_module(
    cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    import_plugin(written(tmp_path, PER_TOKEN))
    (plan, *_) = plans_for(cache, "own", {"steps": 3}, kind="sae", firing="best")
    (run,) = train([plan], cache, out=tmp_path / "runs", device="cpu", console=console)
    assert load_run(run.path).dictionary.encode(0, torch.ones(3, 16)).tokens == 3
    del registry._RULES["best"]
    with pytest.raises(UserError, match=r"'best', which is not known here.*--plugin"):
        load_run(run.path)


def test_an_unknown_rule_is_refused_with_near_misses(cache: CacheReader) -> None:
    with pytest.raises(UserError, match=r"'bachtopk'; expected one of topk.*Did you mean 'batchtopk'"):
        plans_for(cache, "x", kind="sae", firing="bachtopk", k=3)


def test_names_are_given_once() -> None:
    class Other(Rule):
        name = "topk"

    class Nameless(Rule):
        pass

    with pytest.raises(UserError, match="'topk' already"):
        register(Other)
    with pytest.raises(UserError, match="no name"):
        register(Nameless)


def test_a_module_named_twice_is_imported_once(tmp_path: Path) -> None:
    file = written(tmp_path, PLUGIN)
    assert import_plugin(file) is import_plugin(tmp_path / "." / "mine.py")
    assert names().count("far above") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nimport no_such_module\n", r"ModuleNotFoundError: No module named 'no_such_module' \(line 2\)"),
        ("def f(:\n", r"SyntaxError: .*\(line 1\)"),
        (PLUGIN.replace("far above", "relu"), "rule 'relu' already"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        import_plugin(written(tmp_path, text, "broken.py"))


def test_a_module_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        import_plugin(tmp_path / "nothing.py")
    with pytest.raises(UserError, match="no Python file"):
        import_plugin(written(tmp_path, "", "recipe.toml"))


def test_plugins_may_stand_anywhere_on_the_line() -> None:
    line = ["thresher", "train", "--plugin", "a.py", "r.toml", "--plugin=b.py", "--resume"]
    assert _plugins_first(line) == ["thresher", "--plugin", "a.py", "--plugin=b.py", "train", "r.toml", "--resume"]
    assert _plugins_first(["thresher", "train", "--plugin"]) == ["thresher", "--plugin", "train"]
