"""Moments that merge: count, mean, squared deviations and norms of activations, in float64.

Every shard stores its own moments, and the statistics of a cache are their merge in shard order, so neither kills nor
the order in which shards were written change a bit. `of_rows` is the plain float64 definition. `Sums` are what an
encoder adds up over the rows of a shard, in float64 and of the activations as they came: the statistics know neither
codec nor calibration. Their rounding is off by a few 2⁻⁵³ of Σx² a row, so a mean of a thousand deviations still
leaves nine digits of the variance.

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
    """Mergeable sums over some rows of one site."""

    rows: int
    mean: np.ndarray
    """[d] float64."""
    m2: np.ndarray
    """[d] float64: sum of squared deviations from the mean."""
    norm: np.ndarray
    """[] Σ‖x‖."""
    sq_norm: np.ndarray
    """[] Σ‖x‖²."""

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

    def stats(self) -> SiteStats:
        """Means and variances of one site; zeros when there are no rows."""
        n = max(self.rows, 1)
        variance = self.m2 / n
        norm, sq_norm = float(self.norm) / n, float(self.sq_norm) / n
        return SiteStats(self.rows, self.mean, variance, norm, sq_norm, float(variance.sum()))


class Sums:
    """What an encoder adds up over the rows of one class (kept or special) of one site."""

    def __init__(self, width: int) -> None:
        self.rows = 0
        self.values = np.zeros((3, width))
        """[3, d] float64: Σx, Σx², and Σe² of the error of storing (of the standardised value for int8z)."""
        self.norms = np.zeros(2)
        """[2] float64: Σ‖x‖, Σ‖x‖²."""
        self.peak = np.zeros(1, np.float32)
        """[1] largest |z| (int8z)."""

    def moments(self) -> Moments:
        """The same as moments."""
        mean = self.values[0] / max(self.rows, 1)
        m2 = np.maximum(self.values[1] - self.values[0] * mean, 0.0)
        return Moments(self.rows, mean, m2, self.norms[0], self.norms[1])


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


def merged(moments: Iterable[Moments]) -> Moments:
    """Merge in the order given; at least one."""
    return functools.reduce(Moments.merge, moments)


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
