"""Whether a recipe holds together, found out without a model, a network or a cache.

Reading a recipe checks every table. Beyond that, its dictionaries are resolved against the sites that a target of
`reference.layers` blocks, `reference.width` wide, has, and what they come to is added up.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.records import nearest
from thresher.cache.sites import matches
from thresher.recipes.reading import Recipe
from thresher.recipes.reference import ReferenceConfig

HIDDEN = "mlp_hidden"


class Planned(NamedTuple):
    """One dictionary of a recipe."""

    parameters: int
    """Trained numbers."""
    steps: int | None
    """Optimiser steps; None: they depend on a text whose length is not known."""
    rows: int | None
    """Rows that the steps take together."""


class Checked(NamedTuple):
    """What a recipe that holds together comes to."""

    name: str
    sets: int
    """Points of the sweep."""
    planned: tuple[Planned, ...]
    """Every dictionary; () where the sites are not known without the model."""
    note: str
    """Why there are none; "" otherwise."""

    @property
    def parameters(self) -> int:
        """Of all dictionaries together."""
        return sum(each.parameters for each in self.planned)

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of steps that occur, ascending."""
        return tuple(sorted({each.steps for each in self.planned if each.steps is not None}))

    @property
    def flop(self) -> float | None:
        """6 · parameters · rows of all dictionaries: what a dense implementation of forward and backward multiplies and
        adds. None where rows are not known."""
        if not self.planned or any(each.rows is None for each in self.planned):
            return None
        return float(sum(6 * each.parameters * (each.rows or 0) for each in self.planned))


def check(
    recipe: Recipe, taps: Iterable[str], plan: Callable[[Recipe, Mapping[str, Site]], Sequence[Planned]]
) -> Checked:
    """Resolve a recipe's dictionaries by `plan`. Raises UserError when they do not fit its sites."""
    if not recipe.variants:
        return Checked(recipe.name, 0, (), "makes a target")
    reference, harvest = recipe.tables["reference"], recipe.tables["harvest"]
    if reference.layers is None:
        return Checked(recipe.name, len(recipe.variants), (), "tables only: no [reference] layers and width")
    sites = sites_of(reference, harvest.sites, harvest.layers, tuple(taps))
    if sites is None:
        return Checked(recipe.name, len(recipe.variants), (), "tables only: harvest.sites names more than taps")
    return Checked(recipe.name, len(recipe.variants), tuple(plan(recipe, sites)), "")


def sites_of(
    reference: ReferenceConfig, patterns: Sequence[str], layers: Sequence[int] | None, taps: Sequence[str]
) -> dict[str, Site] | None:
    """By name, the sites that patterns mean in a target of that shape; None where only the target knows a name.

    Raises UserError for a tap that there is not, and for layers that it has not.
    """
    assert reference.layers is not None
    assert reference.width is not None
    beyond = sorted(layer for layer in layers or () if not 0 <= layer < reference.layers)
    if beyond:
        raise UserError(
            f"harvest.layers asks for layers {beyond}, but reference.layers is {reference.layers}: there are 0 to "
            f"{reference.layers - 1}. Correct one of them."
        )
    every = [
        Site(f"L{layer:02d}.{tap}", layer, tap, reference.width * (4 if tap == HIDDEN else 1))
        for layer in range(reference.layers)
        for tap in taps
    ]
    found: dict[str, Site] = {}
    for pattern in patterns:
        hits = [site for site in every if matches(pattern, site, layers)]
        if not hits and "." in pattern:
            return None
        if not hits:
            raise UserError(
                f"harvest.sites has {pattern!r}, which is no tap.{nearest(pattern, taps)} Taps: {', '.join(taps)}."
            )
        found.update((site.name, site) for site in hits)
    return found
