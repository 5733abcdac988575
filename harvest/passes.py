"""Forward passes over the contexts of a harvest, in order, several at a time on a CPU.

One small pass spread over cores mostly waits for its own threads. So on a CPU every core runs a pass of its own on a
replica of the model that shares the weights, and the results come back in order. Which pass runs where changes no bit:
each has the same number of threads.
"""

import queue
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.contracts import Site
from thresher.cache.layout import Contexts
from thresher.cache.writer import CacheWriter, Shard
from thresher.harvest.target import TransformerTarget

MOST_REPLICAS = 8
"""Passes at a time; with more cores each gets several threads. Bounds the activations that are alive at once."""


class Job(NamedTuple):
    """One pass: some of the contexts that a shard of a split needs."""

    split: str
    shard: int
    tokens: Tensor
    """[B, T] int64."""
    first: bool
    """Whether the shard begins with it."""
    last: bool


def claimed(writer: CacheWriter) -> Iterator[Shard | None]:
    """Every shard that this process can lock, until all are done; None: all that is left is in the hands of others."""
    while not writer.exhausted():
        yield writer.take()


def jobs(
    shards: Iterable[Shard | None], writer: CacheWriter, contexts: Mapping[str, Contexts], batch: int
) -> Iterator[Job | None]:
    """The passes, of at most `batch` contexts each, of shard after shard. None: nothing to do now, ask again later."""
    for shard in shards:
        if shard is None:
            yield None
        else:
            split, index = shard
            yield from shard_jobs(split, index, writer.contexts_of(split, index), contexts[split], batch)


def shard_jobs(split: str, index: int, wanted: np.ndarray, contexts: Contexts, batch: int) -> Iterator[Job]:
    """The passes of one shard, which is made of the `wanted` contexts."""
    for start in range(0, len(wanted), batch):
        ids = contexts.token_id[wanted[start : start + batch]].astype(np.int64)
        yield Job(split, index, torch.from_numpy(ids), start == 0, start + batch >= len(wanted))


def workers_for(model: TransformerTarget) -> int:
    """Passes that run at a time: on a CPU one per core, up to a limit; on a GPU one."""
    return min(torch.get_num_threads(), MOST_REPLICAS) if model.device.type == "cpu" else 1


class Passes:
    """Runs jobs; a context manager that owns the threads."""

    def __init__(self, model: TransformerTarget, sites: Sequence[Site]) -> None:
        self._model, self._sites = model, sites
        self._threads = torch.get_num_threads()
        self._workers = workers_for(model) if model.device.type == "cpu" else 0
        if self._workers:
            self._idle: queue.SimpleQueue[TransformerTarget] = queue.SimpleQueue()
            for _ in range(self._workers):
                self._idle.put(model.replica())
            share = (self._threads // self._workers,)
            self._pool = ThreadPoolExecutor(self._workers, "thresher-pass", initializer=_limit_threads, initargs=share)

    def __enter__(self) -> "Passes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._workers:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # the workers' setting is the default of threads to come

    @property
    def workers(self) -> int:
        """Passes that run at a time."""
        return max(1, self._workers)

    def run(self, todo: Iterable[Job | None]) -> Iterator[tuple[Job, dict[str, Tensor]] | None]:
        """Each job with its activations [B, T, width] by site, in order; raises what went wrong in a pass.

        A None among the jobs comes out as None once everything before it has: what others wait for is never held back.
        """
        ahead: deque[tuple[Job, Future[dict[str, Tensor]]]] = deque()
        for job in todo:
            if job is None:
                yield _awaited(*ahead.popleft()) if ahead else None
            elif not self._workers:
                yield job, self._model.record(job.tokens, self._sites)
            else:
                ahead.append((job, self._pool.submit(self._record, job.tokens)))
                if len(ahead) > self._workers:
                    yield _awaited(*ahead.popleft())
        while ahead:
            yield _awaited(*ahead.popleft())

    def _record(self, tokens: Tensor) -> dict[str, Tensor]:
        replica = self._idle.get()
        try:
            return replica.record(tokens, self._sites)
        finally:
            self._idle.put(replica)


def _limit_threads(count: int) -> None:
    """Set this thread's share of the cores.

    PyTorch gives a new thread the setting of the moment when it is first asked, so it is asked before it is told.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)


def _awaited(job: Job, future: Future[dict[str, Tensor]]) -> tuple[Job, dict[str, Tensor]]:
    return job, future.result()
