"""Shuffled batches of activations, endless, from any position, the same whatever the tier and the prefetching.

A thread makes the next batches ready (`staging`) from chunks that other threads load (`loading`): consecutive rows of
every chunk of a group, block by block, in the order of positions (`order.ReadOrder`).

The state is one integer: `Batches(..., start=batch.start + batch.rows)` goes on after a batch.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.loading import Tier, choose
from thresher.cache.source import Source
from thresher.cache.staging import Request, Staged, Stager, stager

_DEPTH = 3  # batches in flight between the thread and the caller
_GROUP_CHUNKS, _ROWS_PER_CHUNK = 64, 64


class Batch(NamedTuple):
    """Activations of consecutive positions."""

    start: int
    """Position of its first row."""
    acts: dict[str, Tensor]
    """[B', d] by site name, decoded, on the device; only rows of the mask, the same rows for every site."""
    rows: int
    """Positions consumed, B."""
    places: np.ndarray
    """[B'] int64, ascending: where these rows stand among those that all ranks get of this batch."""
    whole: int
    """How many those are."""


def default_group(batch_rows: int) -> int:
    """Chunks read side by side: 64, and for large batches as many that each gives about 64 rows."""
    return max(_GROUP_CHUNKS, 1 << (-(-batch_rows // _ROWS_PER_CHUNK) - 1).bit_length())


class Running(NamedTuple):
    """What ends an iteration."""

    stop: threading.Event
    """The consumer wants nothing more."""
    leave: threading.Event
    """Nothing is to be waited for any more; set also where an error ends the staging, which the consumer is to get."""

    def end(self) -> None:
        """Both."""
        self.stop.set()
        self.leave.set()


class Batches:
    """Batches over one split. Iterate; call `close` when done before the iterator is."""

    def __init__(
        self,
        source: Source,
        *,
        sites: Sequence[str],
        batch_rows: int,
        seed: int,
        split: str = "train",
        start: int = 0,
        end: int | None = None,
        group_chunks: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world: int = 1,
        special: bool = False,
        tier: Tier | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """`batch_rows` counts the whole batch; rank w of `world` gets its positions ≡ w. `special` adds special rows.

        Batches that would reach over position `end` do not come, and nothing is read for them. Left out,
        `group_chunks` follows from the batch, `tier` from the sizes (without `device`, which takes its time to fill).
        Once `interrupted` says so while a batch is waited for, waiting ends, and so do the batches.
        Raises UserError for an empty split, and a batch larger than the split or smaller than `world`.
        """
        n_chunks = source.rows(split) // source.chunk_rows
        if not world <= batch_rows <= max(1, source.rows(split)) or not n_chunks:
            raise UserError(
                f"train.batch_rows is {batch_rows}; expected {world} (a row per rank) to "
                f"{source.rows(split)}, the rows of {split!r}. Choose another batch, or harvest more tokens."
            )
        names, place = tuple(source.site(name).name for name in sites), torch.device(device)
        self.request = Request(
            source=source,
            split=split,
            sites=names,
            batch_rows=batch_rows,
            seed=seed,
            group_chunks=group_chunks or default_group(batch_rows),
            device=place,
            dtype=dtype,
            rank=rank,
            world=world,
            masked=source.store == "all" and not special,
            tier=tier or choose(source, split, names, place, rows=0).tier,
            end=end,
        )
        self.start, self._interrupted = start, interrupted
        self.order = self.request.order()
        self._running: Running | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `start` on, until `end` or for ever."""
        self.close()
        running = self._running = Running(threading.Event(), threading.Event())
        staged: queue.Queue[Staged | BaseException | None] = queue.Queue(_DEPTH)
        thread = threading.Thread(target=self._stage, args=(staged, running), name="thresher-batches", daemon=True)
        thread.start()
        try:
            while not running.stop.is_set():
                try:
                    item = staged.get(timeout=0.1)
                except queue.Empty:
                    if self._interrupted():
                        return
                    continue
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    return
                yield Batch(item.start, item.finish(), self.request.batch_rows, item.places, item.whole)
        finally:
            running.end()
            thread.join()

    def close(self) -> None:
        """Stop the prefetch threads; the iterator ends."""
        if self._running is not None:
            self._running.end()

    def _stage(self, staged: "queue.Queue[Staged | BaseException | None]", running: "Running") -> None:
        """The thread: stage batch after batch until told to stop."""
        stop = running.stop

        def put(item: Staged | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    staged.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        work: Stager | None = None
        try:
            work, start = stager(self.request, running.leave), self.start
            while not stop.is_set() and (
                self.request.end is None or start + self.request.batch_rows <= self.request.end
            ):
                put(work.batch(start))
                start += self.request.batch_rows
            put(None)
        except BaseException as error:
            put(error)
        finally:
            if work is not None:
                work.close()
