"""The bootstrap: reproducible, shared between arms, and right about how often it is wrong."""

import numpy as np
import pytest

from thresher.evaluate.run import Replacement
from thresher.evaluate.statistics import draws, interval, resampled_sums, unit_sums


def test_chunked_sums_equal_whole_draws():
    sums = np.random.default_rng(0).normal(size=(17, 3))
    np.testing.assert_allclose(resampled_sums(sums, 300, 5), draws(17, 300, 5) @ sums)


def test_every_draw_takes_as_many_units_as_there_are():
    assert (draws(11, 200, 0).sum(axis=1) == 11).all()


def test_seed_decides_the_draws():
    assert (draws(9, 50, 1) == draws(9, 50, 1)).all()
    assert (draws(9, 50, 1) != draws(9, 50, 2)).any()


def test_arms_share_their_weights():
    """Two arms that differ by a constant per token have a difference without spread, whatever the texts' own spread."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 50, size=40).astype(float)
    nll = tokens * rng.normal(3, 1, size=40)
    totals = resampled_sums(np.stack([tokens, nll, nll + 0.25 * tokens], axis=1), 500, 0)
    found = interval((totals[:, 2] - totals[:, 1]) / totals[:, 0])
    assert found == pytest.approx((0.25, 0.25))
    alone = interval(totals[:, 1] / totals[:, 0])
    assert alone.high - alone.low > 0.3


def test_unit_sums_add_segments_of_a_document():
    out = unit_sums(np.array([[1.0, 2], [10, 20], [100, 200]]), np.array([7, 3, 7]))
    assert out.tolist() == [[10, 20], [101, 202]]


def test_interval_is_none_where_little_is_defined():
    assert interval(np.array([1.0, np.nan, np.nan])) is None
    assert interval(np.array([1.0, 1.0, np.nan])) == (1, 1)


def test_intervals_cover_the_truth_about_95_times_in_100():
    """Documents of unequal length with their own mean; the truth is the ratio of expectations."""
    rng = np.random.default_rng(3)
    hits, trials = 0, 300
    for trial in range(trials):
        tokens = rng.integers(20, 60, size=80).astype(float)
        delta = tokens * rng.normal(0.4, 0.3, size=80)
        totals = resampled_sums(np.stack([tokens, delta], axis=1), 400, trial)
        found = interval(totals[:, 1] / totals[:, 0])
        hits += found.low <= 0.4 <= found.high
    assert 0.91 <= hits / trials <= 0.98


def test_few_documents_are_flagged(kit, scan):
    sets = [Replacement("x", (kit.Random(["L00.mlp_in"], ["L00.mlp_out"]),), {})]
    few, many = (scan(sets, kit.TinyTarget(), kit.contexts(rows=rows)) for rows in (4, 40))
    assert few.protocols["cascade"]["few_units"]
    assert not many.protocols["cascade"]["few_units"]
    assert any("rough" in note for note in few.notes)
    assert not many.notes


def test_pairs_hold_the_difference_of_neighbours(kit, scan):
    sets = [Replacement(f"r{i}", (kit.Random(["L00.mlp_in"], ["L00.mlp_out"], seed=i),), {}) for i in range(3)]
    results = scan(sets, kit.TinyTarget(), kit.contexts(rows=8), protocols=("cascade",))
    delta = {row.name: row.metrics["delta"] for row in results.rows if row.kind == "replacement"}
    assert len(results.pairs) == 2
    for pair in results.pairs:
        assert pair["difference"] == pytest.approx(delta[pair["b"]] - delta[pair["a"]], abs=1e-12)
        assert pair["low"] <= pair["difference"] <= pair["high"]
