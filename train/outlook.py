"""What a planned dictionary comes to, before anything is loaded or allocated."""

from typing import NamedTuple

import torch

from thresher.train.dictionary.topologies import build
from thresher.train.plan import RunPlan


class Outlook(NamedTuple):
    """One dictionary's size and length."""

    parameters: int
    """Trained numbers."""
    steps: int | None
    """Optimiser steps; None: they follow from a number of cached rows that is not known."""
    rows: int | None
    """Rows that the steps take together."""


def outlook(plan: RunPlan, cached_rows: int | None) -> Outlook:
    """Size and length of a plan, for a cache of so many training rows, or an unknown number.

    Raises UserError for schedules that do not fit into a known number of steps.
    """
    with torch.device("meta"):
        coder = build(plan.spec)
    parameters = coder.n_parameters
    told = plan.train.steps is not None or plan.train.rows is not None
    if cached_rows is None and not told:
        return Outlook(parameters, None, None)
    steps = plan.train.total_steps(cached_rows or 0)
    plan.spec.check_steps(steps)
    if coder.anneal is not None:
        coder.anneal.steps(steps)
    return Outlook(parameters, steps, steps * plan.train.batch_rows)
