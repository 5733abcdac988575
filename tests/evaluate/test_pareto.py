"""Fronts against brute force, with ties, duplicates and undefined points; hypervolumes against thrown darts."""

import math

import numpy as np
import pytest

from thresher.evaluate.pareto import FLOOR, Point, Reference, dominates, front_resampled, fronts, hypervolume


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


@pytest.mark.parametrize("seed", range(10))
def test_resampled_fronts_equal_the_front_of_each_resample(seed):
    rng = np.random.default_rng(seed)
    cost, loss = rng.integers(0, 6, size=(2, 50, 9)).astype(float)
    expected = [fronts(points(*zip(*sample, strict=True))).on for sample in zip(cost, loss, strict=True)]
    assert front_resampled(cost, loss).tolist() == expected


# --- hypervolume ----------------------------------------------------------------------------------------------------


def volume(pairs, cost=64.0, loss=10.0):
    costs, losses = np.array(pairs, dtype=float).T
    return hypervolume(costs[None], losses[None], Reference(cost, loss))[0]


def test_hypervolume_by_hand():
    assert volume([(8, 1), (16, 0.1), (32, 0.1), (16, 1)]) == pytest.approx(5, abs=1e-12)


def test_hypervolume_is_that_of_the_front_in_any_order():
    assert volume([(8, 1), (16, 0.1)]) == volume([(16, 0.1), (32, 0.1), (8, 1), (16, 1), (8, 1)])


def test_points_beyond_the_reference_or_without_a_logarithm_of_cost_contribute_nothing():
    assert volume([(64, 0.1), (100, 0.1), (8, 10), (8, 11), (0, 0.1)]) == 0
    assert volume([(8, 1), (16, 0.1), (100, 1e-4), (1, 20), (0, 1e-4)]) == pytest.approx(5, abs=1e-12)


def test_losses_at_or_below_the_floor_are_equal():
    assert volume([(8, -1)]) == volume([(8, 0)]) == volume([(8, FLOOR)]) == pytest.approx(3 * 5)
    assert volume([(8, 1)], loss=-1) == 0


def test_hypervolume_counts_doublings_of_cost():
    assert volume([(8, 1), (16, 0.1)]) == pytest.approx(volume([(80, 1), (160, 0.1)], cost=640), abs=1e-12)


def test_hypervolume_equals_the_share_of_darts_that_land_behind_a_point():
    rng = np.random.default_rng(0)
    cost, loss = 2 ** rng.uniform(2, 7, size=(5, 12)), 10 ** rng.uniform(-5, 2, size=(5, 12))
    low, high = np.array([2, -4]), np.array([6, 1])  # log2 64, log10 10
    dart_x, dart_y = rng.uniform(low, high, size=(200_000, 2)).T
    for own_cost, own_loss, found in zip(cost, loss, hypervolume(cost, loss, Reference(64, 10)), strict=True):
        behind = np.zeros(len(dart_x), dtype=bool)
        for x, y in zip(np.log2(own_cost), np.log10(np.maximum(own_loss, 1e-4)), strict=True):
            behind |= (x <= dart_x) & (y <= dart_y)
        assert found == pytest.approx(behind.mean() * (high - low).prod(), rel=0.02)
