"""Moments that merge: count, mean, squared deviations and norms of activations, in float64.

Every shard stores its own moments, and the statistics of a cache are their merge in shard order, so neither kills nor
the order in which shards were written change a bit. `of_rows` is the plain float64 definition. `of_block` builds the
same from float32 sums of one block of standardised rows (at most 1024 on a CPU), which the encoder has at hand:
standardised values have mean near 0, so nothing cancels, and the sums of a block are off by less than
n · 2⁻²⁴ = 6e-5 of Σ|v| and Σv² in the worst case, a few 1e-7 in practice (PyTorch sums in a tree).

Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from thresher.cache.contracts import Site


class SiteStats(NamedTuple):
    """What is known of a site over the kept rows of `train`."""

    count: int  # type: ignore[assignment] # hides tuple.count, which nobody needs here
    """Rows."""
    mean: np.ndarray
    """[d] float64."""
    variance: np.ndarray
    """[d] float64, population."""
    mean_norm: float
    """Mean of ‖x‖."""
    mean_sq_norm: float
    """Mean of ‖x‖²."""
    total_variance: float
    """Σ variance: the denominator of the fraction of variance unexplained."""


class Moments(NamedTuple):
    """Mergeable sums over some rows of one site."""

    rows: int
    mean: np.ndarray
    """[d] float64."""
    m2: np.ndarray
    """[d] float64: sum of squared deviations from the mean."""
    norm: float
    """Σ‖x‖."""
    sq_norm: float
    """Σ‖x‖²."""

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows."""
        if not self.rows or not other.rows:
            return self if self.rows else other
        count = self.rows + other.rows
        delta = other.mean - self.mean
        share = other.rows / count
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta * delta * (self.rows * share),
            self.norm + other.norm,
            self.sq_norm + other.sq_norm,
        )

    def stats(self) -> SiteStats:
        """Means and variances; zeros when there are no rows."""
        n = max(self.rows, 1)
        variance = self.m2 / n
        return SiteStats(self.rows, self.mean, variance, self.norm / n, self.sq_norm / n, float(variance.sum()))


def empty(width: int) -> Moments:
    """Moments of no rows."""
    return Moments(0, np.zeros(width), np.zeros(width), 0.0, 0.0)


def of_rows(x_ND: np.ndarray) -> Moments:
    """Moments of rows, all in float64: the specification."""
    x_ND = x_ND.astype(np.float64)
    if not len(x_ND):
        return empty(x_ND.shape[1])
    mean = x_ND.mean(axis=0)
    sq_norm_N = np.square(x_ND).sum(axis=1)
    return Moments(
        len(x_ND), mean, np.square(x_ND - mean).sum(axis=0), float(np.sqrt(sq_norm_N).sum()), float(sq_norm_N.sum())
    )


def of_block(sums_2D: np.ndarray, norm_N: np.ndarray, shift_D: np.ndarray, scale_D: np.ndarray) -> Moments:
    """Moments from Σv and Σv² of v = (x − shift) / scale over a block, and the rows' norms."""
    count = len(norm_N)
    sum_D, square_D = sums_2D.astype(np.float64)
    norm_N = norm_N.astype(np.float64)
    mean_D = sum_D / count
    m2_D = np.maximum(square_D - sum_D * mean_D, 0.0) * np.square(scale_D)
    return Moments(count, shift_D + scale_D * mean_D, m2_D, float(norm_N.sum()), float(np.square(norm_N).sum()))


def merged(moments: Iterable[Moments], width: int) -> Moments:
    """Merge in the order given."""
    total = empty(width)
    for part in moments:
        total = total.merge(part)
    return total


def pack(sites: Sequence[Site], by_site: dict[str, Moments]) -> np.ndarray:
    """[P] float64: the count, then mean, m2, norm and sq_norm of each site."""
    parts: list[np.ndarray | list[float]] = [[float(by_site[sites[0].name].rows)]]
    for site in sites:
        m = by_site[site.name]
        parts += [m.mean, m.m2, [m.norm, m.sq_norm]]
    return np.concatenate(parts)


def unpack(sites: Sequence[Site], packed: np.ndarray) -> dict[str, Moments]:
    """The inverse of `pack`."""
    out, at = {}, 1
    for site in sites:
        d = site.width
        mean, m2, rest = packed[at : at + d], packed[at + d : at + 2 * d], packed[at + 2 * d : at + 2 * d + 2]
        out[site.name] = Moments(int(packed[0]), mean, m2, float(rest[0]), float(rest[1]))
        at += 2 * d + 2
    return out
