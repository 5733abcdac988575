"""Tables to dataclasses and back, strictly."""

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.cache.errors import UserError
from thresher.cache.records import (
    canonical,
    described,
    differences,
    fingerprint,
    from_dict,
    override,
    product,
    to_dict,
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    size: int
    """How many."""
    rate: float = 0.5
    rule: Literal["topk", "relu"] = "topk"
    """Which one
    fires."""
    layers: tuple[int, ...] | None = None
    name: str = ""


def test_a_table_round_trips() -> None:
    raw = {"size": 3, "rate": 1.0, "rule": "relu", "layers": [0, 2], "name": "x"}
    sample = from_dict(Sample, raw, "sample")
    assert sample == Sample(size=3, rate=1.0, rule="relu", layers=(0, 2), name="x")
    assert to_dict(sample) == raw


def test_integers_widen_and_whole_floats_narrow() -> None:
    sample = from_dict(Sample, {"size": 1e6, "rate": 2}, "sample")
    assert (sample.size, type(sample.size), sample.rate, type(sample.rate)) == (1_000_000, int, 2.0, float)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"size": 1, "rte": 2.0}, ["[sample]", "'rte'", "Did you mean 'rate'", "size, rate, rule"]),
        ({}, ["[sample]", "'size'", "integer", "missing"]),
        ({"size": "3"}, ["sample.size", "'3'", "str", "integer"]),
        ({"size": True}, ["sample.size", "True", "integer"]),
        ({"size": 1.5}, ["sample.size", "1.5", "integer"]),
        ({"size": 1, "rate": float("nan")}, ["sample.rate", "nan", "number"]),
        ({"size": 1, "rule": "topc"}, ["sample.rule", '"topk" | "relu"', "Did you mean 'topk'"]),
        ({"size": 1, "layers": ["a"]}, ["sample.layers", "list of integer"]),
    ],
)
def test_a_bad_table_names_field_expected_and_got(raw: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(Sample, raw, "sample")
    for word in words:
        assert word in str(caught.value)


def test_help_comes_from_the_docstring_under_the_field() -> None:
    rows = {row[0]: row[1:] for row in described(Sample)}
    assert rows["size"] == ("integer", "required", "How many.")
    assert rows["rule"] == ('"topk" | "relu"', '"topk"', "Which one fires.")
    assert rows["layers"] == ("list of integer", "null", "")


@dataclass(frozen=True, kw_only=True)
class Wider(Sample):
    width: int = 1
    """How wide."""


def test_help_of_an_inherited_field_is_that_of_its_owner() -> None:
    helps = {row[0]: row[3] for row in described(Wider)}
    assert (helps["size"], helps["rule"], helps["width"]) == ("How many.", "Which one fires.", "How wide.")


def test_override_copies_and_reaches_into_tables() -> None:
    raw = {"train": {"lr": 1.0}}
    assert override(raw, {"train.lr": 2.0, "data.source": "x"}) == {"train": {"lr": 2.0}, "data": {"source": "x"}}
    assert raw == {"train": {"lr": 1.0}}
    with pytest.raises(UserError, match=r"table\.key"):
        override(raw, {"lr": 1})


def test_product_runs_through_all_combinations_first_list_slowest() -> None:
    rows = list(product({"a": {"x": [1, 2], "y": 5}, "b": {"z": ["p", "q"]}}))
    assert [tuple(row.values()) for row in rows] == [(1, 5, "p"), (1, 5, "q"), (2, 5, "p"), (2, 5, "q")]
    assert list(product({})) == [{}]
    with pytest.raises(UserError, match="empty list"):
        list(product({"a": {"x": []}}))


def test_differences_name_every_key_with_both_values() -> None:
    lines = differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})
    assert lines == ["a.c: expected 2, got 3", "d: expected 'nothing', got 4"]


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers())))
def test_fingerprint_ignores_key_order_and_sees_every_value(value: dict) -> None:
    reordered = dict(reversed(value.items()))
    assert fingerprint(value) == fingerprint(reordered)
    assert fingerprint({**value, "extra": 1}) != fingerprint({**value, "extra": 2})


def test_canonical_is_bytes_without_spaces_and_refuses_nan() -> None:
    assert canonical({"b": 1, "a": [1.5, "é"]}) == '{"a":[1.5,"é"],"b":1}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))
