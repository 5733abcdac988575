"""What all groups of a sweep share: the language model, the training contexts and the place of cached rows in them."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from thresher.cache.contracts import Target
from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.records import differences
from thresher.cache.source import Source
from thresher.train.dictionary.topologies import topology
from thresher.train.endtoend.admission import check_group
from thresher.train.endtoend.clean import Cached
from thresher.train.endtoend.contexts import Text
from thresher.train.endtoend.decomposed import Decompositions
from thresher.train.endtoend.group import Group, contexts_per_step, group
from thresher.train.fit import Fit
from thresher.train.plan import RunPlan


def needs_target(plans: Sequence[RunPlan]) -> bool:
    """Whether any of them is trained through the language model."""
    return any(plan.train.objective != "local" for plan in plans)


def together(plans: Sequence[RunPlan]) -> dict[str, list[RunPlan]]:
    """Plans that are trained through the language model, by group.

    Raises UserError for a group whose plans differ in how they are trained, and for what cannot be trained so.
    """
    groups: dict[str, list[RunPlan]] = {}
    for plan in plans:
        if plan.train.objective != "local":
            groups.setdefault(plan.group, []).append(plan)
    for name, members in groups.items():
        if any((plan.train, plan.seed) != (members[0].train, members[0].seed) for plan in members):
            raise UserError(
                f"The dictionaries of group {name!r} are trained together, so they must agree in [train]; they differ. "
                "Give what differs a [[sweep]] block with a name of its own."
            )
        check_group(members)
    return groups


class Setting:
    """The model and the text that dictionaries are trained on end to end."""

    def __init__(self, target: Target, reader: Source, device: torch.device) -> None:
        """Raises UserError for a model on another device, or another one than the cache was made of."""
        if not _same(target.device, device):
            raise UserError(
                f"The language model is on {target.device}, but training is on {device}; training through the model "
                "needs both in one place. Give --device and target.device the same value."
            )
        _check_identity(reader.identity, target.identity)
        self.target, self.reader, self.device = target, reader, device
        self._texts: dict[tuple[int, str], Text] = {}

    @cached_property
    def contexts(self) -> Contexts:
        """Of the training split."""
        return self.reader.contexts("train")

    @cached_property
    def cached(self) -> Cached:
        """Rows of the cache by their place in the text."""
        return Cached(self.reader)

    def text(self, plan: RunPlan) -> Text:
        """The contexts in the plan's order."""
        key = (plan.seed, plan.train.clean_from)
        if key not in self._texts:
            known = self.cached.known if plan.train.clean_from == "cache" else None
            self._texts[key] = Text(self.contexts, plan.seed, self.device, known)
        return self._texts[key]

    def total_steps(self, plan: RunPlan) -> int:
        """Optimiser steps of a plan."""
        text = self.text(plan)
        return plan.train.total_steps(text.rows, contexts_per_step(plan.train.batch_rows, text.length) * text.length)

    def group(self, fits: Sequence[Fit]) -> Group:
        """The dictionaries of a group, put together."""
        plan = fits[0].plan
        cached = self.cached if plan.train.clean_from == "cache" else None
        made = group(fits, self.target, self.text(plan), cached)
        return Decompositions(*made) if topology(plan.spec.kind).decomposes else made


def _same(one: torch.device, other: torch.device) -> bool:
    """`cuda` is a process's first device, which tensors call `cuda:0`."""
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def _check_identity(cache: Mapping[str, Any], target: Mapping[str, object]) -> None:
    """Raise UserError when the cache says it was made of another model; precision may differ."""
    made_of = cache.get("target")
    if not isinstance(made_of, Mapping):
        return
    here = {key: value for key, value in target.items() if key in made_of and key != "dtype"}
    lines = differences({key: made_of[key] for key in here}, here)
    if lines:
        raise UserError(
            f"The cache was made of another model than the one to be trained through: {'; '.join(lines)}. Use the "
            "recipe's own target, or harvest from this one."
        )
