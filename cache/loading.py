"""How the chunks of a group get into memory, ahead of their use: one of five tiers, chosen by place and size.

    device     the arrays lie whole in the memory of the accelerator; nothing is loaded while training
    mapped     views of mapped files; threads check the chunks of the next group while this one is used, which faults
               their pages in. Also the way of sources whose shards come and go
    direct     threads read whole chunks past the page cache (O_DIRECT) into slots, for caches larger than memory
    unpacked   threads read and decompress whole chunks into slots
    remote     threads fetch whole chunks from an object store into slots, neighbours by one request, some groups ahead

A slot is page-aligned memory for one group, used again and again: fresh memory costs a page fault every 4 kB. All tiers
give the same chunks, so batches do not depend on the tier.
"""

import contextlib
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from rich.filesize import decimal

from thresher.cache.layout import ArraySpec, raw_dtype
from thresher.cache.memory import available_memory
from thresher.cache.order import ReadOrder, Segment
from thresher.cache.remote.fetch import RUN_BYTES, runs
from thresher.cache.source import OnDisk, Source

Tier = Literal["device", "mapped", "direct", "unpacked", "remote"]

TIERS: dict[Tier, str] = {
    "device": "from the device's memory",
    "mapped": "through the page cache",
    "direct": "past the page cache",
    "unpacked": "and decompressing in threads",
    "remote": "from the object store",
}
"""Each tier in words."""

_DEVICE_SHARE, _HOST_SHARE, _SLOT_SHARE = 0.85, 0.5, 0.125
_THREADS: dict[Tier, int] = {"device": 1, "mapped": 4, "direct": 8, "unpacked": 8, "remote": 32}
_MOST_GROUPS = 16  # of a cache whose groups are tiny: beginning to load one has its price too
_SLOTS = ("direct", "unpacked", "remote")

Group = Mapping[str, Sequence[np.ndarray | None]]
"""Chunks [C, …] of a group by array, in stored form; None where this rank takes no row of a chunk."""


class Choice(NamedTuple):
    """A tier, and why."""

    tier: Tier
    reason: str
    """One line for the user."""


def choose(source: Source, split: str, sites: Sequence[str], device: torch.device, rows: int | None = None) -> Choice:
    """The tier for reading some sites of a split on a device.

    `rows` is how many rows will be asked for: below one epoch it does not pay to load all of them onto the device.
    """
    if not isinstance(source, OnDisk):
        return Choice("mapped", "activations come as they are made")
    needed = source.stored_bytes(split, array_names(source, split, sites))
    if device.type == "cuda" and (rows is None or rows >= source.rows(split)):
        free, _ = torch.cuda.mem_get_info(device)
        if needed <= _DEVICE_SHARE * free:
            return Choice("device", f"{decimal(needed)} of activations fit the {decimal(free)} free on {device}")
    if source.reading is not None:
        return Choice("remote", f"{decimal(needed)} of activations, {source.reading.read_ahead_mb:g} MB ahead")
    if source.codec == "bf16-lz4":
        return Choice("unpacked", f"{decimal(needed)} of activations compressed without loss")
    memory = available_memory()
    if needed <= _HOST_SHARE * memory:
        return Choice("mapped", f"{decimal(needed)} of activations fit the {decimal(memory)} of memory available")
    return Choice(
        "direct", f"{decimal(needed)} of activations exceed half of the {decimal(memory)} of memory available"
    )


def array_names(source: Source, split: str, sites: Sequence[str]) -> list[str]:
    """The arrays that hold some sites: codes, and scales where there are any."""
    specs = source.arrays(split)
    return [name for site in sites for name in (site, f"{site}.scale") if name in specs]


def in_order(source: Source, split: str, name: str, count: int) -> Iterator[np.ndarray]:
    """The first chunks of an array, one after another; from an object store several are fetched at a time."""
    if not isinstance(source, OnDisk) or source.reading is None:
        yield from (source.chunk(split, name, index) for index in range(count))
        return
    threads = _THREADS["remote"]
    with ThreadPoolExecutor(threads, thread_name_prefix="thresher-load") as pool:
        coming = deque(pool.submit(source.chunk, split, name, index) for index in range(min(threads, count)))
        for index in range(count):
            chunk = coming.popleft().result()
            if index + threads < count:
                coming.append(pool.submit(source.chunk, split, name, index + threads))
            yield chunk


def taken_by(segment: Segment, start: int, rank: int, world: int) -> np.ndarray:
    """[r] bool: the chunks of a group from which a rank takes rows; `start` is the position of the group's first row.

    Chunk j has the positions start + j, start + j + r, …; rank w those that are w modulo the number of ranks.
    """
    r = len(segment.chunks)
    return (rank - start - np.arange(r)) % np.gcd(r, world) == 0


@dataclass
class _Pending:
    """A group that is being loaded."""

    start: int
    views: dict[str, list[np.ndarray | None]]
    jobs: list[Future[None]]
    slot: dict[str, np.ndarray]


class Loader:
    """Loads group after group, in the order of positions, a few ahead. For one thread; `close` it."""

    def __init__(
        self,
        source: Source,
        split: str,
        names: Sequence[str],
        order: ReadOrder,
        tier: Tier,
        *,
        rank: int = 0,
        world: int = 1,
        end: int | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """`order` is the loader's own; nothing at position `end` or after is loaded, nothing waited for once `stop`."""
        self._stop = stop or threading.Event()
        self.source, self.split, self.order, self.tier = source, split, order, tier
        self.rank, self.world, self.end = rank, world, end
        self.specs: dict[str, ArraySpec] = {name: source.arrays(split)[name] for name in names}
        self._wide = [n for n, spec in self.specs.items() if len(spec.shape) > 1 and tier in _SLOTS]
        self._ahead = self._groups_ahead()
        self._pending: deque[_Pending] = deque()
        self._current: _Pending | None = None
        self._free: list[dict[str, np.ndarray]] = []
        threads = _THREADS[tier] if tier == "remote" else min(_THREADS[tier], 4 * (os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="thresher-load")

    def group(self, segment: Segment, position: int) -> Group:
        """The chunks of the group that holds a segment, whose first row is at `position`.

        Valid until another group is asked for. Raises what went wrong in loading it.
        """
        start = position - segment.first
        if self._current is None or self._current.start != start:
            self._enter(start)
        assert self._current is not None
        return self._current.views

    def close(self) -> None:
        """Stop the threads; what they are reading is read to its end, what they wait for is not."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._current = None

    def _groups_ahead(self) -> int:
        """Groups that are loaded while one is used: as many as memory, and in an object store the setting, allow."""
        if not self._wide:
            return 1
        chunks = min(self.order.group_chunks, self.order.n_chunks)
        group_bytes = sum(chunks * self.order.chunk_rows * self.specs[name].row_bytes for name in self._wide)
        wanted, room = 2, int(_SLOT_SHARE * available_memory()) // group_bytes
        if isinstance(self.source, OnDisk) and self.source.reading is not None:
            wanted = min(self.source.reading.read_ahead_bytes // group_bytes, _MOST_GROUPS)
        return max(1, min(wanted, room))

    def _enter(self, start: int) -> None:
        """Make the group at `start` the current one, and begin to load those after it."""
        if self._current is not None:
            self._free.append(self._current.slot)
        if not self._pending or self._pending[0].start != start:
            self._forget()
            self._begin(start)
        self._current = self._pending.popleft()
        following = self._pending[-1].start if self._pending else start
        while len(self._pending) < self._ahead:
            following = self._after(following)
            if self.end is not None and following >= self.end:
                break
            self._begin(following)
        for job in self._current.jobs:
            job.result()

    def _after(self, start: int) -> int:
        """The position at which the group after the one at `start` begins."""
        (segment,) = self.order.segments(start, 1)
        return start + len(segment.chunks) * self.order.chunk_rows

    def _forget(self) -> None:
        """Drop what is being loaded: it is not what comes next."""
        for pending in self._pending:
            for job in pending.jobs:
                job.cancel()
        for pending in self._pending:
            for job in pending.jobs:
                if not job.cancelled():
                    job.exception()  # until it is done, the slot is in use
            self._free.append(pending.slot)
        self._pending.clear()

    def _begin(self, start: int) -> None:
        """Begin to load the group at `start`."""
        (segment,) = self.order.segments(start, 1)
        slot = self._free.pop() if self._free else self._slot()
        r = len(segment.chunks)
        views: dict[str, list[np.ndarray | None]] = {name: [None] * r for name in self.specs}
        mine = np.flatnonzero(taken_by(segment, start, self.rank, self.world))
        if self.tier == "remote":
            jobs = self._fetch(views, slot, {int(segment.chunks[j]): int(j) for j in mine})
        else:
            jobs = [self._pool.submit(self._load, views, slot, int(j), int(segment.chunks[j])) for j in mine]
        others = np.setdiff1d(np.arange(r), mine) if "keep" in self.specs else ()  # to count all ranks' rows
        jobs += [self._pool.submit(self._load_keep, views, int(j), int(segment.chunks[j])) for j in others]
        self._pending.append(_Pending(start, views, jobs, slot))

    def _fetch(
        self, views: dict[str, list[np.ndarray | None]], slot: Mapping[str, np.ndarray], places: Mapping[int, int]
    ) -> list[Future[None]]:
        """Begin to fetch chunks, given with their places in the group: neighbours of one file by one request."""
        assert isinstance(self.source, OnDisk)
        chunks, jobs = sorted(places), list[Future[None]]()
        for name, spec in self.specs.items():
            length = spec.chunk[0] * spec.row_bytes
            for run in runs(chunks, dict.fromkeys(chunks, length), RUN_BYTES):
                for part in self.source.by_file(self.split, name, run):
                    jobs.append(self._pool.submit(self._fetch_run, views, slot, name, part, places))
        return jobs

    def _fetch_run(
        self,
        views: dict[str, list[np.ndarray | None]],
        slot: Mapping[str, np.ndarray],
        name: str,
        run: Sequence[int],
        places: Mapping[int, int],
    ) -> None:
        """Some neighbours of one array, in a thread."""
        assert isinstance(self.source, OnDisk)
        if name in slot:
            outs = [slot[name][places[chunk]] for chunk in run]
            self.source.read_run(self.split, name, run[0], outs)
            for chunk, view in zip(run, outs, strict=True):
                view.flags.writeable = False  # of this view; the slot itself is written again
                views[name][places[chunk]] = view
        else:
            for chunk in run:
                views[name][places[chunk]] = self.source.chunk(self.split, name, chunk, self._stop)

    def _load(
        self, views: dict[str, list[np.ndarray | None]], slot: Mapping[str, np.ndarray], j: int, chunk: int
    ) -> None:
        """One chunk of every array, in a thread."""
        for name in self.specs:
            if name in slot:
                assert isinstance(self.source, OnDisk)
                self.source.read(self.split, name, chunk, slot[name][j], direct=self.tier == "direct")
                view = slot[name][j]
                view.flags.writeable = False  # of this view; the slot itself is written again
                views[name][j] = view
            else:
                views[name][j] = self.source.chunk(self.split, name, chunk, self._stop)

    def _load_keep(self, views: dict[str, list[np.ndarray | None]], j: int, chunk: int) -> None:
        """Which rows of a chunk are left out, in a thread."""
        views["keep"][j] = self.source.chunk(self.split, "keep", chunk, self._stop)

    def _slot(self) -> dict[str, np.ndarray]:
        """Page-aligned memory for one group of every array that is not mapped."""
        return {
            name: aligned((self.order.group_chunks, *self.specs[name].chunk), self.specs[name]) for name in self._wide
        }


def aligned(shape: tuple[int, ...], spec: ArraySpec) -> np.ndarray:
    """Page-aligned memory in the stored dtype of an array."""
    dtype = raw_dtype(spec.dtype)
    memory = mmap.mmap(-1, max(1, int(np.prod(shape)) * dtype.itemsize))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape)
