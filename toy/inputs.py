"""Input rows of the toy model, and the streams of chance that everything random comes from.

A row has D features. `bernoulli`: each is active with probability p, by itself. `single`: exactly one is. An active
feature is uniform in (-1, 1), any other 0. Rows without an active feature are kept, so a mean over rows counts them.

The model has no biases: f(ax) = a f(x) for a ≥ 0, and so has the label. A squared error is therefore a² times that of
the unit row, and rows with one active feature can be merged: all of one feature and sign become one row whose square is
the sum of theirs, with the same loss and gradient to the last of its terms. Of 2048 rows at p = 0.01 some 740 are left,
of single-active rows 200. `merge = False` is the plain reference.

One integer seed spawns a stream each for the mixing matrix, training inputs, evaluation inputs and initial weights
(NumPy's SeedSequence). None of them sees the clock or a global generator, none is moved by another, and none knows p.

Suffixes in this room: K models, R rows, D features, H neurons.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.errors import UserError

Mode = Literal["bernoulli", "single"]
STREAMS = ("mixing", "training", "evaluation", "weights")
DENSE_FROM = 0.25
"""From this p on every feature is drawn; below, the gaps between active ones."""
CHUNK_ACTIVE = 1 << 18
"""Active features drawn at a time, about."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """How input rows are distributed."""

    mode: Mode = "bernoulli"
    """bernoulli: every feature by itself; single: exactly one of them."""
    p: float | None = None
    """Probability that a feature is active, in (0, 1]; left out under `single`, where it is 1 / features."""
    features: int = 100
    """Width of a row."""

    def __post_init__(self) -> None:
        if self.features < 1:
            raise UserError(f"inputs.features is {self.features}; expected at least 1.")
        if self.mode == "single" and self.p is not None:
            raise UserError(
                f"inputs.p is {self.p} with mode single; expected none, since exactly one of {self.features} features "
                "is active. Leave p out, or choose mode bernoulli."
            )
        if self.mode == "bernoulli" and (self.p is None or not 0 < self.p <= 1):
            raise UserError(
                f"inputs.p is {self.p} with mode bernoulli; expected more than 0 and at most 1, since a loss per "
                "active feature is a loss divided by p."
            )

    @property
    def rate(self) -> float:
        """The probability that a given feature is active, under either mode."""
        return 1 / self.features if self.p is None else self.p

    @property
    def filled(self) -> float:
        """Share of rows with at least one active feature."""
        return 1.0 if self.p is None else 1 - (1 - self.p) ** self.features

    @property
    def label(self) -> str:
        """`single-active` or `Bernoulli 0.01`: it stands beside every number."""
        return "single-active" if self.p is None else f"Bernoulli {self.p:g}"


def stream(seed: int, name: str) -> np.random.Generator:
    """The generator of one of `STREAMS` under a seed, from its start."""
    return np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(seed, spawn_key=(STREAMS.index(name),))))


class Active(NamedTuple):
    """The active features of some rows, by row."""

    row: np.ndarray
    """[A] int64, ascending."""
    column: np.ndarray
    """[A] int64."""
    value: np.ndarray
    """[A] float32 in [-1, 1)."""


class Batch(NamedTuple):
    """Rows to compute a mean squared error from."""

    x: Tensor
    """[R, D] what is left after merging; the rest are zeros."""
    rows: int
    """How many rows they stand for: what a sum over them is divided by."""


def draw_active(inputs: Inputs, rows: int, rng: np.random.Generator) -> Active:
    """The active features of `rows` rows."""
    if inputs.p is None:
        row = np.arange(rows)
        column = rng.integers(inputs.features, size=rows)
    else:
        cells = rows * inputs.features
        place = _successes(cells, inputs.p, rng)
        row, column = np.divmod(place, inputs.features)
    return Active(row, column, _uniform(len(row), rng))


def draw_rows(inputs: Inputs, rows: int, rng: np.random.Generator) -> np.ndarray:
    """[R, D] float32: all rows, those without an active feature too."""
    shape = (rows, inputs.features)
    if inputs.p is not None and inputs.p >= DENSE_FROM:
        x_RD = _uniform(rows * inputs.features, rng).reshape(shape)
        if inputs.p < 1:
            x_RD[rng.random(shape, dtype=np.float32) >= inputs.p] = 0
        return x_RD
    active = draw_active(inputs, rows, rng)
    x_RD = np.zeros(shape, np.float32)
    x_RD[active.row, active.column] = active.value
    return x_RD


def batches(inputs: Inputs, rows: int, rng: np.random.Generator, *, merge: bool = True) -> Iterator[Batch]:
    """Training batches of `rows` rows, without end; merged and plain ones are of the same distribution."""
    per_batch = max(1.0, rows * inputs.features * inputs.rate)
    dense = inputs.p is not None and inputs.p >= DENSE_FROM
    while True:
        if dense or not merge:
            yield Batch(torch.from_numpy(draw_rows(inputs, rows, rng)), rows)
            continue
        many = max(1, int(CHUNK_ACTIVE / per_batch))
        for x_RD in merged(draw_active(inputs, rows * many, rng), many, rows, inputs.features):
            yield Batch(torch.from_numpy(x_RD), rows)


def merged(active: Active, batches: int, rows: int, features: int) -> list[np.ndarray]:
    """Rows [R, D] of each of several batches of `rows`: first 2D of merged ones, then those with several active."""
    row, column, value = active
    counts = np.bincount(row, minlength=batches * rows)
    alone = counts[row] == 1
    key = (row[alone] // rows * 2 + (value[alone] < 0)) * features + column[alone]
    squares = np.bincount(key, value[alone].astype(np.float64) ** 2, minlength=batches * 2 * features)
    several = counts >= 2
    per_batch = several.reshape(batches, rows).sum(1)
    sizes = per_batch + 2 * features
    starts = np.concatenate([[0], np.cumsum(sizes)])
    x_RD = np.zeros((starts[-1], features), np.float32)
    sign = np.repeat([1.0, -1.0], features)
    place = (starts[:-1, None] + np.arange(2 * features)).ravel()
    x_RD[place, np.tile(np.arange(features), 2 * batches)] = np.sqrt(squares) * np.tile(sign, batches)
    ordinal = np.cumsum(several) - 1
    batch = row[~alone] // rows
    x_RD[ordinal[row[~alone]] + 2 * features * (batch + 1), column[~alone]] = value[~alone]
    return [x_RD[low:high] for low, high in itertools.pairwise(starts)]


def _uniform(count: int, rng: np.random.Generator) -> np.ndarray:
    out = rng.random(count, dtype=np.float32)
    out *= 2
    out -= 1
    return out


def _successes(cells: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Where `cells` independent trials of probability p succeed: gaps between successes are geometric."""
    found: list[np.ndarray] = []
    last = -1
    while last < cells:
        expected = max(1.0, (cells - last) * p)
        places = last + np.cumsum(rng.geometric(p, int(expected + 4 * expected**0.5 + 8)))
        found.append(places)
        last = int(places[-1])
    every = np.concatenate(found)
    return every[: np.searchsorted(every, cells)]
