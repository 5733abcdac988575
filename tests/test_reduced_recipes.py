"""Every recipe runs: harvested, trained and evaluated at a reduced size, on the bundled model and text.

A reduced recipe keeps what makes it that recipe (sites, topology, firing rule, losses, objective, optimiser, schedule,
constraint, start) and changes sizes, lengths, model and text. Its sweep shrinks to the points that still differ.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from thresher.cache.records import to_dict
from thresher.commands.evaluate import evaluate_recipe
from thresher.commands.harvest import harvest_recipe
from thresher.commands.train import train_recipe
from thresher.commands.wiring import read_recipe
from thresher.evaluate.results import Row
from thresher.recipes.reading import BUNDLED, Recipe, Variant, bundled_names

SMALL: dict[str, Any] = {
    "target.model": "bundled:books-128",
    "target.dtype": "float32",
    "data.source": "bundled:books",
    "data.column": "text",
    "data.packing": "packed",
    "data.streaming": False,
    "data.context": 64,
    "data.max_tokens": 24_000,
    "data.test_fraction": 0.25,
    "data.validation_fraction": 0.15,
    "dictionary.n_latents": 128,
    "dictionary.dead_after": 1500,
    "train.steps": 8,
    "train.batch_rows": 512,
    "train.log_every": 4,
    "train.calibrate_rows": 4000,
    "train.heldout_rows": 1000,
    "evaluate.tokens": 1000,
    "evaluate.training_tokens": 2000,
    "evaluate.resamples": 100,
    "evaluate.neurons": [16],
}
LAYER = 2
OF_OTHERS = [  # those that train dictionaries
    name
    for name in bundled_names()
    if not name.startswith("target") and "\nvariant = " in (BUNDLED / f"{name}.toml").read_text(encoding="utf-8")
]
QUICK = ("gpt2-clt-matryoshka", "lsm4-e2e-cascading")
"""Those that run with all tests: one local, one through the model."""


def reduced(name: str) -> Recipe:
    """A bundled recipe at the size of `SMALL`, and whatever else of its sizes would not fit the bundled model."""
    recipe = read_recipe(name, [])
    sets = dict(SMALL)
    dictionary = recipe.tables["dictionary"]
    if recipe.tables["harvest"].layers is not None:
        sets["harvest.layers"] = [LAYER]
    if dictionary.kind == "molt":
        del sets["dictionary.n_latents"]
        sets |= {"dictionary.transforms": 2, "dictionary.ranks": [16, 8]}
    if dictionary.kind == "decomposition":
        del sets["dictionary.n_latents"]
        sets |= {"dictionary.components": [48, 64], "dictionary.mlp_width": 512, "dictionary.gate_width": 32}
        sets["dictionary.faithfulness_warmup"] = 20
    if dictionary.k is not None:
        sets["dictionary.k"] = 8
    if dictionary.aux_k is not None:
        sets["dictionary.aux_k"] = 32
    if dictionary.prefixes is not None:
        sets["dictionary.prefixes"] = [0.0625, 0.1875, 0.3125, 0.5625, 1]
    if recipe.tables["train"].rows is not None:
        sets["train.rows"] = sets.pop("train.steps") * sets["train.batch_rows"]
    if recipe.tables["train"].micro_rows is not None:
        sets["train.micro_rows"] = 256
    return _mended(read_recipe(name, [f"{key}={json.dumps(value)}" for key, value in sets.items()]))


def _mended(recipe: Recipe) -> Recipe:
    """Without a bound on the cache: no override can take one away."""

    def mend(tables: dict[str, Any]) -> dict[str, Any]:
        return tables | {"harvest": dataclasses.replace(tables["harvest"], window_gb=None)}

    def again(variant: Variant) -> Variant:
        tables = mend(variant.tables)
        return variant._replace(tables=tables, resolved={name: to_dict(tables[name]) for name in variant.resolved})

    return recipe._replace(tables=mend(recipe.tables), variants=tuple(map(again, recipe.variants)))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in OF_OTHERS]
)
def test_a_recipe_at_a_reduced_size_leads_to_judged_dictionaries(
    name: str, tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = reduced(name)
    monkeypatch.chdir(tmp_path)
    asked = recipe.tables["harvest"]
    cache = caches / f"{'-'.join(asked.sites)}-{asked.layers}-{recipe.tables['data'].keep}.zarr"
    harvest_recipe(recipe, cache)
    results = train_recipe(recipe, cache, None, resume=False, device="cpu", wandb="disabled")
    assert {result.status for result in results} == {"trained"}
    judged = evaluate_recipe(recipe, cache, None, None)
    rows = [row for row in judged.rows if row.kind == "replacement"]
    assert {row.protocol for row in rows} == {"cascade", "clean_input", "single_site"}
    assert {row.name for row in rows} >= {variant.label for variant in recipe.variants}
    for row in rows:
        _sound(row)
    layers = {1} if asked.layers else {4}
    assert {len(row.sites) for row in rows if row.name.startswith(("plt", "clt", "sae", "transcoder"))} <= layers


def _sound(row: Row) -> None:
    """Too few steps for the error to fall for certain, but numbers are finite and a k is kept."""
    assert all(math.isfinite(row.metrics[key]) for key in ("fvu", "delta", "kl")), row.name
    assert row.cost["l0"] > 0, row.name
    k = row.facts["k"]
    assert k is None or row.cost["l0"] == pytest.approx(k, rel=0.6), row.name


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes that ask for the same sites share a cache."""
    return tmp_path_factory.mktemp("caches")
