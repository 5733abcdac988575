"""Which points no other point beats on both cost and loss, and how much of the plane a set of points beats.

Points compare only within a group: same target, text, masks, protocol, written sites, cost axis and loss. Exact
duplicates all stay on the front, since none is strictly better. `fronts` is quadratic and obvious, and the
specification of `front_resampled`, which sorts instead and takes all bootstrap resamples at once.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """One candidate."""

    name: str
    group: Hashable
    """Whatever must be equal for two points to be compared."""
    cost: float
    loss: float


FLOOR = 1e-4
"""Losses below this count as this much where their logarithm is taken: δ may come out as 0 or less."""


class Reference(NamedTuple):
    """The corner of the hypervolume: what costs more or loses more than this contributes nothing."""

    cost: float
    loss: float


class Fronts(NamedTuple):
    """The verdict over points of any number of groups, in their order."""

    on: list[bool]
    """Whether each point is on the front of its group."""
    excluded: list[str]
    """Names of points with an undefined cost or loss: on no front, and keeping nobody off one."""


def dominates(p: Point, q: Point) -> bool:
    """Whether p is no worse on both axes and better on one. Comparing across groups is an error of the caller."""
    if p.group != q.group:
        raise ValueError(f"{p.name} and {q.name} are of different groups, {p.group!r} and {q.group!r}: not comparable")
    return p.cost <= q.cost and p.loss <= q.loss and (p.cost < q.cost or p.loss < q.loss)


def fronts(points: Sequence[Point]) -> Fronts:
    """Mark the non-dominated points of every group."""
    valid = [not (math.isnan(p.cost) or math.isnan(p.loss)) for p in points]
    on = [False] * len(points)
    for group in {p.group for p in points}:
        index = [i for i, p in enumerate(points) if valid[i] and p.group == group]
        cost, loss = (np.array([getattr(points[i], axis) for i in index]) for axis in ("cost", "loss"))
        no_worse = (cost[:, None] <= cost) & (loss[:, None] <= loss)
        better = (cost[:, None] < cost) | (loss[:, None] < loss)
        dominated = np.asarray((no_worse & better).any(axis=0))
        for i, beaten in zip(index, dominated, strict=True):
            on[i] = not beaten
    return Fronts(on, [p.name for p, ok in zip(points, valid, strict=True) if not ok])


def front_resampled(cost_RP: np.ndarray, loss_RP: np.ndarray) -> np.ndarray:
    """Whether each of P points of one group is on the front, [R, P] bool, in each of R resamples; no NaN allowed.

    Sorted by cost, then loss, a point is beaten by the best of all cheaper points if that is no worse, or by the best
    point of its own cost if that is better.
    """
    order = np.lexsort((loss_RP, cost_RP), axis=-1)
    cost, loss = (np.take_along_axis(values, order, axis=1) for values in (cost_RP, loss_RP))
    start = run_starts(cost)
    best = np.minimum.accumulate(loss, axis=1)
    cheaper = np.take_along_axis(np.pad(best, ((0, 0), (1, 0)), constant_values=np.inf), start, axis=1)
    beaten = (cheaper <= loss) | (np.take_along_axis(loss, start, axis=1) < loss)
    on = np.empty(loss.shape, dtype=bool)
    np.put_along_axis(on, order, ~beaten, axis=1)
    return on


def run_starts(sorted_RP: np.ndarray) -> np.ndarray:
    """Index of the first of all equal values around each, [R, P], in ascending rows."""
    new = np.ones(sorted_RP.shape, dtype=bool)
    new[:, 1:] = sorted_RP[:, 1:] != sorted_RP[:, :-1]
    return np.maximum.accumulate(np.where(new, np.arange(sorted_RP.shape[1]), 0), axis=1)


def hypervolume(cost_RP: np.ndarray, loss_RP: np.ndarray, reference: Reference) -> np.ndarray:
    """Area in (log2 cost, log10 max(loss, 1e-4)) between the points and the reference, [R].

    A point of cost 0 has no logarithm and contributes nothing, like one beyond the reference.
    """
    end, top = np.log2(reference.cost), np.log10(max(reference.loss, FLOOR))
    inside = (cost_RP > 0) & (cost_RP < reference.cost)
    x = np.where(inside, np.log2(np.where(inside, cost_RP, 1)), end)
    y = np.minimum(np.where(inside, np.log10(np.maximum(loss_RP, FLOOR)), top), top)
    order = np.argsort(x, axis=1)
    x, y = np.take_along_axis(x, order, axis=1), np.take_along_axis(y, order, axis=1)
    width = np.diff(x, axis=1, append=np.full((len(x), 1), end))
    return np.asarray((width * (top - np.minimum.accumulate(y, axis=1))).sum(axis=1))
