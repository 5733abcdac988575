"""docs/methods.md against the code: what it says goes together does, what it says is refused is, its tests exist."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from thresher.cache.errors import UserError
from thresher.train.dictionary import rules
from thresher.train.dictionary.spec import DictionaryConfig, DictionarySpec
from thresher.train.dictionary.topologies import topology

HERE = Path(__file__).parent.parent
PAGE = (HERE.parent / "docs" / "methods.md").read_text(encoding="utf-8")

RULES: dict[str, dict[str, Any]] = {
    "relu": {"sparsity": 0.1},
    "topk": {"k": 4},
    "groupmax": {"k": 4},
    "batchtopk": {"k": 4},
    "global": {"k": 4},
    "jumprelu": {"sparsity": 0.1},
    "gated": {"sparsity": 0.1},
    "gate": {"sparsity": 0.1},
}
KINDS: dict[str, dict[str, Any]] = {
    "sae": {}, "transcoder": {}, "clt": {}, "crosscoder": {}, "molt": {"transforms": 8, "ranks": (4, 2)},
}  # fmt: skip
ASKED: dict[str, dict[str, Any]] = {
    "k": {"k": 4},
    "k_by_layer": {"k_by_layer": (4, 2)},
    "sparsity": {"sparsity": 0.1},
    'penalty = "l1"': {"penalty": "l1"},
    'penalty = "lp"': {"penalty": "lp"},
    'penalty = "l0"': {"penalty": "l0"},
    'penalty = "tanh"': {"penalty": "tanh"},
    "multi_topk": {"multi_topk": 0.125},
    "resample": {"resample": 10},
    'rank_by = "norm"': {"rank_by": "norm"},
    'pool = "joint"': {"pool": "joint"},
    "k_anneal": {"k_anneal": 10},
    "preact": {"preact": 0.1},
    "theta, bandwidth, theta_unit": {"theta": 1.0, "bandwidth": 0.5, "theta_unit": "raw"},
    "threshold_decay": {"threshold_decay": 0.9},
    "prefixes": {"prefixes": (0.5, 1)},
    "pre_bias": {"pre_bias": True},
    "skip": {"skip": True},
    'aux_scope = "all"': {"aux_scope": "all"},
    'penalty_norm = "l1"': {"penalty_norm": "l1"},
    'norm = "sum"': {"norm": "sum"},
    'decoder = "unit_per_target"': {"decoder": "unit_per_target"},
}
"""What a row of the page's table asks for."""


def table(first: str) -> list[list[str]]:
    """Cells of the rows of the table whose head begins so."""
    (block,) = re.findall(rf"^\| {re.escape(first)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]


def refusal(kind: str, rule: str, **asked: Any) -> str | None:
    """Why a recipe's table and its dictionary are refused; None: they are not."""
    given = {**KINDS[kind], "kind": kind, "firing": rule, **RULES[rule], **asked}
    cls, many = topology(kind), 2 if topology(kind).joint else 1
    size = {} if kind == "molt" else {"n_latents": 24}
    sites = tuple(f"s{i}" for i in range(many))
    spec = {key: value for key, value in given.items() if key not in ("decoder", "k_by_layer")}
    try:
        DictionaryConfig(**given, **size)
        DictionarySpec(
            **spec, reads=sites, writes=sites if cls.own_site else tuple(f"w{s}" for s in sites), unit_norm=False,
            layers=tuple(range(many)), d_in=cls.width(6, many), d_out=6, n_latents=24,
        )  # fmt: skip
    except UserError as error:
        return str(error)
    return None


def test_rules_and_topologies_go_together_as_the_page_says() -> None:
    rows = table("firing")
    assert [row[0].strip("`") for row in rows] == list(RULES)
    assert set(RULES) == set(rules.names()) - {name for name in rules.names() if " " in name}
    for name, *cells, why in rows:
        for kind, cell in zip(KINDS, cells, strict=True):
            found = refusal(kind, name.strip("`"))
            assert (found is None) == (cell == "yes"), f"{name} × {kind}: {found}"
            assert found is None or why in found


@pytest.mark.parametrize("row", table("setting"), ids=lambda row: row[0])
def test_settings_are_taken_by_those_that_the_page_names(row: list[str]) -> None:
    label, takers, _ = row
    named = re.findall(r"\w+", takers)
    asked = ASKED[label.strip("`").replace("`", "")]
    pairs = [(k, r) for k, r in itertools.product(KINDS, RULES) if refusal(k, r) is None]
    took = {(kind, rule) for kind, rule in pairs if refusal(kind, rule, **asked) is None}
    some_rules, some_kinds = (set(every).intersection(named) or set(every) for every in (RULES, KINDS))
    assert took == {(kind, rule) for kind, rule in pairs if kind in some_kinds and rule in some_rules}


def test_every_row_of_the_settings_is_known() -> None:
    assert {row[0].replace("`", "") for row in table("setting")} == ASKED.keys()


def test_every_fault_names_tests_that_exist() -> None:
    written = "\n".join(path.read_text(encoding="utf-8") for path in HERE.rglob("test_*.py"))
    known = set(re.findall(r"^def (test_\w+)\(", written, re.MULTILINE))
    rows = table("fault")
    assert [row[0].split(".")[0] for row in rows[:10]] == [str(i) for i in range(1, 11)]
    for fault, tests in rows:
        names = re.findall(r"`(\w+)`", tests)
        assert names, fault
        assert set(names) <= known, f"{fault}: {set(names) - known}"


def test_every_setting_of_the_losses_is_explained() -> None:
    import dataclasses

    from thresher.train.dictionary.objective import Objective

    for field in dataclasses.fields(Objective):
        assert f"`{field.name}" in PAGE, field.name
