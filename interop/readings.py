"""What a foreign dictionary does on real activations, under each way its files can be understood.

A file that forgot to say that activations were scaled, or whether b_dec comes off the input, still loads; its numbers
are then wrong without a word. FVU and L0 on held-out rows say which reading is meant: the wrong ones reconstruct badly.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.source import Source
from thresher.interop import folds
from thresher.interop.canonical import Canonical, codes, decoded
from thresher.interop.formats import Foreign, Reading
from thresher.train.dictionary.coder import Coder

ROWS = 4096
_PIECE = 512


class Measured(NamedTuple):
    """One reading on held-out rows."""

    label: str
    fvu: float
    """Σ‖y − ŷ‖² / Σ‖y − ȳ‖² over all destinations, ȳ the training mean."""
    l0: float
    """Active latents per token and source."""
    folding: float
    """Largest difference of a code or an output between the tool's own equation and the folded weights, over the
    largest value."""


class Served(NamedTuple):
    """The run as it is saved, in float32, against the tool's own equation."""

    output: float
    """Largest difference of an output over the largest value."""
    other_l0: int
    """Rows and sources with another L0: those whose gate is as close to its threshold as float32 can tell."""
    rows: int
    """Rows times sources."""


def with_scales(foreign: Foreign, source: Source) -> Foreign:
    """Further readings of one whose scale its files do not hold: the factors that tools use, from the cache."""
    if not foreign.scale_unknown:
        return foreign
    first = foreign.readings[0]
    more = [
        _scaled(first, f"{label}, from this cache", *_factors(first.dictionary, source, root))
        for label, root in (
            ("activations scaled to mean norm √d", False),
            ("activations scaled to mean square 1", True),
        )
    ]
    return foreign._replace(readings=(*foreign.readings, *more))


def _factors(dictionary: Canonical, source: Source, root: bool) -> tuple[list[Tensor], list[Tensor]]:
    """σ by source and τ by destination: what activations are divided by."""

    def divisor(site: str) -> Tensor:
        found = source.statistics(site)
        square = float(np.sum(found.variance) + np.sum(np.square(found.mean)))
        return torch.tensor(square**0.5 if root else found.mean_norm / len(found.mean) ** 0.5, dtype=torch.float64)

    return [divisor(site) for site in dictionary.reads], [divisor(site) for site in dictionary.writes]


def _scaled(reading: Reading, label: str, sigma: Sequence[Tensor], tau: Sequence[Tensor]) -> Reading:
    zeros = [torch.zeros((), dtype=torch.float64)] * max(len(sigma), len(tau))
    inside = folds.standardised_input(reading.dictionary, zeros, sigma)
    folded = folds.standardised_output(inside, zeros, tau)

    def forward(xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        z, ys = reading.forward([x.double() / s for x, s in zip(xs, sigma, strict=True)])
        return z, [y * t for y, t in zip(ys, tau, strict=True)]

    return Reading(label, folded, forward)


def rows_of(source: Source, sites: Sequence[str], count: int = ROWS) -> Mapping[str, Tensor]:
    """[n, d] float32 held-out rows by site, the same ones of all; of train where nothing is held out."""
    split = held_out_split(source)
    rows = source.sample(split, count)
    return {site: source.gather(split, site, rows) for site in dict.fromkeys(sites)}


def held_out_split(source: Source) -> str:
    """The split that training has not seen; train where nothing is held out."""
    return next(name for name in ("validation", "test", "train") if _rows(source, name))


def _rows(source: Source, split: str) -> int:
    try:
        return source.rows(split)
    except UserError:
        return 0


@torch.no_grad()
def measure(reading: Reading, acts: Mapping[str, Tensor], means: Sequence[Tensor]) -> Measured:
    """One reading on rows by site; `means` [E] by destination."""
    dictionary = reading.dictionary
    xs, ys = [acts[site] for site in dictionary.reads], [acts[site].double() for site in dictionary.writes]
    error = variance = active = apart = 0.0
    for start in range(0, xs[0].shape[0], _PIECE):
        some = [x[start : start + _PIECE] for x in xs]
        truth = [y[start : start + _PIECE] for y in ys]
        z, said = reading.forward(some)
        ours = [codes(dictionary, s, x) for s, x in enumerate(some)]
        written = decoded(dictionary, ours, some)
        error += sum(float((y - w).square().sum()) for y, w in zip(truth, written, strict=True))
        variance += sum(float((y - m).square().sum()) for y, m in zip(truth, means, strict=True))
        active += sum(float((part > 0).sum()) for part in ours)
        pairs = [*zip(z, ours, strict=True), *zip(said, written, strict=True)]
        apart = max([apart, *(_difference(a, b) for a, b in pairs)])
    count = xs[0].shape[0] * len(xs)
    return Measured(reading.label, error / variance, active / count, apart)


@torch.no_grad()
def serve(coder: Coder, reading: Reading, acts: Mapping[str, Tensor]) -> Served:
    """The float32 module that is saved, beside the tool's own equation in float64, on rows by site."""
    xs = [acts[site] for site in coder.reads]
    apart, other = 0.0, 0
    for start in range(0, xs[0].shape[0], _PIECE):
        some = [x[start : start + _PIECE] for x in xs]
        z, said = reading.forward(some)
        ours = [coder.encode(s, x.float()) for s, x in enumerate(some)]
        written = [coder.decode(j, [ours[s] for s in coder.sources(j)]) for j in range(len(coder.writes))]
        apart = max([apart, *(_difference(a, b.double()) for a, b in zip(said, written, strict=True))])
        other += sum(int(((a > 0).sum(1) != b.l0()).sum()) for a, b in zip(z, ours, strict=True))
    return Served(apart, other, xs[0].shape[0] * len(xs))


def _difference(a: Tensor, b: Tensor) -> float:
    """max |a − b| / max |a|; infinite where one of them is not a number, which a maximum would lose."""
    found = float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
    return found if math.isfinite(found) else math.inf
