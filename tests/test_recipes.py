"""A recipe file to checked tables and labelled variants."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from thresher.cache.errors import UserError
from thresher.recipes.reading import bundled_names, read


@dataclass(frozen=True, kw_only=True)
class Target:
    model: str


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    kind: Literal["sae", "transcoder"] = "transcoder"
    firing: Literal["topk", "relu"] = "topk"
    k: float = 16.0


@dataclass(frozen=True, kw_only=True)
class Train:
    lr: float = 1e-3


TABLES = {"target": Target, "dictionary": Dictionary, "train": Train}


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_one_sweep_table_is_a_product(tmp_path: Path) -> None:
    text = "about = 'x'\n[target]\nmodel = 'm'\n[sweep]\ndictionary.k = [8, 16]\ntrain.lr = [1e-3, 3e-4]\n"
    read_back = read(recipe(tmp_path, text), [], TABLES)
    assert [v.label for v in read_back.variants] == [
        f"transcoder-topk-k{k}-lr{lr}" for k in (8, 16) for lr in ("0.001", "0.0003")
    ]
    assert (read_back.name, read_back.about) == ("mine", "x")
    assert read_back.variants[3].tables["dictionary"] == Dictionary(k=16.0)
    assert read_back.variants[3].resolved["train"] == {"lr": 3e-4}


def test_sweep_blocks_stand_side_by_side_and_may_be_named(tmp_path: Path) -> None:
    text = (
        "[target]\nmodel = 'm'\n"
        "[[sweep]]\ndictionary.k = [8, 16]\n"
        "[[sweep]]\ndictionary.kind = 'sae'\ndictionary.firing = ['topk', 'relu']\n"
        "[[sweep]]\nname = 'wide'\ndictionary.k = 64\n"
    )
    labels = [v.label for v in read(recipe(tmp_path, text), [], TABLES).variants]
    assert labels == ["transcoder-topk-k8", "transcoder-topk-k16", "sae-topk", "sae-relu", "wide"]


def test_a_recipe_without_a_sweep_is_one_variant(tmp_path: Path) -> None:
    variants = read(recipe(tmp_path, "[target]\nmodel = 'm'\n"), [], TABLES).variants
    assert [v.label for v in variants] == ["transcoder-topk"]


def test_set_wins_over_the_file_and_over_the_sweep(tmp_path: Path) -> None:
    path = recipe(
        tmp_path, "[target]\nmodel = 'm'\n[train]\nlr = 1.0\n[[sweep]]\ndictionary.firing = ['topk', 'relu']\n"
    )
    read_back = read(path, ["train.lr=2", "target.model=other", "dictionary.k=4"], TABLES)
    assert read_back.tables["train"].lr == 2.0
    assert read_back.tables["target"].model == "other"
    assert {v.tables["dictionary"].k for v in read_back.variants} == {4.0}


@pytest.mark.parametrize(
    ("text", "assignments", "words"),
    [
        ("[target]\nmodel = 'm'\n[trane]\n", [], ["[trane]", "Did you mean 'train'", "target, dictionary, train"]),
        ("[target]\nmodel = 'm'\n[train]\nlrr = 1\n", [], ["[train]", "'lrr'", "Did you mean 'lr'"]),
        ("[target]\nmodel = 'm'\n[train]\nlr = 'fast'\n", [], ["train.lr", "'fast'", "number"]),
        ("[target]\n", [], ["[target]", "'model'", "missing"]),
        ("[target\n", [], ["no valid TOML", "line 1"]),
        ("target = 3\n", [], ["[target]", "expected a table"]),
        ("[target]\nmodel = 'm'\n", ["lr=3"], ["--set", "table.key=value"]),
        ("[target]\nmodel = 'm'\n", ["tran.lr=3"], ["no table [tran]", "Did you mean 'train'"]),
        ("[target]\nmodel = 'm'\n[sweep]\ntarget.model = ['a', 'b']\n", [], ["[sweep]", "[target]", "share one cache"]),
        ("[target]\nmodel = 'm'\n[sweep]\ndictionary.k = []\n", [], ["empty list"]),
        ("[target]\nmodel = 'm'\n[[sweep]]\ntrain.lr = 1\n[[sweep]]\ntrain.lr = 2\n", [], ["both called", "name ="]),
    ],
)
def test_a_bad_recipe_says_what_and_where(tmp_path: Path, text: str, assignments: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read(recipe(tmp_path, text), assignments, TABLES)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_recipe_is_told_the_nearest_ones_and_where_all_are() -> None:
    with pytest.raises(UserError, match=r"neither a file nor a bundled recipe.*'books-demo'.*recipes list") as caught:
        read("boks-demo", [], TABLES)
    assert sum(name in str(caught.value) for name in bundled_names()) <= 3
