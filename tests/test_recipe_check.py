"""What is known of recipes beside their settings, and their check without model or network."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from thresher import cli
from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.records import from_dict
from thresher.commands.recipes import check_recipe
from thresher.commands.tables import known_tables
from thresher.commands.wiring import read_recipe
from thresher.recipes import reading
from thresher.recipes.checking import Checked, Planned, Shape, check, sites_of
from thresher.recipes.reading import read
from thresher.recipes.reference import ReferenceConfig

SHAPE = Shape(layers=2, width=8)
TAPS = ("resid_pre", "mlp_in", "mlp_hidden", "mlp_out")
RECIPE = """
about = "mine"
[reference]
layers = 2
width = 8
[data]
max_tokens = 1000
test_fraction = 0.1
[harvest]
sites = ["mlp_in", "mlp_out"]
[dictionary]
n_latents = 32
k = 2
[train]
batch_rows = 100
"""


def recipe(folder: Path, text: str = RECIPE, name: str = "mine") -> str:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return str(path)


def test_sites_are_the_taps_of_a_target_of_that_shape() -> None:
    found = sites_of(SHAPE, ["mlp_in", "L01.mlp_hidden"], None, TAPS)
    assert found is not None
    assert list(found.values()) == [
        Site("L00.mlp_in", 0, "mlp_in", 8),
        Site("L01.mlp_in", 1, "mlp_in", 8),
        Site("L01.mlp_hidden", 1, "mlp_hidden", 32),
    ]
    chosen = sites_of(SHAPE, ["mlp_out"], [1], TAPS)
    assert chosen is not None
    assert list(chosen) == ["L01.mlp_out"]
    assert sites_of(SHAPE, ["blocks.0.attn.hook_out"], None, TAPS) is None, "only the target knows"


def test_a_tap_or_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'mlp_in'"):
        sites_of(SHAPE, ["mpl_in"], None, TAPS)
    with pytest.raises(UserError, match=r"layers \[2\], but reference.layers is 2"):
        sites_of(SHAPE, ["mlp_in"], [1, 2], TAPS)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"layers": 2}, "both or neither"),
        ({"layers": 0, "width": 8}, "reference.layers is 0"),
        ({"variant": "faithful", "compute": "1e9 tokens"}, "result, differs is empty"),
        ({"variant": "copied"}, "expected one of"),
    ],
)
def test_a_reference_says_all_or_is_refused(raw: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_dict(ReferenceConfig, raw, "reference")


def test_sizes_and_lengths_are_those_of_the_training(tmp_path: Path) -> None:
    """Two transcoders of 32 · (8 + 1 + 8) + 8 numbers; 890 rows (a tenth and a hundredth held out) are 9 steps."""
    checked = check_recipe(read_recipe(recipe(tmp_path), ["data.validation_fraction=0.01"]))
    assert checked == Checked("mine", 1, (Planned(552, 9, 900),) * 2, "")
    assert checked.flop == 6 * 2 * 552 * 900
    unknown = check_recipe(read_recipe(recipe(tmp_path, RECIPE.replace("max_tokens = 1000", "")), []))
    assert (unknown.steps, unknown.flop) == ((), None)


L1 = ["dictionary.firing=relu", "dictionary.sparsity=0.1", "train.steps=10"]
LP = [
    f"dictionary.{setting}"
    for setting in ("firing=relu", "penalty=lp", "sparsity=0.1", "p_start=5", "p_updates=8", "p_end=0.5")
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.micro_rows=50"], "cuts the batches of 'transcoder-batchtopk-kl-cascade-L00' into parts"),
        (["dictionary.prefixes=[0.5, 1.0]"], "only the main one is patched into the model"),
        (["dictionary.kind=crosscoder"], "cannot run along in a pass"),
        (["dictionary.kind=clt", "dictionary.pool=joint"], "so they cannot compete"),
        (["dictionary.k_anneal=20", "train.steps=10"], "k_anneal is 20, but the run has 10 steps"),
        ([*LP, "train.steps=10"], "p_updates is 8, but the run has 10 steps"),
        ([*L1, "dictionary.penalty_warmup=11"], "penalty_warmup is 11, but the run has 10 steps"),
    ],
)
def test_what_training_refuses_is_no_recipe_that_holds_together(tmp_path: Path, changes: list[str], words: str) -> None:
    counts = "dictionary.firing=relu" not in changes
    path = recipe(tmp_path, RECIPE if counts else RECIPE.replace("k = 2\n", ""))
    check_recipe(read_recipe(recipe(tmp_path, name="fine"), ["train.objective=kl"]))
    with pytest.raises(UserError, match=words):
        check_recipe(read_recipe(path, ["train.objective=kl", *changes]))


def test_a_recipe_of_unknown_shape_is_checked_as_far_as_its_tables_go(tmp_path: Path) -> None:
    plain = read(recipe(tmp_path, RECIPE.replace("layers = 2\nwidth = 8", "")), [], known_tables())
    assert "tables only" in check(plain, TAPS, lambda *_: pytest.fail("nothing to plan on")).note


def test_what_is_known_of_a_recipe_is_not_stored_with_its_runs(tmp_path: Path) -> None:
    (variant,) = read_recipe(recipe(tmp_path), []).variants
    assert "reference" not in variant.resolved
    assert variant.tables["reference"].layers == 2


def test_one_bad_recipe_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BUNDLED", tmp_path)
    recipe(tmp_path, RECIPE.replace("mlp_in", "mpl_in"), "bad")
    recipe(tmp_path, RECIPE, "good")
    done = CliRunner().invoke(cli.app, ["recipes", "check"])
    assert done.exit_code == 1
    assert "recipe bad: harvest.sites has 'mpl_in'" in done.output
    assert "good" in done.output
    assert done.stdout.splitlines()[-1] == "FAILED 1: bad"
    assert CliRunner().invoke(cli.app, ["recipes", "check", "good"]).exit_code == 0


def test_the_verdict_is_the_last_line_and_json_is_for_those_who_ask(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    plain = CliRunner().invoke(cli.app, ["recipes", "check", path])
    assert plain.stdout.splitlines()[-1] == "OK mine holds together."
    assert "{" not in plain.stdout
    asked = CliRunner().invoke(cli.app, ["recipes", "check", path, "--resolved"])
    written = json.loads(asked.stdout)
    assert written == {variant.label: variant.resolved for variant in read_recipe(path, []).variants}
    assert written["transcoder-batchtopk"]["train"]["beta2"] == 0.999, "a default, written out"
    assert asked.stderr.splitlines()[-1] == "OK mine holds together."
    target = json.loads(CliRunner().invoke(cli.app, ["recipes", "check", "target-lsm4", "--resolved"]).stdout)
    assert target["target-lsm4"]["pretrain"]["steps"] == 100_000
    nameless = CliRunner().invoke(cli.app, ["recipes", "check", "--resolved"])
    assert isinstance(nameless.exception, UserError)
    assert "--resolved needs a RECIPE" in str(nameless.exception)
