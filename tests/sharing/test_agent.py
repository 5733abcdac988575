"""W&B's agent calls `thresher train` as docs/sharing.md shows, and the recipe gets what the agent chose."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from tests.sharing.test_card import TABLES
from thresher.cache.errors import UserError
from thresher.recipes.reading import parsed, read
from thresher.train.dictionary.topologies import topology

PAGE = Path(__file__).parents[2] / "docs" / "sharing.md"


def as_the_agent_does(command: list[str], chosen: dict[str, Any]) -> list[str]:
    """The command line of a trial: the macros replaced as in wandb_agent.py."""
    macros = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    line: list[str] = []
    for word in command:
        line += macros[word[2:-1]] if word.startswith("${") else [word]
    return line


@pytest.mark.parametrize(
    "chosen", [{"dictionary.k": 16, "train.lr": 0.0003}, {"dictionary": {"k": 16}, "train": {"lr": 0.0003}}]
)
def test_the_sweep_of_the_page_sets_what_the_agent_chose(chosen: dict[str, Any], tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    recipe, block = (re.findall(rf"```{kind}\n(.*?)```", page, re.S)[0] for kind in ("toml", "yaml"))
    sweep = yaml.safe_load(block)
    assert sweep["metric"]["name"] == "held_out/fvu"  # of the summary: train/tracking.py
    assert set(sweep["parameters"]) == {"dictionary.k", "train.lr"}
    line = as_the_agent_does(sweep["command"], chosen)
    assert line[:2] == ["thresher", "train"]
    told = [value for option, value in itertools.pairwise(line) if option == "--set"]
    (tmp_path / line[2]).write_text(recipe)
    (variant,) = read(str(tmp_path / line[2]), told, TABLES).variants
    assert topology(variant.tables["dictionary"].kind).joint  # one dictionary over all layers: a trial is one run
    assert (variant.tables["dictionary"].k, variant.tables["train"].lr) == (16, 0.0003)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"train.lr": }', "no valid JSON"),
        ('{"trian.lr": 1}', r"'trian\.lr' is no key of a recipe\. Did you mean 'train'"),
        ('{"train": 1}', "Expected table.key"),
    ],
)
def test_an_object_that_sets_nothing_known_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parsed([text], TABLES)
