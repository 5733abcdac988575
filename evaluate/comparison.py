"""Rows against each other: fronts and how sure they are, neighbours in the ranking, hypervolumes, matched values.

Everything with an interval comes from the same resamples of documents as the intervals of `verdict`, with the same
weights for every row, so a point that is better on every text is on the front in every resample. Costs are resampled
with the losses. Per segment only the active latents of all sources together are stored; since every cost is a weighted
sum of the L0 of the sources, a cost is scaled by the ratio of the resampled total L0 per scored token to its point
estimate, as if the sources kept their shares. For one source, and wherever k is fixed, that is exact.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from thresher.evaluate import matching
from thresher.evaluate.checks import Replacement
from thresher.evaluate.costs import AXES
from thresher.evaluate.pareto import Point, Reference, front_resampled, fronts, hypervolume
from thresher.evaluate.results import Row
from thresher.evaluate.statistics import interval, resampled_sums, unit_sums
from thresher.evaluate.verdict import CLEAN, Judge, replacement_sums

LOSSES = ("delta", "kl", "fvu")
"""What a front may be of; marked in the table is δ."""
REFERENCES = ("mean", "zero")
"""Ablations whose δ bounds the hypervolume, the first that was run."""
MATCHES = 3
"""Costs at which families are compared, at most, per axis."""


class Group(NamedTuple):
    """Replacements that may be compared, those of one protocol that write the same sites, with all their resamples."""

    protocol: str
    sites: tuple[str, ...]
    rows: tuple[Row, ...]
    """P rows with a defined δ."""
    sampled_loss: np.ndarray
    """[R, P] δ in every resample."""
    l0_ratio: np.ndarray
    """[R, P] active latents per scored token in every resample, over the same of the whole text."""

    def loss(self) -> np.ndarray:
        """δ of the whole text, [P]."""
        return np.array([row.metrics["delta"] for row in self.rows], dtype=np.float64)

    def cost(self, axis: str) -> np.ndarray:
        """Cost on the whole text, [P]."""
        return np.array([row.cost[axis] for row in self.rows])

    def sampled_cost(self, axis: str) -> np.ndarray:
        """Cost in every resample, [R, P]."""
        return self.cost(axis) * self.l0_ratio


def groups(replacements: Sequence[Replacement], rows: Sequence[Row], judges: Mapping[str, Judge]) -> list[Group]:
    """Resample δ and L0 of all replacements, `judges` by protocol."""
    by_name = {replacement.name: replacement for replacement in replacements}
    out = []
    for protocol, judge in judges.items():
        own = [row for row in _replacements(rows) if row.protocol == protocol and row.metrics["delta"] is not None]
        clean = judge.arm([CLEAN])
        if not own or clean is None:
            continue
        arms = [replacement_sums(judge, by_name[row.name], protocol).arm for row in own]
        excess_GP = np.stack([arm[:, 0] - clean[:, 0] for arm in arms], axis=1)
        active_GP = np.stack([judge.segments.l0[row.name][judge.used] for row in own], axis=1)
        loss_RP, ratio_RP = _resample(judge, excess_GP, active_GP)
        for sites in dict.fromkeys(row.sites for row in own):
            index = [i for i, row in enumerate(own) if row.sites == sites]
            members = tuple(own[i] for i in index)
            out.append(Group(protocol, sites, members, loss_RP[:, index], ratio_RP[:, index]))
    return out


def _resample(judge: Judge, excess_GP: np.ndarray, active_GP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """δ of every resample, and the ratio of its L0 to that of the whole text, both [R, P]."""
    totals = unit_sums(np.concatenate([judge.tokens[:, None], active_GP, excess_GP], axis=1), judge.unit)
    # equal columns once: a matrix product may round two copies differently, and then one would beat its duplicate
    distinct, copy = np.unique(totals, axis=1, return_inverse=True)
    sampled = resampled_sums(distinct, judge.draw.resamples, judge.draw.seed)[:, copy.reshape(-1)]
    many = active_GP.shape[1]
    whole, per_token = totals.sum(axis=0), sampled[:, 1:] / sampled[:, :1]
    l0_RP, l0_P = per_token[:, :many], whole[1 : 1 + many] / whole[0]
    return per_token[:, many:], np.divide(l0_RP, l0_P, out=np.ones_like(l0_RP), where=l0_P > 0)


def _replacements(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.kind == "replacement"]


# --- fronts ---------------------------------------------------------------------------------------------------------


def points(rows: Sequence[Row], comparable: tuple[str, ...], axis: str, loss: str = "delta") -> list[Point]:
    """Every replacement as a point of its group, for `pareto.fronts`; an undefined loss is NaN.

    `comparable` is what all rows share: hashes of target and text, and the masks. Baselines are no candidates,
    whatever they cost. Raises ValueError for a loss that is not one of `LOSSES`.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; expected one of {', '.join(LOSSES)}")
    out = []
    for row in _replacements(rows):
        value = row.metrics[loss]
        group = (*comparable, row.protocol, tuple(sorted(row.sites)), axis, loss)
        out.append(
            Point(f"{row.name}, {row.protocol}", group, row.cost[axis], float("nan") if value is None else float(value))
        )
    return out


def mark_fronts(rows: Sequence[Row], comparable: tuple[str, ...]) -> list[str]:
    """Set `front` of every replacement for δ against each cost axis; returns those that could not be placed."""
    excluded = []
    for axis in AXES:
        marked = fronts(points(rows, comparable, axis))
        for row, on in zip(_replacements(rows), marked.on, strict=True):
            row.front[axis] = on
        excluded += [f"{name}, {axis}" for name in marked.excluded]
    return excluded


def mark_chances(found: Sequence[Group]) -> None:
    """Set `chance` of every row: the share of resamples in which it is on the front of its group."""
    for group in found:
        for axis in AXES:
            share_P = front_resampled(group.sampled_cost(axis), group.sampled_loss).mean(axis=0)
            for row, share in zip(group.rows, share_P, strict=True):
                row.chance[axis] = float(share)


# --- neighbours -----------------------------------------------------------------------------------------------------


def ranked_pairs(
    replacements: Sequence[Replacement], rows: Sequence[Row], judges: Mapping[str, Judge]
) -> tuple[dict[str, Any], ...]:
    """Neighbours in the ranking by δ within one protocol and set of sites, with the interval of their difference."""
    by_name = {replacement.name: replacement for replacement in replacements}
    ranked: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for row in _replacements(rows):
        if row.metrics["delta"] is not None:
            ranked.setdefault((row.protocol, row.sites), []).append(row)
    out = []
    for (protocol, _), members in ranked.items():
        judge = judges[protocol]
        members.sort(key=lambda row: float(row.metrics["delta"] or 0.0))
        for a, b in itertools.pairwise(members):
            first, second = (replacement_sums(judge, by_name[row.name], protocol) for row in (a, b))
            difference, (low, high) = judge.difference(first.arm, second.arm)
            out.append(
                {"protocol": protocol, "a": a.name, "b": b.name, "difference": difference, "low": low, "high": high}
            )
    return tuple(out)


# --- hypervolumes ---------------------------------------------------------------------------------------------------


def hypervolumes(found: Sequence[Group], rows: Sequence[Row]) -> tuple[dict[str, Any], ...]:
    """`Results.hypervolumes`: of every family of every group on each axis; none where no ablation was run."""
    out = []
    for group, axis in itertools.product(found, AXES):
        reference = reference_of(group, rows, axis)
        if reference is None:
            continue
        cost_P, loss_P, cost_RP = group.cost(axis), group.loss(), group.sampled_cost(axis)
        for family in dict.fromkeys(row.family for row in group.rows):
            own = [i for i, row in enumerate(group.rows) if row.family == family]
            spread = _interval(hypervolume(cost_RP[:, own], group.sampled_loss[:, own], reference))
            value = float(hypervolume(cost_P[None, own], loss_P[None, own], reference)[0])
            where = {"protocol": group.protocol, "sites": list(group.sites), "family": family, "axis": axis}
            out.append({**where, "value": value, **spread, "reference": reference._asdict()})
    return tuple(out)


def reference_of(group: Group, rows: Sequence[Row], axis: str) -> Reference | None:
    """Twice the largest cost of the group, and the δ of mean, else zero, ablation of the same sites.

    Runs of several caches bring several means; the worst of their ablations counts. It is not resampled.
    """
    largest = float(group.cost(axis).max())
    for name in REFERENCES:
        bars = [
            row.metrics["delta"]
            for row in rows
            if row.kind == "baseline" and row.name == name and row.protocol == group.protocol
            # an ablation lists its sites in the order of the dictionaries
            if set(row.sites) == set(group.sites)
        ]
        known = [bar for bar in bars if bar is not None]
        if known and largest > 0:
            return Reference(2 * largest, max(known))
    return None


# --- matched values -------------------------------------------------------------------------------------------------


def matched(found: Sequence[Group]) -> tuple[dict[str, Any], ...]:
    """`Results.matched`: the families of every group at equal cost on each axis, and at equal δ."""
    out = []
    for group, axis, at in itertools.product(found, AXES, matching.READ):
        for compared in matching.chosen(matching.comparisons(group.rows, axis, at), at, MATCHES):
            where = {"protocol": group.protocol, "sites": list(group.sites), "axis": axis, "at": at}
            out.append({**where, "where": compared.where, "values": _values(group, axis, at, compared)})
    return tuple(out)


def _values(group: Group, axis: str, at: str, compared: matching.Comparison) -> list[dict[str, Any]]:
    """Families from the best to the worst, each with its difference to the best; those out of range last."""
    ranked = sorted(compared.found.items(), key=lambda item: item[1].value)
    cost_RP, out = group.sampled_cost(axis), []
    best, best_R = ranked[0][1], None
    for family, match in ranked:
        own_R = matching.samples(match, at, compared.where, cost_RP, group.sampled_loss)
        entry = {"family": family, "value": match.value, **_interval(own_R)}
        entry |= {"lowest": match.spread and match.spread[0], "highest": match.spread and match.spread[1]}
        if best_R is None:
            entry |= {"difference": None, "difference_low": None, "difference_high": None}
            best_R = own_R
        else:
            spread = _interval(own_R - best_R)
            entry |= {"difference": match.value - best.value}
            entry |= {"difference_low": spread["low"], "difference_high": spread["high"]}
        out.append(entry | {"n_latents": match.curve.n_latents, "reached": float(np.isfinite(own_R).mean())})
    missing = [family for family in dict.fromkeys(row.family for row in group.rows) if family not in compared.found]
    return out + [dict.fromkeys(out[0], None) | {"family": family} for family in missing]


def _interval(samples_R: np.ndarray) -> dict[str, float | None]:
    found = interval(samples_R)
    return {"low": found and found.low, "high": found and found.high}
