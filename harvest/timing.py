"""How fast the target's body runs here and what memory it takes, in passes like those of a harvest."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from thresher.cache.contracts import Site
from thresher.cache.estimate import disk_rates, duration
from thresher.cache.place import Place
from thresher.cache.publish import free_bytes
from thresher.harvest.footprint import Running, context_bytes
from thresher.harvest.passes import Job, Passes, PassSize, workers_for
from thresher.harvest.resident import forget_peak, resident
from thresher.harvest.target import TransformerTarget

ENOUGH_SECONDS, LONGEST_SECONDS = 1.0, 20.0
"""A trial ends after so long, but has `LEAST_ROUNDS` passes of every worker unless those take too long."""
LEAST_ROUNDS = 3
WORTH_A_TRIAL = 8
"""Passes of every worker that a harvest must have for each one that is run before it begins."""
WORTH_A_LINE, LARGEST_SAMPLE = 32, 128 << 20
"""Passes of every worker that a harvest must have to be foretold, and the bytes then written for it."""


class Trial(NamedTuple):
    """What some passes told."""

    tokens_per_s: float
    """Of all passes but each worker's first, unless that was the only one."""
    acts: Mapping[str, Tensor]
    """Activations of one pass by site."""
    running: Running


def run_trial(
    passes: Passes,
    model: TransformerTarget,
    size: PassSize,
    context: int,
    sample: np.ndarray | None = None,
    most_rounds: int | None = None,
) -> Trial:
    """Run passes as a harvest does, at most `most_rounds` of every worker, in threads that have run none before.

    `sample` [M, T] are tokens to run; without it they are random.
    """
    if sample is None or not len(sample):
        sample = np.random.default_rng(0).integers(0, model.n_vocab, (size.contexts, context))
    rows = np.resize(np.arange(len(sample)), size.contexts)
    job = Job("train", 0, torch.from_numpy(sample[rows].astype(np.int64)), False, False)
    before = resident() if forget_peak() else None
    rooms = set[int]()
    seconds, acts = _timed(model, passes, [job] * passes.workers, rooms)  # also warms up
    rounds = 1
    further = max(LEAST_ROUNDS, int(ENOUGH_SECONDS / seconds)) if seconds * LEAST_ROUNDS < LONGEST_SECONDS else 1
    if most_rounds is not None:
        further = min(further, most_rounds - 1)
    if further > 0:
        rounds = further
        seconds, acts = _timed(model, passes, [job] * passes.workers * rounds, rooms)
    after = resident()
    rate = job.tokens.numel() * passes.workers * rounds / seconds
    if before is None or after is None or model.device.type != "cpu":
        return Trial(rate, acts, counted(model, passes.sites, size, context))
    results = len(rooms) * sum(x.nbytes for x in acts.values())
    kept = max(0, after.own - before.own - results)
    peak = max(0, after.peak - after.files - before.own - results)
    return Trial(rate, acts, Running(kept, max(0, peak - kept)))


def counted(model: TransformerTarget, sites: Sequence[Site], size: PassSize, context: int) -> Running:
    """What passes take by the tensors alive in one of them: the least, since heaps keep more in the long run."""
    if model.device.type != "cpu":
        return Running(0, 0)
    return Running(0, workers_for(model, size.threads) * size.contexts * context_bytes(model, sites, context))


def foretold(trial: Trial, *, tokens: int, size: int, path: Place) -> str:
    """One line on what a harvest of so many tokens and bytes into `path` takes and when it pays.

    `cache estimate` says more.
    """
    forward = trial.tokens_per_s
    if not isinstance(path, Path):
        return (
            f"The model needs {duration(tokens / forward)} at {forward:,.0f} tokens/s; how fast the object store takes "
            f"the {decimal(size)} was not tried."
        )
    write = disk_rates(path, min(size, LARGEST_SAMPLE)).write
    forward_s, write_s = tokens / forward, size / write
    return (
        f"About {duration(max(forward_s, write_s))}: the model needs {duration(forward_s)} at {forward:,.0f} tokens/s, "
        f"the disk {duration(write_s)} at {decimal(int(write))}/s, with {decimal(free_bytes(path))} free. That pays "
        f"from {max(1.0, write_s / forward_s):.2f} passes of training on."
    )


def _timed(
    model: TransformerTarget, passes: Passes, todo: Sequence[Job], rooms: set[int]
) -> tuple[float, Mapping[str, Tensor]]:
    """Seconds and the last activations; `rooms` gets the identity of every room that results lay in."""
    began, acts = time.perf_counter(), dict[str, Tensor]()
    for done in passes.run(todo):
        assert done is not None
        acts = done[1]
        rooms.add(id(done[1].room))
        passes.give(done[1])  # the last one's room stays as it is
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began, acts
