"""Forward passes over the contexts of a harvest, in order, several at a time on a CPU.

One small pass spread over cores mostly waits for its own threads. So on a CPU every core runs a pass of its own on a
replica of the model that shares the weights, and the results come back in order. Which pass runs where changes no bit:
each has the same number of threads. With more cores than passes that is more than one, and how many decides the last
bit of a product: so a cache records it, and whoever goes on with it takes the number that it was begun with.
"""

import queue
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.claims import Shard
from thresher.cache.contracts import Site
from thresher.cache.layout import Contexts
from thresher.cache.writer import CacheWriter
from thresher.harvest.allocation import heaps_that_stay
from thresher.harvest.results import Results, Rooms
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


class PassSize(NamedTuple):
    """What a forward pass is made of; passes of another size may round the last bit otherwise."""

    contexts: int
    threads: int
    """That compute it, on a CPU."""


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


def threads_per_pass() -> int:
    """Threads of each pass on a CPU: one, or the cores shared out among as many passes as there may be."""
    return max(1, torch.get_num_threads() // MOST_REPLICAS)


def workers_for(model: TransformerTarget, threads: int | None = None) -> int:
    """Passes that run at a time: on a CPU one per core or per so many `threads`, up to a limit; on a GPU one."""
    if model.device.type != "cpu" or model.spread:
        return 1
    return max(1, min(torch.get_num_threads() // (threads or threads_per_pass()), MOST_REPLICAS))


class Passes:
    """Runs jobs; a context manager that owns the threads."""

    def __init__(self, model: TransformerTarget, sites: Sequence[Site], threads: int | None = None) -> None:
        """`threads` of each pass on a CPU; None: `threads_per_pass`."""
        self._model, self.sites = model, tuple(sites)
        self._threads = torch.get_num_threads()
        self._workers = workers_for(model, threads) if model.device.type == "cpu" and not model.spread else 0
        self._rooms, self._memory = Rooms(), ExitStack()
        if self._workers:
            self._idle: queue.SimpleQueue[TransformerTarget] = queue.SimpleQueue()
            for _ in range(self._workers):
                self._idle.put(model.replica())
            share = (threads or threads_per_pass(),)
            self._pool = ThreadPoolExecutor(self._workers, "thresher-pass", initializer=_limit_threads, initargs=share)

    def __enter__(self) -> "Passes":
        if self._workers:
            self._memory.enter_context(heaps_that_stay())
        return self

    def __exit__(self, *_: object) -> None:
        if self._workers:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # the workers' setting is the default of threads to come
        self._memory.close()

    @property
    def workers(self) -> int:
        """Passes that run at a time."""
        return max(1, self._workers)

    def run(self, todo: Iterable[Job | None]) -> Iterator[tuple[Job, Results] | None]:
        """Each job with its activations [B, T, width] by site, in order; raises what went wrong in a pass.

        Whoever has done with activations gives them back (`give`); else the next pass makes new room. A None among the
        jobs comes out as None once everything before it has: what others wait for is never held back.
        """
        ahead: deque[tuple[Job, Future[Results]]] = deque()
        for job in todo:
            if job is None:
                yield _awaited(*ahead.popleft()) if ahead else None
            elif not self._workers:
                yield job, Results(self._model.record(job.tokens, self.sites))
            else:
                ahead.append((job, self._pool.submit(self._record, job.tokens)))
                if len(ahead) > self._workers:
                    yield _awaited(*ahead.popleft())
        while ahead:
            yield _awaited(*ahead.popleft())

    def give(self, results: Results) -> None:
        """Let a further pass overwrite these activations."""
        self._rooms.give(results)

    def _record(self, tokens: Tensor) -> Results:
        replica, room = self._idle.get(), self._rooms.take()
        try:
            results = Results(replica.record(tokens, self.sites, keep=room.keep))
            results.room = room
            return results
        finally:
            self._idle.put(replica)


def _limit_threads(count: int) -> None:
    """Set this thread's share of the cores.

    PyTorch gives a new thread the setting of the moment when it is first asked, so it is asked before it is told.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)


def _awaited(job: Job, future: Future[Results]) -> tuple[Job, Results]:
    return job, future.result()
