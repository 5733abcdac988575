"""Every recipe runs, and learns: harvested, trained and evaluated at a reduced size, on the bundled model and text.

A reduced recipe keeps what makes it that recipe (sites, topology, firing rule, losses, objective, optimiser, schedule,
constraint, start) and changes sizes, lengths, rates, model and text. Its sweep shrinks to the points that still differ.
The first line of a run's log is the batch that its initial weights saw: what is minimised has to fall below that.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from thresher.cache.records import to_dict
from thresher.commands.evaluate import evaluate_recipe
from thresher.commands.harvest import harvest_recipe
from thresher.commands.target import target_train
from thresher.commands.train import train_recipe
from thresher.commands.wiring import read_recipe
from thresher.evaluate.results import Row
from thresher.harvest.checkpoint import bundled
from thresher.harvest.target import TargetConfig, load_target, load_tokenizer
from thresher.recipes.reading import BUNDLED, Recipe, Variant, bundled_names
from thresher.train.metrics import curves
from thresher.train.run import RunResult

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
    "dictionary.n_latents": 256,
    "dictionary.dead_after": 500,  # silent in one batch, so that AuxK has work
    "train.steps": 20,
    "train.batch_rows": 512,
    "train.lr": 2e-3,
    "train.log_every": 1,
    "train.calibrate_rows": 4000,
    "train.heldout_rows": 1000,
    "evaluate.tokens": 1000,
    "evaluate.training_tokens": 2000,
    "evaluate.resamples": 100,
    "evaluate.neurons": [16],
}
THROUGH_THE_MODEL: dict[str, Any] = {"train.steps": 12, "train.batch_rows": 256, "train.lr": 4e-3}
"""In their place for objective kl."""
LAYER = 2
FALL = 0.93
"""What the error, or the divergence, of the last three batches comes to at most, of that of the first."""
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
    dictionary, training = recipe.tables["dictionary"], recipe.tables["train"]
    sets = SMALL | (THROUGH_THE_MODEL if training.objective != "local" else {})
    if recipe.tables["harvest"].layers is not None:
        sets["harvest.layers"] = [LAYER]
    if dictionary.kind == "molt":
        del sets["dictionary.n_latents"]
        sets |= {"dictionary.transforms": 2, "dictionary.ranks": [16, 8]}
    if dictionary.kind == "decomposition":
        del sets["dictionary.n_latents"]
        sets |= {"dictionary.components": [48, 64], "dictionary.mlp_width": 512, "dictionary.gate_width": 32}
        sets |= {"dictionary.faithfulness_warmup": 20, "train.steps": 20, "train.batch_rows": 512}
    if dictionary.k is not None:
        sets["dictionary.k"] = 8
    if dictionary.aux_k is not None:
        sets["dictionary.aux_k"] = 64
    if dictionary.prefixes is not None:
        sets["dictionary.prefixes"] = [0.0625, 0.1875, 0.3125, 0.5625, 1]
    if any(variant.tables["train"].resolved_warmup for variant in recipe.variants):
        sets["train.warmup"] = 4
    if training.rows is not None:
        sets["train.rows"] = sets.pop("train.steps") * sets["train.batch_rows"]
    if training.micro_rows is not None:
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


@pytest.mark.usefixtures("no_pictures")
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
    for result in results:
        _fell(result)
    assert _asks_for_auxk(results) == _auxk_woke(results)
    judged = evaluate_recipe(recipe, cache, None, None)
    rows = [row for row in judged.rows if row.kind == "replacement"]
    assert {row.protocol for row in rows} == {"cascade", "clean_input", "single_site"}
    assert {row.name for row in rows} >= {variant.label for variant in recipe.variants}
    for row in rows:
        _sound(row)
    layers = {1} if asked.layers else {4}
    assert {len(row.sites) for row in rows if row.name.startswith(("plt", "clt", "sae", "transcoder"))} <= layers


def _fell(result: RunResult) -> None:
    """What is minimised fell below where the initial weights had it."""
    seen = curves(result.path)
    values = [value for value in seen.get("kl", seen["fvu"]) if value is not None]
    assert sum(values[-3:]) / 3 < FALL * values[0], f"{result.name}: {values}"


def _asks_for_auxk(results: Sequence[RunResult]) -> bool:
    return any(json.loads((r.path / "config.json").read_text())["dictionary"]["aux"] > 0 for r in results)


def _auxk_woke(results: Sequence[RunResult]) -> bool:
    """Whether some step had dead latents that explained what was left."""
    lines = [line for r in results for line in zip(*map(curves(r.path).get, ("dead", "aux")), strict=True)]
    return any(dead > 0 and aux > 0 for dead, aux in lines)


def _sound(row: Row) -> None:
    """Numbers are finite and a k is kept, as far as so few steps let it be."""
    assert all(math.isfinite(row.metrics[key]) for key in ("fvu", "delta", "kl")), row.name
    assert row.cost["l0"] > 0, row.name
    k, l0 = row.facts["k"], row.cost["l0"]
    if "-kl-cascade" in row.name and row.protocol == "cascade":
        l0 = row.metrics["l0_patched"]  # of the stream that it was trained on, and its threshold set
    elif "-kl-cascade" in row.name:
        return
    assert k is None or l0 == pytest.approx(k, rel=0.6), row.name


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes that ask for the same sites share a cache."""
    return tmp_path_factory.mktemp("caches")


TARGETS: dict[str, dict[str, Any]] = {
    "target-books-gpt2": {
        "data.source": "text.jsonl",
        "pretrain.n_vocab": 400,
        "pretrain.lr": 1e-2,
    },
    "target-lsm4": {
        "data.source": "rows.jsonl",
        "data.validation_fraction": 0.1,
        "pretrain.tokenizer": "bundled:books-128",
        "pretrain.n_heads": 2,
        "pretrain.n_kv_heads": 2,
        "pretrain.mlp_width": 256,
        "pretrain.pass_contexts": 8,
        "pretrain.lr": 3e-3,
    },
}
SHORT: dict[str, Any] = {
    "pretrain.width": 64,
    "pretrain.context": 64,
    "pretrain.steps": 40,
    "pretrain.batch_contexts": 16,
    "pretrain.warmup": 4,
    "pretrain.log_every": 1,
}


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_a_targets_recipe_at_a_reduced_size_makes_a_model_that_has_learnt(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write_texts()
    target_train(name, [f"{key}={json.dumps(value)}" for key, value in (SHORT | TARGETS[name]).items()])
    folder = Path(read_recipe(name, []).tables["target"].model)
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    result = json.loads((folder / "pretraining.json").read_text())["result"]
    vocabulary = 400 if name == "target-books-gpt2" else 4096
    assert losses[0] == pytest.approx(math.log(vocabulary), rel=0.05), "knows nothing at first"
    assert max(losses[-3:]) < 0.85 * losses[0]
    assert result["validation_ce"] < 0.85 * losses[0]
    assert len(load_target(TargetConfig(model=str(folder), dtype="float32")).sites(["mlp_in", "mlp_out"], None)) == 8


def _write_texts() -> None:
    """text.jsonl: passages. rows.jsonl: rows of 65 token ids, as the hub's gated set has them of 513."""
    lines = (bundled("bundled:books-128", "", "target.model").parent / "books.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"][:1500] for line in lines[::5]]
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ids = [i for ids in load_tokenizer(TargetConfig())(texts, verbose=False)["input_ids"] for i in ids]
    rows = [ids[start : start + 65] for start in range(0, len(ids) - 65, 65)]
    Path("rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
