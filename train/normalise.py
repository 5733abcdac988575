"""The training space: an affine change of each site's activations, taken from the cache's statistics.

x̃ = (x − shift) / scale, per dimension, in one of three modes: `none`; `scale`, one factor that gives rows a mean norm
of √d; `per_dim`, centred and of unit variance. The statistics cover the kept rows of the whole training split, so no
batch and no outsize first position decides them. Since the change is affine it folds into the weights without loss
(dictionary/fold.py).

`per_token` does not fold: x̃ = (x − m) / (s + 1e-5), m and s the mean and the unbiased standard deviation over the
dimensions of that row. It stays part of a dictionary's `encode`, and codes carry m and s to its `decode`. So it is for
SAEs; of a transcoder's target m and s are unknown where it is used. `per_token_in` does it to what is read and leaves
what is written raw.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from thresher.cache.errors import UserError

Mode = Literal["none", "scale", "per_dim", "per_token", "per_token_in"]

_FLOOR = 1e-2
"""Smallest σ of a dimension, as a share of the median σ: a dimension that hardly moves is not blown up to noise."""


class Statistics(Protocol):
    """What is needed of a site's statistics (cache.reader.SiteStats)."""

    @property
    def mean(self) -> np.ndarray: ...
    @property
    def variance(self) -> np.ndarray: ...
    @property
    def mean_norm(self) -> float: ...


class Affine(NamedTuple):
    """One site's change of coordinates, with what is known of the site in the new ones."""

    shift: Tensor
    """[D] float64."""
    scale: Tensor
    """[D] float64, above 0."""
    mean: Tensor
    """[D] float64: the site's mean in training space."""
    total_variance: float
    """V: the site's variance summed over dimensions, in training space; the denominator of the FVU."""
    raw_mean: Tensor | None = None
    """[D] float64: the site's mean in raw units, where every row is first normalised by itself; None: none is."""

    def apply(self, x_ND: Tensor) -> Tensor:
        """Rows in training space, same dtype and device."""
        if self.raw_mean is not None:
            return token_frame(x_ND).enter(x_ND)
        if bool((self.shift == 0).all()):
            return x_ND if bool((self.scale == 1).all()) else x_ND / self.scale.to(x_ND)
        return (x_ND - self.shift.to(x_ND)) / self.scale.to(x_ND)

    def undo(self, x_ND: Tensor) -> Tensor:
        """Rows of training space as raw activations, same dtype and device: what `apply` is the inverse of."""
        assert self.raw_mean is None, "only its frame leads a row back that was normalised by itself"
        if bool((self.shift == 0).all()):
            return x_ND if bool((self.scale == 1).all()) else x_ND * self.scale.to(x_ND)
        return x_ND * self.scale.to(x_ND) + self.shift.to(x_ND)


class Frame(NamedTuple):
    """Every row's own origin and unit."""

    mean: Tensor
    """[N, 1]."""
    scale: Tensor
    """[N, 1] unbiased standard deviation over dimensions, and 1e-5."""

    def enter(self, x_ND: Tensor) -> Tensor:
        """Rows as seen from there."""
        return (x_ND - self.mean) / self.scale

    def leave(self, x_ND: Tensor) -> Tensor:
        """Rows as they are in raw units."""
        return torch.addcmul(self.mean, x_ND, self.scale)


def token_frame(x_ND: Tensor) -> Frame:
    """Mean and spread of each row."""
    return Frame(x_ND.mean(1, keepdim=True), x_ND.std(1, keepdim=True) + 1e-5)


def modes(mode: Mode) -> tuple[Mode, Mode]:
    """Mode of the sites read and of those written."""
    return ("per_token", "none") if mode == "per_token_in" else (mode, mode)


def affine(mode: Mode, statistics: Statistics, site: str, sample_ND: Tensor | None = None) -> Affine:
    """The change of coordinates of one site. Raises UserError for a site that never varies or is not finite.

    `sample_ND`: rows that mean and variance are taken from under `per_token`, which the cache's statistics do not know.
    """
    mean = torch.from_numpy(np.asarray(statistics.mean, dtype=np.float64).copy())
    variance = torch.from_numpy(np.asarray(statistics.variance, dtype=np.float64).copy())
    if not (bool(torch.isfinite(mean).all()) and bool(torch.isfinite(variance).all())):
        raise UserError(
            f"The cache's statistics of site {site!r} are not finite. Check it with `thresher cache verify`."
        )
    if float(variance.sum()) <= 0:
        raise UserError(
            f"Site {site!r} has the same value on every cached row (variance 0), so there is nothing to reconstruct. "
            "Choose another site or harvest more text."
        )
    shift, scale = torch.zeros_like(mean), torch.ones_like(mean)
    if mode == "scale":
        scale = torch.full_like(mean, statistics.mean_norm / mean.shape[0] ** 0.5)
    elif mode == "per_dim":
        sigma = variance.sqrt()
        shift, scale = mean, sigma.clamp_min(_FLOOR * float(sigma.median()))
    elif mode == "per_token":
        assert sample_ND is not None
        rows_ND = token_frame(sample_ND.double()).enter(sample_ND.double())
        spread = float(rows_ND.var(0, unbiased=False).sum())
        return Affine(shift, scale, rows_ND.mean(0), spread, mean)
    return Affine(shift, scale, (mean - shift) / scale, float((variance / scale**2).sum()))


def joined(spaces: Sequence[Affine]) -> Affine:
    """The change of coordinates of several sites side by side."""
    if len(spaces) == 1:
        return spaces[0]
    shift, scale, mean = (torch.cat([getattr(one, part) for one in spaces]) for part in ("shift", "scale", "mean"))
    return Affine(shift, scale, mean, sum(one.total_variance for one in spaces))
