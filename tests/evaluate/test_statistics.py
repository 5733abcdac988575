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


def ratio_intervals(tokens_UT, sums_UT, seed):
    """The interval of Σ sums / Σ tokens of T simulated texts of U units each."""
    totals_R2T = resampled_sums(np.stack([tokens_UT, sums_UT], axis=1), 1000, seed)
    return [interval(own_R) for own_R in (totals_R2T[:, 1] / totals_R2T[:, 0]).T]


def test_intervals_cover_the_truth_93_to_97_times_in_100_and_only_by_whole_documents():
    """Documents of very unequal length, each with an error of its own that falls with length, and each in two rows.

    The truth is the ratio of expectations: the mean over documents is another number here. Rows of one document share
    its error, so resampling rows instead would promise too much.
    """
    rng = np.random.default_rng(3)
    lengths = np.array([20, 60, 200])
    errors = np.array([0.6, 0.4, 0.3])
    truth = (lengths * errors).sum() / lengths.sum()
    hits, hits_by_row, trials, seeds = 0, 0, 400, 8
    for seed in range(seeds):
        kind_UT = rng.integers(0, 3, size=(100, trials))
        tokens_UT = lengths[kind_UT].astype(float)
        error_UT = errors[kind_UT] + rng.normal(0, 0.3, size=kind_UT.shape)
        half_UT = tokens_UT / 2
        rows = [half_UT * (error_UT + rng.normal(0, 0.1, size=kind_UT.shape)) for _ in range(2)]
        by_document = ratio_intervals(tokens_UT, rows[0] + rows[1], seed)
        by_row = ratio_intervals(np.concatenate([half_UT, half_UT]), np.concatenate(rows), seed)
        hits += sum(found.low <= truth <= found.high for found in by_document)
        hits_by_row += sum(found.low <= truth <= found.high for found in by_row)
    assert 0.93 <= hits / (trials * seeds) <= 0.97
    assert hits_by_row / (trials * seeds) < 0.9


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
