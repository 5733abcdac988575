"""The model card states what config.json and results.json say, and its recipe is the recipe."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.sharing.conftest import House
from thresher.evaluate.run import EvaluateConfig
from thresher.harvest.corpus import DataConfig
from thresher.harvest.pretraining.settings import PretrainConfig
from thresher.harvest.run import HarvestConfig
from thresher.harvest.target import TargetConfig
from thresher.recipes.reading import read
from thresher.recipes.reference import ReferenceConfig
from thresher.sharing.card import Contents, render
from thresher.sharing.directories import shared_runs
from thresher.sharing.evaluated import read_results
from thresher.sharing.facts import facts, hub_name, short
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionaryConfig

TABLES = {
    "target": TargetConfig,
    "data": DataConfig,
    "harvest": HarvestConfig,
    "dictionary": DictionaryConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "pretrain": PretrainConfig,
    "reference": ReferenceConfig,
}


def contents(house: House, **changes: Any) -> Contents:
    runs = shared_runs([house.runs])
    evaluation = read_results((house.report / "results.json").read_bytes(), "results.json")
    made = Contents(
        repo="ada/books",
        runs={run.name: run.config for run in runs},
        facts=[facts(run.name, run.config, run.weights) for run in runs],
        evaluation=evaluation,
        report_files=frozenset({"plots/delta_l0.png", "plots/fvu_l0.png"}),
        cache_shared=True,
        license="apache-2.0",
    )
    return made._replace(**changes)


def head(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_cards_numbers_are_those_of_the_runs(house: House) -> None:
    made = contents(house)
    card = render(made)
    for name, config in made.runs.items():
        held_out = config["training"]["held_out"]
        l0, fvu = (sum(held_out[key]) / len(held_out[key]) for key in ("l0", "fvu"))
        (line,) = [
            line for line in card.splitlines() if line.startswith(f"| `{name}` | {config['dictionary']['kind']}")
        ]
        cells = [cell.strip() for cell in line.split("|")]
        assert (float(cells[8]), float(cells[9])) == (pytest.approx(l0, rel=1e-3), pytest.approx(fvu, rel=1e-3))
        assert f"means on {held_out['split']} rows" in card
    for fact in made.facts:
        assert f"| `{fact.name}` | `{fact.weights}` |" in card
        assert str(fact.cache) in card


def test_the_model_index_has_every_measured_number_once(house: House) -> None:
    made = contents(house)
    assert made.evaluation is not None
    (model,) = head(render(made))["model-index"]
    (result,) = model["results"]
    found = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert len(found) == len(result["metrics"])
    expected = {}
    for row in made.evaluation.replacements:
        expected[f"FVU, {row.name}"], expected[f"L0, {row.name}"] = row.metric("fvu"), row.metric("l0")
        expected[f"δ cross-entropy, {row.name}, {row.protocol}"] = row.metric("delta")
    assert found == expected
    assert "model-index" not in head(render(contents(house, evaluation=None)))


def test_the_head_names_what_the_hub_searches_by(house: House) -> None:
    runs = contents(house).facts
    made = contents(house, facts=[fact._replace(model="gpt2", data="Skylion007/openwebtext") for fact in runs])
    said = head(render(made))
    assert (said["library_name"], said["license"]) == ("thresher", "apache-2.0")
    assert (said["base_model"], said["datasets"]) == ("gpt2", ["Skylion007/openwebtext"])
    assert {"clt", "sae", "topk", "interpretability"} <= set(said["tags"])
    local = contents(house, facts=[fact._replace(model="/home/ada/m", data="bundled:books") for fact in runs])
    assert not {"base_model", "datasets"} & set(head(render(local)))
    assert "/home/ada" not in render(local)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("gpt2", True),
        ("EleutherAI/pythia-70m", True),
        ("bundled:books-128", False),
        ("/home/ada/model", False),
        ("text.parquet", False),
        ("tests/sharing", False),
        ("a/b/c", False),
        (None, False),
    ],
)
def test_only_names_that_can_be_the_hubs_are_given_as_such(name: str | None, is_one: bool) -> None:
    assert (hub_name(name) is not None) == is_one
    assert "/home" not in short(name)


def test_the_recipe_in_the_card_is_the_runs_recipe(house: House, tmp_path: Path) -> None:
    given = read("books-sweep", [], TABLES)
    made = contents(house)
    first, second = (variant.resolved for variant in given.variants[:2])
    configs = {name: {**config, "recipe": first if name == "clt" else second} for name, config in made.runs.items()}
    card = render(made._replace(runs=configs))
    text = card.split("```toml\n")[1].split("```")[0]
    varied = next(line for line in card.split("## Recipe")[1].splitlines() if line.startswith("| run |"))
    names = [cell.strip() for cell in varied.split("|")[2:-1]]
    (row,) = [line for line in card.split("## Recipe")[1].splitlines() if line.startswith("| `clt` |")][:1]
    values = [cell.strip() for cell in row.split("|")[2:-1]]
    own = [f"{name}={value}" for name, value in zip(names, values, strict=True) if value]
    tomllib.loads(text)
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    (variant,) = read(str(file), own, TABLES).variants
    assert variant.resolved == first
