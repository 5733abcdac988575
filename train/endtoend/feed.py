"""One group's way through its contexts, until it has its steps: what train/feed.py is for a stream of rows.

The group's dictionaries depend on one another: what happens to one of them, happens to all. They checkpoint at the
same steps, go on from a step of which all have a checkpoint, and are set aside together.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from thresher.train.agreement import short_of_memory
from thresher.train.display import TrainingDisplay
from thresher.train.endtoend.group import Group
from thresher.train.feed import Shared, say_kernels
from thresher.train.jobs import Job
from thresher.train.profile import Trace
from thresher.train.state import checkpoint_steps, drop_checkpoints

_SETTLED_STEPS = 3


def common_step(paths: Sequence[Path]) -> int:
    """The newest step of which all runs have a checkpoint, 0 if there is none; later ones are deleted.

    A process may be killed after it has saved some of a group.
    """
    steps = set.intersection(*(set(checkpoint_steps(path)) for path in paths))
    newest = max(steps, default=0)
    for path in paths:
        drop_checkpoints(path, after=newest)
    return newest


def feed_group(jobs: Sequence[Job], group: Group, on: Shared) -> None:
    """Let a group do its steps; returns early when a stop is requested."""
    first = jobs[0]
    if not first.active:
        return
    torch.set_num_threads(on.crew.threads)  # as many as alone, whatever ran before
    train = first.plan.train
    title = (
        f"Training {len(jobs)} dictionaries together on {on.device}: {train.objective} in mode {train.mode}, "
        f"{group.contexts} contexts of {group.text.length} tokens per step"
    )
    with ExitStack() as stack:
        steps_left = first.fit.total - first.fit.done
        trace = stack.enter_context(Trace(first.path, on.device, steps_left)) if on.profile else None
        names = [job.plan.name for job in jobs]
        display = stack.enter_context(TrainingDisplay(on.console, title, names, columns={"kl": "KL", "ce": "CE"}))
        began, taken = time.monotonic(), 0
        while first.active and not on.stop.requested:
            settle(jobs, attempt(jobs, group), display, on)
            taken += 1
            if trace is not None:
                trace.step()
            if taken == min(_SETTLED_STEPS, steps_left):
                say_kernels(jobs, on.console)
            rate = taken * group.consumed / (time.monotonic() - began)
            left = (first.fit.total - first.fit.done) * group.consumed / rate
            display.progress(first.fit.done, first.fit.total, rate, left)
    if trace is not None and trace.written:
        on.console.print(f"Trace of steps in {trace.path}.", highlight=False)


def attempt(jobs: Sequence[Job], group: Group) -> list[torch.Tensor] | str:
    """A step's gradient norms, or why there was no memory for it."""
    try:
        return group.step()
    except (RuntimeError, MemoryError) as error:
        if not short_of_memory(error):
            raise
        for job in jobs:
            job.fit.forget_gradients()
        return f"step {jobs[0].fit.done + 1} ran out of memory ({error})"


def settle(jobs: Sequence[Job], outcome: list[torch.Tensor] | str, display: TrainingDisplay, on: Shared) -> None:
    """Log and save what is due after a step; set all aside when one cannot go on."""
    outcomes: Sequence[torch.Tensor | str] = [outcome] * len(jobs) if isinstance(outcome, str) else outcome
    for job, own in zip(jobs, outcomes, strict=True):
        job.settle(own, display, on.console)
    failed = next((job for job in jobs if job.failed is not None), None)
    if failed is not None:
        for job in jobs:
            if job.failed is None:
                job.set_aside(f"{failed.plan.name}, trained together with it: {failed.failed}", display, on.console)
