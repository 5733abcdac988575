import numpy as np

from thresher.cache import stats
from thresher.cache.contracts import Site


def test_merging_equals_the_whole_in_any_cut() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, (500, 6)) * np.arange(1, 7)
    whole = stats.of_rows(x)
    for cuts in ([250], [1, 2, 3], [10, 499]):
        merged = stats.merged(stats.of_rows(part) for part in np.split(x, cuts))
        assert merged.rows == 500
        for got, expected in zip(merged[1:], whole[1:], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_hand_worked_moments() -> None:
    m = stats.of_rows(np.array([[3.0, 0.0], [0.0, 4.0], [3.0, 4.0]])).stats()
    assert m.count == 3
    np.testing.assert_allclose(m.mean, [2.0, 8 / 3])
    np.testing.assert_allclose(m.variance, [2.0, 32 / 9])
    assert (m.mean_norm, m.mean_sq_norm) == (4.0, 50 / 3)
    np.testing.assert_allclose(m.total_variance, 2 + 32 / 9)


def test_nothing_merged_is_neutral() -> None:
    x = stats.of_rows(np.ones((2, 3)))
    assert stats.empty(3).merge(x) is x
    assert x.merge(stats.empty(3)) is x
    assert stats.empty(3).stats().total_variance == 0.0


def test_packing_is_undone_by_unpacking() -> None:
    sites = [Site("a", 0, "a", 3), Site("b", 0, "b", 5)]
    generator = np.random.default_rng(1)
    moments = {site.name: stats.of_rows(generator.normal(size=(4, site.width))) for site in sites}
    packed = stats.pack(sites, moments)
    assert packed.shape == (1 + 8 + 12,)
    for name, back in stats.unpack(sites, packed).items():
        for got, expected in zip(back, moments[name], strict=True):
            assert np.array_equal(got, expected)


def test_sums_are_the_moments_even_far_from_zero() -> None:
    x = 1000.0 + np.random.default_rng(2).normal(size=(500, 4))
    sums, plain = stats.Sums(4), stats.of_rows(x)
    assert sums.moments().stats().total_variance == 0.0
    sums.rows = 500
    sums.values[:2] = x.sum(axis=0), np.square(x).sum(axis=0)
    np.testing.assert_allclose(sums.moments().mean, plain.mean, rtol=1e-12)
    np.testing.assert_allclose(sums.moments().m2, plain.m2, rtol=1e-7)
