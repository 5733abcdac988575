"""How processors can share the work of a recipe: groups of the sweep × ranks of the batch × ranks of the latents.

    R ranks = groups · data · latents

A group trains whole dictionaries of its own (train/division.py). Within it `data` ranks split the rows of a batch, each
with all weights, and all-reduce gradients once a step; `latents` ranks split the latents of every dictionary, encoder
and decoder rows together, see the same rows and all-reduce the stacked reconstructions. Left out: rows and latents that
do not divide evenly, which training can share too.
"""

from collections.abc import Sequence
from typing import NamedTuple

from thresher.cache.errors import UserError
from thresher.train.dictionary.holding import holding_of
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.division import division, work
from thresher.train.mesh import Group
from thresher.train.plan import RunPlan


class Layout(NamedTuple):
    """One way."""

    groups: int
    """Of the sweep."""
    data: int
    """Ranks that split a batch's rows: `data` of the table [parallel]."""
    latents: int
    """Ranks that split a dictionary's latents: `latents` there."""

    @property
    def ranks(self) -> int:
        """Of all groups together."""
        return self.groups * self.data * self.latents

    def __str__(self) -> str:
        return f"{self.groups} × {self.data} × {self.latents}"


def layouts(ranks: int, plans: Sequence[RunPlan]) -> list[Layout]:
    """All ways in which so many ranks can train the plans with none idle, the least divided first.

    A group for which there is no dictionary would idle. `data` must divide every batch, `latents` every number of
    latents. Dictionaries that are trained through the language model, and those whose latents are no rows, stay whole.
    """
    found = []
    for latents in _divisors(ranks):
        for data in _divisors(ranks // latents):
            way = Layout(ranks // latents // data, data, latents)
            if way.groups <= len(_units(plans)) and all(_fits(plan, way) for plan in plans):
                found.append(way)
    return sorted(found, key=lambda way: (way.data * way.latents, way.latents))


def shares(plans: Sequence[RunPlan], steps: Sequence[int], groups: int) -> list[list[RunPlan]]:
    """By group the plans that it trains, as `train` divides them."""
    owners = division(work(plans, steps), groups)
    return [[plan for plan in plans if owners[plan.name] == group] for group in range(groups)]


def _units(plans: Sequence[RunPlan]) -> set[str]:
    return {piece.unit for piece in work(plans, [1] * len(plans))}


def _fits(plan: RunPlan, way: Layout) -> bool:
    local = plan.train.objective == "local"
    if plan.train.batch_rows % way.data or (way.data > 1 and not local):
        return False
    return way.latents == 1 or (local and plan.spec.n_latents % way.latents == 0 and _shared(plan.spec, way.latents))


def _shared(spec: DictionarySpec, ranks: int) -> bool:
    """Whether training would let so many ranks hold the latents of a dictionary."""
    try:
        return holding_of(spec, Group(0, ranks)) is not None
    except UserError:
        return False


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
