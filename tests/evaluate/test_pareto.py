"""Fronts against brute force, with ties, duplicates and undefined points."""

import math

import numpy as np
import pytest

from thresher.evaluate.pareto import Point, dominates, fronts


def points(*pairs, group="g"):
    return [Point(f"p{i}", group, cost, loss) for i, (cost, loss) in enumerate(pairs)]


def by_definition(candidates):
    valid = [p for p in candidates if not math.isnan(p.cost + p.loss)]
    return [
        p in valid and not any(dominates(q, p) for q in valid if q.group == p.group and q is not p) for p in candidates
    ]


def test_front_by_hand():
    assert fronts(points((8, 1), (16, 0.1), (32, 0.1), (16, 1))).on == [True, True, False, False]


def test_duplicates_all_stay():
    assert fronts(points((8, 1), (8, 1), (16, 1))).on == [True, True, False]


def test_equal_loss_keeps_the_cheaper_and_equal_cost_the_better():
    assert fronts(points((8, 1), (9, 1), (8, 2))).on == [True, False, False]


def test_undefined_points_are_listed_and_shadow_nobody():
    found = fronts(points((1, float("nan")), (float("nan"), -5), (8, 1)))
    assert found.on == [False, False, True]
    assert found.excluded == ["p0", "p1"]


def test_groups_do_not_meet():
    assert fronts([*points((8, 1), group="a"), *points((4, 0.5), group="b")]).on == [True, True]
    with pytest.raises(ValueError, match="different groups"):
        dominates(Point("a", "a", 1, 1), Point("b", "b", 2, 2))


def test_no_points_no_front():
    assert fronts([]) == ([], [])


@pytest.mark.parametrize("seed", range(30))
def test_fronts_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    grid = rng.integers(0, 6, size=(40, 3))  # coarse: many ties and duplicates
    candidates = [
        Point(str(i), int(group) % 2, float(cost), float("nan") if loss == 5 and i % 3 == 0 else float(loss))
        for i, (cost, loss, group) in enumerate(grid)
    ]
    assert fronts(candidates).on == by_definition(candidates)
