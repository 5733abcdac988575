"""One pass: a stream of batches for all dictionaries that share it, until each has its steps.

After the first steps one line says which implementations do the work, and after a minute one says what bounds the run
(train/bounds.py). With `profile`, some steps are traced into the directory of the pass's first run.

Ranks that share dictionaries go through the same batches side by side, each with its own rows of them, and stop after
the same one: when all know that one of them is to.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from rich.console import Console

from thresher.cache.batches import Batch, Batches
from thresher.cache.interrupts import StopFlag
from thresher.cache.loading import TIERS, choose
from thresher.cache.source import Source
from thresher.train.bounds import Bounds
from thresher.train.crew import Crew, Task
from thresher.train.display import TrainingDisplay
from thresher.train.exchange import Share
from thresher.train.fit import sites_of
from thresher.train.jobs import Job, kernels_of
from thresher.train.mesh import Mesh
from thresher.train.profile import Trace
from thresher.train.stages import stage, timed_by, unwatch
from thresher.train.views import Views

_SETTLED_STEPS = 3  # after which every operation of a step has been chosen


class Stream(NamedTuple):
    """What decides the batches of a pass: dictionaries that agree in it share them."""

    batch_rows: int
    seed: int
    start: int
    """Position of its first row."""


class Shared(NamedTuple):
    """What all passes share."""

    reader: Source
    device: torch.device
    crew: Crew
    stop: StopFlag
    console: Console
    profile: bool
    """Whether to trace some steps of each pass."""
    mesh: Mesh = Mesh()
    """Whom the dictionaries are shared with."""

    def stopping(self) -> bool:
        """Whether a stop was requested, of any of the ranks that share the dictionaries; all of them have to ask."""
        return self.mesh.everyone.any(self.stop.requested)


def feed(jobs: Sequence[Job], stream: Stream, on: Shared) -> None:
    """Let all jobs of a stream do their steps; returns early when a stop is requested."""
    if not any(job.active for job in jobs):
        return
    steps_left = max(job.fit.total - job.fit.done for job in jobs if job.active)
    batches = _batches(jobs, stream, steps_left, on)
    title = f"Training {len(jobs)} dictionaries on {on.device}, {stream.batch_rows:,} rows per step"
    bounds = Bounds(on.device)
    with ExitStack() as stack:
        stack.callback(batches.close)
        stack.enter_context(timed_by(bounds.clock))
        traced = on.profile and on.mesh.leads
        trace = stack.enter_context(Trace(jobs[0].path, on.device, steps_left)) if traced else None
        display = stack.enter_context(TrainingDisplay(on.console, title, [job.plan.name for job in jobs]))
        progress = _Progress(display, max(job.fit.total for job in jobs))
        for taken, batch in enumerate(_timed(batches), 1):
            began = time.perf_counter()
            _step([job for job in jobs if job.active], batch, display, on)
            line = bounds.stepped(time.perf_counter() - began)
            if trace is not None:
                trace.step()
            if taken == min(_SETTLED_STEPS, steps_left):
                say_kernels(jobs, on.console)
            if line is not None:
                unwatch(bounds.clock)
                on.console.print(line, highlight=False)
            progress.tell(batch.rows, max(job.fit.done for job in jobs), stream.batch_rows)
            if _stopped(jobs, on) or not any(job.active for job in jobs):
                break
    _say_the_rest(bounds.line(), trace, on.console)


def _stopped(jobs: Sequence[Job], on: Shared) -> bool:
    """Whether the pass is to end here: on all ranks that share it, or on none."""
    return on.stop.requested if on.mesh.alone else any(job.fit.agreement.stop for job in jobs)


def say_kernels(jobs: Sequence[Job], console: Console) -> None:
    """Which implementations do the work."""
    if used := kernels_of(jobs):
        console.print(f"Kernels: {used}.", highlight=False)


def _say_the_rest(line: str | None, trace: Trace | None, console: Console) -> None:
    if line is not None:
        console.print(line, highlight=False)
    if trace is not None and trace.written:
        console.print(
            f"Trace of steps in {trace.path}. Open it at ui.perfetto.dev, chrome://tracing or in TensorBoard.",
            highlight=False,
        )


def _batches(jobs: Sequence[Job], stream: Stream, steps_left: int, on: Shared) -> Batches:
    """The stream's batches, and one line on how they are read."""
    sites, rows_left = sites_of([job.fit for job in jobs]), stream.batch_rows * steps_left
    tier, why = choose(on.reader, "train", sites, on.device, rows_left)
    on.console.print(f"Reading {TIERS[tier]}: {why}.", highlight=False)
    return Batches(
        on.reader,
        sites=sites,
        batch_rows=stream.batch_rows,
        seed=stream.seed,
        start=stream.start,
        end=stream.start + rows_left,
        device=on.device,
        tier=tier,
        rank=on.mesh.data.index,
        world=on.mesh.data.size,
        interrupted=lambda: on.mesh.alone and on.stop.raised,
    )


def _timed(batches: Batches) -> Iterator[Batch]:
    """The batches, with the time that is spent waiting for each."""
    iterator = iter(batches)
    while True:
        with stage("read"):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


class _Progress:
    """Rows per second, and what is left."""

    def __init__(self, display: TrainingDisplay, total: int) -> None:
        self.display, self.total = display, total
        self.began, self.rows = time.monotonic(), 0

    def tell(self, rows: int, done: int, batch_rows: int) -> None:
        """One batch more."""
        self.rows += rows
        rate = self.rows / (time.monotonic() - self.began)
        self.display.progress(done, self.total, rate, (self.total - done) * batch_rows / rate)


def share_of(batch: Batch, on: Shared) -> Share | None:
    """Which rows of its batch this rank has; None: all."""
    if on.mesh.data.alone:
        return None
    places = torch.from_numpy(batch.places).to(on.device, non_blocking=True)
    return Share(places, batch.whole, -(-batch.rows // on.mesh.data.size))


def _step(jobs: Sequence[Job], batch: Batch, display: TrainingDisplay, on: Shared) -> None:
    """One step of every job, with what is due after it."""
    views, share = Views(batch.acts), share_of(batch, on)
    with stage("transfer"):
        inputs = [job.fit.inputs(views) for job in jobs]
    tasks = [
        Task(job.plan.spec, job.plan.train.part_rows, functools.partial(job.attempt, one, batch.rows, share))
        for job, one in zip(jobs, inputs, strict=True)
    ]
    for job, outcome in zip(jobs, on.crew.run(tasks), strict=True):
        assert isinstance(outcome, (torch.Tensor, str))
        job.settle(outcome, display, on.console)
