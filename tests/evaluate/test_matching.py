"""Families at equal cost and equal loss: the golden, its inverse, and what is not known outside a range."""

import numpy as np
import pytest

from thresher.evaluate.matching import chosen, comparisons, cost_at, curves, loss_at, matched_l0
from thresher.evaluate.results import Row


def row(family, l0, delta, size=None, seed=None, **facts):
    metrics = {"delta": delta} | ({} if size is None else {"n_latents": size})
    facts |= {} if seed is None else {"seed": seed}
    rest = ({}, (), (), facts, {}, {}, ())
    return Row(
        f"{family}-{l0}-{seed}", "replacement", family, "cascade", ("x",), ("y",), metrics, {}, {"l0": l0}, *rest
    )


def loss(pairs, cost):
    costs, losses = np.array(pairs, dtype=float).T
    return float(loss_at(costs[None], losses[None], cost)[0])


def cost(pairs, loss):
    costs, losses = np.array(pairs, dtype=float).T
    return float(cost_at(costs[None], losses[None], loss)[0])


# --- one curve ------------------------------------------------------------------------------------------------------


def test_matched_cost_and_matched_loss_by_hand():
    assert loss([(8, 0.4), (32, 0.2)], 16) == pytest.approx(0.3)
    assert cost([(8, 0.4), (32, 0.2)], 0.3) == pytest.approx(16)


def test_nothing_is_extrapolated_beyond_3_per_cent():
    own = [(32, 0.2), (8, 0.4)]
    assert loss(own, 32.5) == 0.2  # a measured point as good as there
    assert loss(own, 7.9) == 0.4
    assert np.isnan([loss(own, 34), loss(own, 40), loss(own, 4), cost(own, 0.41), cost(own, 0.19)]).all()


def test_a_single_point_is_known_only_where_it_is():
    assert loss([(8, 0.4)], 8.1) == 0.4
    assert cost([(8, 0.4)], 0.4) == 8
    assert np.isnan([loss([(8, 0.4)], 9), cost([(8, 0.4)], 0.39)]).all()


def test_of_several_crossings_the_cheapest_counts():
    """Down through .3 at 16, up through it at 64, down again."""
    own = [(8, 0.4), (32, 0.2), (128, 0.4), (512, 0.1)]
    assert cost(own, 0.3) == pytest.approx(16)
    assert cost(own, 0.2) == pytest.approx(32)


def test_of_several_points_at_one_cost_the_lowest_counts_on_both_sides():
    own = [(8, 0.4), (32, 0.2), (32, 0.9), (128, 0.1)]
    assert loss(own, 16) == pytest.approx(0.3)
    assert loss(own, 32) == 0.2
    assert loss(own, 64) == pytest.approx(0.15)


def test_many_curves_at_once_equal_numpy_one_by_one():
    rng = np.random.default_rng(0)
    costs, losses = 2 ** rng.uniform(1, 6, size=(200, 7)), rng.uniform(size=(200, 7))
    where = 2 ** rng.uniform(0, 7, size=200)
    found = loss_at(costs, losses, where)
    inside = (where >= costs.min(axis=1)) & (where <= costs.max(axis=1))
    assert 30 < inside.sum() < 200
    for own_cost, own_loss, at, value in zip(costs[inside], losses[inside], where[inside], found[inside], strict=True):
        order = np.argsort(own_cost)
        assert value == pytest.approx(np.interp(np.log2(at), np.log2(own_cost[order]), own_loss[order]))


def test_cost_at_a_loss_is_where_the_loss_is_that():
    rng = np.random.default_rng(1)
    costs, losses = 2 ** rng.uniform(1, 6, size=(200, 7)), rng.uniform(size=(200, 7))
    found = cost_at(costs, losses, 0.3)
    reached = (losses.min(axis=1) <= 0.3) & (losses.max(axis=1) >= 0.3)
    assert (np.isfinite(found) == reached).all()
    np.testing.assert_allclose(loss_at(costs[reached], losses[reached], found[reached]), 0.3)


# --- families -------------------------------------------------------------------------------------------------------


def test_matched_l0_is_the_lowest_that_most_families_cover():
    rows = [row("A", 8, 0.4), row("A", 32, 0.2), row("B", 16, 0.25), row("C", 64, 0.1)]
    assert matched_l0(rows) == (16, {"A": pytest.approx(0.3), "B": 0.25})
    assert matched_l0(rows[:2]) is None
    assert matched_l0([row("A", 0, 0.4), row("B", 0, 0.2)]) is None


def test_sizes_have_curves_of_their_own_and_the_best_speaks_for_the_family():
    """One line through both sizes would pass (16, .35) or (16, .45) depending on which comes first at 32."""
    rows = [row("A", 8, 0.4, 4096), row("A", 32, 0.2, 4096), row("A", 8, 0.6, 512), row("A", 32, 0.5, 512)]
    (found,) = [c for c in comparisons([*rows, row("B", 16, 0.1)], "l0", "cost") if c.where == 16]
    assert found.found["A"].value == pytest.approx(0.3)
    assert found.found["A"].curve.n_latents == 4096


def test_seeds_have_curves_of_their_own_and_are_told_apart_not_pooled():
    rows = [row("A", 8, 0.4, seed=3, k=8), row("A", 32, 0.2, seed=3, k=32)]
    rows += [row("A", 8, 0.5, seed=1, k=8), row("A", 32, 0.3, seed=1, k=32), row("B", 16, 0.1)]
    (own,) = curves(rows, "l0")["A"]
    assert [curve.members for curve in own] == [[0, 1], [2, 3]]
    (found,) = comparisons(rows, "l0", "cost")
    assert found.found["A"].value == pytest.approx(0.3)  # of the first
    assert found.found["A"].spread == pytest.approx((0.3, 0.4))
    assert found.found["B"].spread is None


def test_a_row_without_siblings_is_on_the_curve_of_every_seed():
    rows = [row("A", 8, 0.4, seed=0, k=8), row("A", 32, 0.2, seed=0, k=32), row("A", 32, 0.3, seed=1, k=32)]
    (own,) = curves(rows, "l0")["A"]
    assert [curve.members for curve in own] == [[0, 1], [0, 2]]


def test_costs_told_are_apart_and_few_and_the_loss_told_is_the_middle():
    pairs = [(8, 0.5), (8.1, 0.49), (16, 0.4), (32, 0.3), (64, 0.2)]
    rows = [row(family, *pair) for pair in pairs for family in "AB"]
    found = comparisons(rows, "l0", "cost")
    assert [c.where for c in chosen(found, "cost", 9)] == [8, 16, 32, 64]
    assert [c.where for c in chosen(found, "cost", 3)] == [8, 32, 64]
    losses = comparisons(rows, "l0", "loss")
    assert [c.where for c in losses] == [0.2, 0.3, 0.4, 0.49, 0.5]
    assert [c.where for c in chosen(losses, "loss", 3)] == [0.4]
    assert chosen([], "loss", 3) == []
