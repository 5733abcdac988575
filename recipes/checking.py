"""Whether a recipe holds together, found out without a model, a network or a cache.

Reading a recipe checks every table. Beyond that, its dictionaries are resolved against the sites that a target of
`reference.layers` blocks, `reference.width` wide, has (or the target that the recipe itself makes), and what they come
to is added up.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.records import nearest
from thresher.cache.sites import matches
from thresher.recipes.reading import Recipe

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
    shape, harvest = shape_of(recipe), recipe.tables["harvest"]
    if shape is None:
        return Checked(recipe.name, len(recipe.variants), (), "tables only: no [reference] layers and width")
    sites = sites_of(shape, harvest.sites, harvest.layers, tuple(taps))
    if sites is None:
        return Checked(recipe.name, len(recipe.variants), (), "tables only: harvest.sites names more than taps")
    return Checked(recipe.name, len(recipe.variants), tuple(plan(recipe, sites)), "")


class Shape(NamedTuple):
    """Of a target."""

    layers: int
    """Blocks."""
    width: int
    """Dimensions of the residual stream; MLPs are taken to be four times as wide."""


def shape_of(recipe: Recipe) -> Shape | None:
    """What [reference] says of the target, or what the recipe makes; None: it says nothing."""
    reference = recipe.tables["reference"]
    if reference.layers is not None:
        return Shape(reference.layers, reference.width)
    made = recipe.tables.get("pretrain") if "pretrain" in recipe.given else None
    return None if made is None else Shape(made.n_layers, made.width)


def sites_of(
    shape: Shape, patterns: Sequence[str], layers: Sequence[int] | None, taps: Sequence[str]
) -> dict[str, Site] | None:
    """By name, the sites that patterns mean in a target of that shape; None where only the target knows a name.

    Raises UserError for a tap that there is not, and for layers that it has not.
    """
    beyond = sorted(layer for layer in layers or () if not 0 <= layer < shape.layers)
    if beyond:
        raise UserError(
            f"harvest.layers asks for layers {beyond}, but reference.layers is {shape.layers}: there are 0 to "
            f"{shape.layers - 1}. Correct one of them."
        )
    every = [
        Site(f"L{layer:02d}.{tap}", layer, tap, shape.width * (4 if tap == HIDDEN else 1))
        for layer in range(shape.layers)
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
