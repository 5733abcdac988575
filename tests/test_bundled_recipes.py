"""The bundled recipes: every system's are there, resolve offline, have the published sizes, and are told in docs."""

import io
import json
import socket
from collections import Counter
from pathlib import Path
from typing import NoReturn

import pytest
from rich.console import Console

from thresher.commands.recipes import check_recipe
from thresher.commands.wiring import read_recipe
from thresher.harvest import target
from thresher.recipes.checking import Checked
from thresher.recipes.display import page, print_list
from thresher.recipes.reading import Recipe, bundled_names
from thresher.train.dictionary.spec import DictionaryConfig

ROOT = Path(__file__).parent.parent
REPLICATED = {
    *("gpt2-l8-batchtopk", "gpt2-l8-jumprelu", "gpt2-l8-global", "lsm4-plt", "lsm4-clt"),
    *("lsm4-e2e-cascading", "lsm4-e2e-parallel", "lsm4-e2e-independent", "lsm4-spd"),
    *("gpt2-clt-gen1", "gpt2-clt-jumprelu", "gpt2-plt-jumprelu", "gpt2-clt-topk", "gpt2-clt-matryoshka"),
    *("gpt2-l8-molt", "pythia160m-topk", "pythia70m-l3-topk"),
}
RAW_UNITS = ("gpt2-l8-jumprelu", "gpt2-clt-gen1", "gpt2-clt-jumprelu", "gpt2-plt-jumprelu", "gpt2-l8-molt")
"""Those whose thresholds are in units of the pre-activations."""


@pytest.fixture(scope="module")
def recipes() -> dict[str, Recipe]:
    return {name: read_recipe(name, []) for name in bundled_names()}


@pytest.fixture(scope="module")
def checked(recipes: dict[str, Recipe]) -> dict[str, Checked]:
    """Every recipe resolved, where nothing can be loaded."""

    def refused(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a check needs neither model nor network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refused)
        patch.setattr(target, "load_target", refused)
        return {name: check_recipe(recipe) for name, recipe in recipes.items()}


def test_every_replicated_recipe_resolves_and_says_what_is_known(
    recipes: dict[str, Recipe], checked: dict[str, Checked]
) -> None:
    faithful = {name for name, recipe in recipes.items() if recipe.tables["reference"].variant == "faithful"}
    assert "target-lsm4" in faithful, "what the lsm4 recipes explain"
    faithful = {name for name in faithful if recipes[name].variants}
    assert faithful == REPLICATED
    for name, each in checked.items():
        by_hook = name == "toy-skip"  # its label has a hook and no tap, which a check without the model cannot place
        assert each.planned or by_hook or not recipes[name].variants, f"{name}: {each.note}"
    assert all(checked[name].flop for name in REPLICATED)


def test_a_corrected_recipe_changes_the_dictionary_or_the_mask_and_never_the_length(
    recipes: dict[str, Recipe], checked: dict[str, Checked]
) -> None:
    corrected = [name for name, recipe in recipes.items() if recipe.tables["reference"].variant == "corrected"]
    at_fault = {name for name in REPLICATED if name.startswith("lsm4") or name in ("pythia160m-topk", *RAW_UNITS)}
    at_fault -= {"lsm4-spd"}  # has no encoder, no rows
    assert at_fault == {name.removesuffix("-corrected") for name in corrected}
    for name in corrected:
        base = name.removesuffix("-corrected")
        assert base in REPLICATED
        assert base in recipes[name].tables["reference"].differs
        assert [v.label for v in recipes[name].variants] == [v.label for v in recipes[base].variants]
        for one, other in zip(recipes[name].variants, recipes[base].variants, strict=True):
            assert one.tables["train"] == other.tables["train"]
            assert one.tables["dictionary"] != other.tables["dictionary"] or base == "pythia160m-topk"
        if not base.startswith("lsm4"):
            assert recipes[name].tables["data"].keep == "content"
        assert checked[name].parameters == checked[base].parameters


def test_thresholds_in_raw_units_are_corrected(recipes: dict[str, Recipe]) -> None:
    raw = {name for name, recipe in recipes.items() if recipe.variants and _first(recipe).theta_unit == "raw"}
    assert raw == set(RAW_UNITS)
    for name in raw:
        mended = _first(recipes[f"{name}-corrected"])
        assert (mended.theta, mended.bandwidth, mended.theta_unit) == (1.5, 0.25, "spread")


@pytest.mark.parametrize(
    ("name", "source"), [("gpt2-clt-jumprelu", 7e-4), ("gpt2-plt-jumprelu", 7e-4), ("gpt2-clt-gen1", 2e-4)]
)
def test_a_penalty_that_its_source_adds_up_over_layers_weighs_as_much_beside_a_mean_error(
    recipes: dict[str, Recipe], name: str, source: float
) -> None:
    for recipe in (recipes[name], recipes[f"{name}-corrected"]):
        assert _first(recipe).sparsity == pytest.approx(recipe.tables["reference"].layers * source)
        assert _first(recipe).preact in (0.0, 1e-6), "a mean over layers there too"


def _first(recipe: Recipe) -> DictionaryConfig:
    settings = recipe.variants[0].tables["dictionary"]
    assert isinstance(settings, DictionaryConfig)
    return settings


def test_sizes_and_lengths_are_the_published_ones(checked: dict[str, Checked]) -> None:
    """L[F(d_in + d_out + 1) + d_out] for a set of transcoders, LF(d_in + 1) + ½L(L + 1)F d_out + L d_out for a CLT."""
    plt = Counter(each.parameters for each in checked["lsm4-plt"].planned)
    assert plt[25_185_280 // 4] == 4 * 4 + 4, "four layers at four k, and the set of uneven k"
    assert checked["lsm4-clt"].planned[0].parameters == 44_059_648
    assert checked["gpt2-clt-gen1"].parameters == 424_756_224 + 12 * 6144, "and a threshold per latent"
    small, large = (each.parameters for each in checked["gpt2-l8-molt"].planned)
    assert small == 25 * 2560 * 2 * 768 + 25 * 31 * (768 + 2) + 768, "25 · 2560 equivalent latents and 775 gates"
    assert large - 768 == 2 * (small - 768)
    gates = 1024 * (768 + 1) + 6656 * (1024 + 1)
    assert checked["lsm4-spd"].parameters == 4 * (6656 * (768 + 3072) + gates), "V and U of both matrices"
    steps = {name: each.steps for name, each in checked.items()}
    assert steps["lsm4-plt"] == (122_070,)
    assert steps["lsm4-e2e-independent"] == (61_035,)
    assert steps["gpt2-clt-gen1"] == (2000,)
    assert checked["gpt2-clt-gen1"].planned[0].rows == 2000 * 4000 * 4 * 4
    assert checked["pythia70m-l3-topk"].planned[0].rows == pytest.approx(1e7, rel=1e-3)


def test_faithful_recipes_keep_every_unpadded_position(recipes: dict[str, Recipe]) -> None:
    assert {recipes[name].tables["data"].keep for name in REPLICATED} == {"all"}
    for name in REPLICATED:
        assert "the first position of a context" in recipes[name].tables["reference"].differs, name


def test_the_shape_told_of_the_bundled_model_is_its_own(recipes: dict[str, Recipe]) -> None:
    config = json.loads((ROOT / "harvest/bundled/books-128/config.json").read_text())
    on_it = [recipe for recipe in recipes.values() if recipe.tables["target"].model == "bundled:books-128"]
    assert on_it
    for recipe in on_it:
        told = recipe.tables["reference"]
        assert (told.layers, told.width) == (config["n_layer"], config["n_embd"]), recipe.name


def test_the_list_names_every_recipe_within_80_columns(recipes: dict[str, Recipe]) -> None:
    text = io.StringIO()
    print_list(recipes.values(), Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for name in recipes:
        assert any(line.split()[:1] == [name] for line in lines), name


def test_the_page_of_recipes_is_what_they_say(recipes: dict[str, Recipe], checked: dict[str, Checked]) -> None:
    written = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    told = page(recipes.values(), checked.values())
    assert told in written, "docs/recipes.md is not up to date: put `thresher recipes check --markdown` into it"
