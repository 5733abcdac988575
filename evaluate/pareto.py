"""Which points no other point beats on both cost and loss.

Points compare only within a group: same target, text, masks, protocol, written sites, cost axis and loss. Exact
duplicates all stay on the front, since none is strictly better. Quadratic and obvious; a sweep has hundreds of points.
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
