"""Families at equal cost or at equal loss: one number each where their points do not lie side by side.

A curve joins the points of one family and dictionary size, by rising cost, with straight lines in (log2 cost, δ). It
is read only where it has been measured, between its ends, and up to 3 % in cost beyond them: a measured L0 of 31.7 is
as good as 32, and in a resample the end itself moves. Where a family has several sizes it is represented by the one
that does best there; where it has several seeds (`seeds.siblings`) each seed has a curve of its own, the first stands
for the family, and the others say how far seeds come apart.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from thresher.evaluate.pareto import run_starts
from thresher.evaluate.results import Row
from thresher.evaluate.seeds import siblings

SAME_COST = 0.03
"""Points this close in cost are compared as they are."""


class Curve(NamedTuple):
    """Points that one line is drawn through."""

    family: str
    n_latents: float | None
    members: list[int]
    """Indices of its rows. Rows without siblings belong to the curves of all seeds."""


class Match(NamedTuple):
    """One family at one cost or loss."""

    value: float
    """Of its best size and that one's first seed."""
    curve: Curve
    """The curve that `value` lies on."""
    spread: tuple[float, float] | None
    """Lowest and highest over the seeds of that size; None for fewer than two that reach there."""


# --- reading a curve ------------------------------------------------------------------------------------------------


def loss_at(cost_RP: np.ndarray, loss_RP: np.ndarray, cost_R: np.ndarray | float) -> np.ndarray:
    """Loss at a cost on R curves through P points each, [R]; NaN outside their ranges.

    Of several points at one cost the lowest loss counts.
    """
    x, y = _sorted(cost_RP, loss_RP)
    w = np.broadcast_to(np.log2(cost_R), len(x))[:, None]
    before = np.clip((x <= w).sum(axis=1, keepdims=True) - 1, 0, None)
    x0, y0, x1, y1 = _segment(x, y, before)
    share = np.clip(_share(w - x0, x1 - x0), 0, 1)
    outside = np.maximum(x[:, :1] - w, w - x[:, -1:]) > np.log2(1 + SAME_COST)
    return np.where(outside, np.nan, y0 + share * (y1 - y0))[:, 0]


def cost_at(cost_RP: np.ndarray, loss_RP: np.ndarray, loss_R: np.ndarray | float) -> np.ndarray:
    """The lowest cost at which R curves through P points each cross a loss, [R]; NaN where they do not."""
    x, y = _sorted(cost_RP, loss_RP)
    w = np.broadcast_to(np.asarray(loss_R, dtype=np.float64), len(x))[:, None]
    following = np.concatenate([y[:, 1:], y[:, -1:]], axis=1)
    crossed = (np.minimum(y, following) <= w) & (w <= np.maximum(y, following))
    first = crossed.argmax(axis=1)[:, None]
    x0, y0, x1, y1 = _segment(x, y, first)
    return np.where(crossed.any(axis=1, keepdims=True), 2 ** (x0 + _share(w - y0, y1 - y0) * (x1 - x0)), np.nan)[:, 0]


READ: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray | float], np.ndarray]] = {"cost": loss_at, "loss": cost_at}
"""By what is held equal."""


def _sorted(cost_RP: np.ndarray, loss_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log2 cost, ascending, and the lowest loss at each, both [R, P]."""
    order = np.lexsort((loss_RP, cost_RP), axis=-1)
    cost, loss = (np.take_along_axis(values, order, axis=1) for values in (cost_RP, loss_RP))
    # a latent that hardly ever fires may not fire at all in some resample
    return np.log2(np.maximum(cost, np.finfo(np.float64).tiny)), np.take_along_axis(loss, run_starts(cost), axis=1)


def _segment(x: np.ndarray, y: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    last = np.minimum(first + 1, x.shape[1] - 1)
    x0, y0 = (np.take_along_axis(values, first, axis=1) for values in (x, y))
    x1, y1 = (np.take_along_axis(values, last, axis=1) for values in (x, y))
    return x0, y0, x1, y1


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


# --- curves of families ---------------------------------------------------------------------------------------------


def curves(rows: Sequence[Row], axis: str) -> dict[str, list[list[Curve]]]:
    """By family a list per dictionary size of the curves of its seeds, in the order of the rows.

    Rows without δ or with a cost that has no logarithm are left out; a family may end up without a curve.
    """
    usable = [i for i, row in enumerate(rows) if row.metrics["delta"] is not None and row.cost[axis] > 0]
    seed = {i: str(rows[i].facts["seed"]) for group in siblings(rows) for i in group}
    out: dict[str, list[list[Curve]]] = {row.family: [] for row in rows}
    for family, own in out.items():
        members = [i for i in usable if rows[i].family == family]
        for size in dict.fromkeys(rows[i].metrics.get("n_latents") for i in members):
            same = [i for i in members if rows[i].metrics.get("n_latents") == size]
            seeds = list(dict.fromkeys(seed[i] for i in same if i in seed)) or [""]
            own.append([Curve(family, size, [i for i in same if seed.get(i, s) == s]) for s in seeds])
    return out


def matches(
    sizes: Sequence[Sequence[Curve]], at: str, cost_P: np.ndarray, loss_P: np.ndarray, where_W: np.ndarray
) -> list[Match | None]:
    """One family at W costs or losses; None where none of its curves has been measured."""
    values = [[_along(curve, at, cost_P, loss_P, where_W) for curve in seeds] for seeds in sizes]
    return [_best(sizes, [[float(own[w]) for own in seeds] for seeds in values]) for w in range(len(where_W))]


def _along(curve: Curve, at: str, cost_P: np.ndarray, loss_P: np.ndarray, where_W: np.ndarray) -> np.ndarray:
    shape = (len(where_W), len(curve.members))
    return READ[at](
        np.broadcast_to(cost_P[curve.members], shape), np.broadcast_to(loss_P[curve.members], shape), where_W
    )


def _best(sizes: Sequence[Sequence[Curve]], values: Sequence[Sequence[float]]) -> Match | None:
    found: list[Match] = []
    for seeds, own in zip(sizes, values, strict=True):
        known = [(value, curve) for value, curve in zip(own, seeds, strict=True) if not np.isnan(value)]
        if known:
            every = [value for value, _ in known]
            found.append(Match(*known[0], (min(every), max(every)) if len(every) > 1 else None))
    return min(found, key=lambda match: match.value, default=None)


# --- where to compare -----------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Families side by side at one cost or loss."""

    where: float
    found: dict[str, Match]
    """By family; those that have not been measured there are missing."""


def comparisons(rows: Sequence[Row], axis: str, at: str) -> list[Comparison]:
    """Families at every measured cost (or loss) that most of them cover, ascending; none when no two overlap."""
    own = curves(rows, axis)
    cost_P = np.array([row.cost[axis] for row in rows], dtype=np.float64)
    loss_P = np.array([row.metrics["delta"] for row in rows], dtype=np.float64)
    measured = np.unique((cost_P if at == "cost" else loss_P)[(cost_P > 0) & ~np.isnan(loss_P)])
    by_family = {family: matches(sizes, at, cost_P, loss_P, measured) for family, sizes in own.items()}
    out = [
        Comparison(float(where), {f: match for f, m in by_family.items() if (match := m[w]) is not None})
        for w, where in enumerate(measured)
    ]
    most = max((len(comparison.found) for comparison in out), default=0)
    return [comparison for comparison in out if len(comparison.found) == most] if most > 1 else []


def matched_l0(rows: Sequence[Row]) -> tuple[float, dict[str, float]] | None:
    """The lowest measured L0 that most families cover, and each one's δ there; None when no two families overlap."""
    for where, found in comparisons(rows, "l0", "cost"):
        return where, {family: match.value for family, match in found.items()}
    return None


def chosen(found: Sequence[Comparison], at: str, most: int) -> list[Comparison]:
    """Those worth telling: at most `most` costs over the whole range, none within 3 % of another; one loss, the middle.

    Near an end of a curve many resamples do not reach a given loss, so the middle one is the surest.
    """
    if at == "loss":
        return list(found[(len(found) - 1) // 2 :][:1])
    apart: list[Comparison] = []
    for comparison in found:
        if not apart or comparison.where > apart[-1].where * (1 + SAME_COST):
            apart.append(comparison)
    if len(apart) <= most:
        return apart
    return [apart[round(i)] for i in np.linspace(0, len(apart) - 1, most)]


def samples(match: Match, at: str, where: float, cost_RP: np.ndarray, loss_RP: np.ndarray) -> np.ndarray:
    """The value on the curve of a match in every resample, [R]; NaN where the resampled curve does not reach."""
    members = match.curve.members
    return READ[at](cost_RP[:, members], loss_RP[:, members], where)
