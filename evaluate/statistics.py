"""How sure a difference is: a paired bootstrap over documents.

Tokens of one document are not independent, so whole documents are drawn with replacement. All arms and runs share
each draw, which is what makes differences between them sharp although the losses themselves vary between texts by far
more. Every resample recomputes the ratio of sums; intervals are the 2.5 and 97.5 percentiles.
"""

from typing import NamedTuple

import numpy as np

FEW_UNITS = 30
"""With fewer documents (or rows) than this the percentiles are rough, and every table says so."""
CHUNK = 128


class Interval(NamedTuple):
    """A 95 % percentile interval."""

    low: float
    high: float


def draws(units: int, resamples: int, seed: int) -> np.ndarray:
    """How often each unit is drawn in each resample, [R, U] int64; a function of its arguments alone."""
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)


def resampled_sums(sums: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Totals [R, ...] of per-unit sums [U, ...] under `draws`, a chunk of resamples at a time."""
    flat = sums.reshape(len(sums), -1).astype(np.float64)
    rng, share = np.random.default_rng(seed), np.full(len(sums), 1 / len(sums))
    parts = []
    for start in range(0, resamples, CHUNK):
        weights = rng.multinomial(len(sums), share, size=min(CHUNK, resamples - start))
        parts.append(weights.astype(np.float64) @ flat)
    return np.concatenate(parts).reshape(resamples, *sums.shape[1:])


def interval(samples_R: np.ndarray) -> Interval | None:
    """The 95 % interval of resampled values; None when more than half of them are undefined."""
    defined = samples_R[np.isfinite(samples_R)]
    if 2 * len(defined) < len(samples_R):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(float(low), float(high))


def unit_sums(segment_sums: np.ndarray, unit_of_segment: np.ndarray) -> np.ndarray:
    """Add segments [G, ...] up to units [U, ...], units in ascending order of their id."""
    ids, inverse = np.unique(unit_of_segment, return_inverse=True)
    out = np.zeros((len(ids), *segment_sums.shape[1:]))
    np.add.at(out, inverse.reshape(-1), segment_sums)
    return out
