"""How fast the target's body runs here, in passes like those of a harvest."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from thresher.cache.contracts import Site
from thresher.cache.estimate import disk_rates, duration
from thresher.cache.publish import free_bytes
from thresher.harvest.passes import Job, Passes, workers_for
from thresher.harvest.results import Results
from thresher.harvest.target import TransformerTarget

ROUNDS = 3
"""Timed passes of every worker, more where they take less than a second together."""
WORTH_TIMING, LARGEST_SAMPLE = 32, 128 << 20
"""Passes of every worker that a harvest must have to be timed at its start, and the bytes then written for it."""
LONGEST_SECONDS = 20.0
"""One timed pass of every worker is enough when three would take longer."""


def forward_rate(
    model: TransformerTarget,
    sites: Sequence[Site],
    batch: int,
    context: int,
    sample: np.ndarray | None = None,
    least: int = ROUNDS,
) -> tuple[float, dict[str, Tensor]]:
    """Tokens per second through the body as in a harvest, and the activations of one pass by site.

    `sample` [M, T] are tokens to run; without it they are random. `least` passes of every worker are timed.
    """
    if sample is None or not len(sample):
        sample = np.random.default_rng(0).integers(0, model.n_vocab, (batch, context))
    rows = np.resize(np.arange(len(sample)), batch)
    job = Job("train", 0, torch.from_numpy(sample[rows].astype(np.int64)), False, False)
    with Passes(model, sites) as passes:
        first, acts = _timed_round(model, passes, [job] * passes.workers)  # also warms up
        rounds = max(least, int(least / ROUNDS / first)) if first * least < LONGEST_SECONDS else 1
        seconds, _ = _timed_round(model, passes, [job] * passes.workers * rounds)
    return job.tokens.numel() * passes.workers * rounds / seconds, acts


def _timed_round(model: TransformerTarget, passes: Passes, todo: Sequence[Job]) -> tuple[float, dict[str, Tensor]]:
    began, acts = time.perf_counter(), Results()
    for done in passes.run(todo):
        assert done is not None
        passes.give(acts)
        acts = done[1]
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began, acts


def foreseen(
    model: TransformerTarget, sites: Sequence[Site], batch: int, context: int, *, tokens: int, size: int, path: Path
) -> str | None:
    """One line on what a harvest of so many tokens and bytes into `path` takes and when it pays.

    None for one that is over about as soon as it was timed. `cache estimate` says more.
    """
    if tokens < WORTH_TIMING * batch * context * workers_for(model):
        return None
    forward, _ = forward_rate(model, sites, batch, context, least=1)
    write = disk_rates(path, min(size, LARGEST_SAMPLE)).write
    forward_s, write_s = tokens / forward, size / write
    return (
        f"About {duration(max(forward_s, write_s))}: the model needs {duration(forward_s)} at {forward:,.0f} tokens/s, "
        f"the disk {duration(write_s)} at {decimal(int(write))}/s, with {decimal(free_bytes(path))} free. That pays "
        f"from {max(1.0, write_s / forward_s):.2f} passes of training on."
    )
