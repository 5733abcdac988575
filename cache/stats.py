"""Moments that merge: count, mean, squared deviations and norms of activations, in float64.

Every shard stores its own moments, and the statistics of a cache are their merge in shard order, so neither kills nor
the order in which shards were written change a bit. `of_rows` is the plain float64 definition. `of_block` builds the
same from float32 sums of one block of standardised rows (at most 1024 on a CPU), which the encoder has at hand:
standardised values have mean near 0, so nothing cancels, and the sums of a block are off by less than
n · 2⁻²⁴ = 6e-5 of Σ|v| and Σv² in the worst case, a few 1e-7 in practice (PyTorch sums in a tree).

Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
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
    """Mergeable sums over some rows of one site, or of several sites of one width, stacked in front."""

    rows: int
    mean: np.ndarray
    """[…, d] float64."""
    m2: np.ndarray
    """[…, d] float64: sum of squared deviations from the mean."""
    norm: np.ndarray
    """[…] Σ‖x‖."""
    sq_norm: np.ndarray
    """[…] Σ‖x‖²."""

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows."""
        if not self.rows or not other.rows:
            return self if self.rows else other
        rows = self.rows + other.rows
        delta = other.mean - self.mean
        share = other.rows / rows
        return Moments(
            rows,
            self.mean + delta * share,
            self.m2 + other.m2 + delta * delta * (self.rows * share),
            self.norm + other.norm,
            self.sq_norm + other.sq_norm,
        )

    def site(self, index: int) -> "Moments":
        """One of the stacked sites."""
        return Moments(self.rows, *(part[index] for part in self[1:]))

    def stats(self) -> SiteStats:
        """Means and variances of one site; zeros when there are no rows."""
        n = max(self.rows, 1)
        variance = self.m2 / n
        norm, sq_norm = float(self.norm) / n, float(self.sq_norm) / n
        return SiteStats(self.rows, self.mean, variance, norm, sq_norm, float(variance.sum()))


def empty(width: int) -> Moments:
    """Moments of no rows of one site."""
    return Moments(0, np.zeros(width), np.zeros(width), np.zeros(()), np.zeros(()))


def of_rows(x_ND: np.ndarray) -> Moments:
    """Moments of rows, all in float64: the specification."""
    x_ND = x_ND.astype(np.float64)
    if not len(x_ND):
        return empty(x_ND.shape[1])
    mean = x_ND.mean(axis=0)
    sq_norm_N = np.square(x_ND).sum(axis=1)
    return Moments(len(x_ND), mean, np.square(x_ND - mean).sum(axis=0), np.sqrt(sq_norm_N).sum(), sq_norm_N.sum())


def of_block(sums: np.ndarray, norm: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> Moments:
    """Moments from Σv and Σv² (`sums` […, 2, d]) of v = (x − shift) / scale over a block, and the norms […, n]."""
    rows = norm.shape[-1]
    sum_D, square_D = np.moveaxis(sums.astype(np.float64, copy=False), -2, 0)
    norm = norm.astype(np.float64)
    mean_D = sum_D / rows
    m2_D = np.maximum(square_D - sum_D * mean_D, 0.0) * np.square(scale)
    return Moments(rows, shift + scale * mean_D, m2_D, norm.sum(axis=-1), np.square(norm).sum(axis=-1))


def merged(moments: Iterable[Moments]) -> Moments:
    """Merge in the order given; at least one."""
    return functools.reduce(Moments.merge, moments)


def stacked(moments: Sequence[Moments]) -> Moments:
    """Moments of several sites over the same rows, side by side."""
    return Moments(moments[0].rows, *(np.stack(parts) for parts in zip(*(m[1:] for m in moments), strict=True)))


def pack(sites: Sequence[Site], by_site: Mapping[str, Moments]) -> np.ndarray:
    """[P] float64: the rows, then mean, m2, norm and sq_norm of each site."""
    parts = [np.atleast_1d(part) for site in sites for part in by_site[site.name][1:]]
    return np.concatenate([[float(by_site[sites[0].name].rows)], *parts])


def unpack(sites: Sequence[Site], packed: np.ndarray) -> dict[str, Moments]:
    """The inverse of `pack`."""
    out, at = {}, 1
    for site in sites:
        mean, m2, norm, sq_norm = np.split(packed[at : at + 2 * site.width + 2], np.cumsum([site.width, site.width, 1]))
        out[site.name] = Moments(int(packed[0]), mean, m2, norm[0], sq_norm[0])
        at += 2 * site.width + 2
    return out
