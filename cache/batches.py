"""Shuffled batches of activations, endless, from any position, the same whatever the prefetching.

A thread stages the stored bytes of the next batches: consecutive rows of every chunk of a group, block by block, into
the order of positions (`order.ReadOrder`). Only the batch itself is decoded, on the device that will use it; a GPU
receives the stored bytes from pinned memory on a stream of its own.

The state is one integer: `Batches(..., start=batch.start + batch.rows)` goes on after a batch.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.codec import decode
from thresher.cache.contracts import UserError
from thresher.cache.layout import KEPT
from thresher.cache.order import ReadOrder, Segment
from thresher.cache.reader import as_codes
from thresher.cache.source import Source

_DEPTH = 3  # batches in flight between the thread and the caller


class Batch(NamedTuple):
    """Activations of consecutive positions."""

    start: int
    """Position of its first row."""
    acts: dict[str, Tensor]
    """[B', d] by site name, decoded, on the device; only rows of the mask, the same rows for every site."""
    rows: int
    """Positions consumed, B."""


class Batches:
    """Batches over one split. Iterate; call `close` when done before the iterator is."""

    def __init__(
        self,
        reader: Source,
        *,
        sites: Sequence[str],
        batch_rows: int,
        seed: int,
        split: str = "train",
        start: int = 0,
        group_chunks: int = 64,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world: int = 1,
        special: bool = False,
    ) -> None:
        """`batch_rows` counts the whole batch; rank w of `world` gets its positions ≡ w. `special` adds special rows.

        Raises UserError for an empty split, a batch larger than the split or not divisible by `world`.
        """
        n_chunks = reader.rows(split) // reader.chunk_rows
        if not 0 < batch_rows <= max(1, reader.rows(split)) or batch_rows % world or not n_chunks:
            raise UserError(
                f"train.batch_rows is {batch_rows}; expected a multiple of the {world} ranks between 1 and the "
                f"{reader.rows(split)} rows of {split!r}. Choose a smaller batch, or harvest more tokens."
            )
        self.reader, self.sites, self.split = reader, tuple(reader.site(name).name for name in sites), split
        self.batch_rows, self.start, self.rank, self.world = batch_rows, start, rank, world
        self.device, self.dtype = torch.device(device), dtype
        self.order = ReadOrder(n_chunks, reader.chunk_rows, seed, split, group_chunks)
        self._masked = reader.store == "all" and not special
        self._calibrations = {
            name: c.to(self.device) for name in self.sites if (c := reader.calibration(name)) is not None
        }
        self._stop: threading.Event | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `start` on, for ever."""
        self.close()
        stop = self._stop = threading.Event()
        staged: queue.Queue[Staged | BaseException] = queue.Queue(_DEPTH)
        stager = Stager(self)
        thread = threading.Thread(target=self._stage, args=(stager, staged, stop), name="thresher-batches", daemon=True)
        thread.start()
        try:
            while not stop.is_set():
                try:
                    item = staged.get(timeout=0.1)
                except queue.Empty:
                    continue
                if isinstance(item, BaseException):
                    raise item
                batch = self.decoded(item)
                stager.release(item, batch)
                yield batch
        finally:
            stop.set()
            thread.join()

    def close(self) -> None:
        """Stop the prefetch thread; the iterator ends."""
        if self._stop is not None:
            self._stop.set()

    def _stage(self, stager: "Stager", staged: "queue.Queue[Staged | BaseException]", stop: threading.Event) -> None:
        """The thread: stage batch after batch until told to stop."""
        start = self.start
        while not stop.is_set():
            try:
                item: Staged | BaseException = stager.batch(start)
            except BaseException as error:
                item = error
            while not stop.is_set():
                try:
                    staged.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            start += self.batch_rows

    def decoded(self, item: "Staged") -> Batch:
        """Decode a staged batch on the device."""
        raw = item.arrays
        keep = None
        if self._masked:
            keep = torch.from_numpy(np.flatnonzero(item.keep == KEPT)).to(self.device)
        if item.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(item.ready)
        acts = {}
        for name in self.sites:
            codes_ND, scale_N = raw[name], raw.get(f"{name}.scale")
            if keep is not None:
                codes_ND, scale_N = codes_ND[keep], scale_N[keep] if scale_N is not None else None
            acts[name] = decode(codes_ND, scale_N, self._calibrations.get(name), self.dtype)
        if item.ready is not None:
            for tensor in raw.values():
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return Batch(item.start, acts, self.batch_rows)


class Staged(NamedTuple):
    """A batch in stored form."""

    start: int
    arrays: Mapping[str, Tensor]
    """Codes and scales by array name, on the device."""
    keep: np.ndarray
    """[B] uint8, or empty when every stored row counts."""
    ready: "torch.cuda.Event | None"
    """Set once the copy to the device is done; None on the CPU."""
    buffers: dict[str, np.ndarray] | None
    """Host memory behind the arrays, to be filled again once they are decoded."""


class Stager:
    """What the thread remembers between batches: the views of the group it is in, host buffers, the copy stream."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.reader, self.order = batches, batches.reader, batches.order
        specs = self.reader.arrays(batches.split)
        self.names = [n for s in batches.sites for n in (s, f"{s}.scale") if n in specs]
        if batches._masked:
            self.names.append("keep")
        self.specs = {name: specs[name] for name in self.names}
        self.group: tuple[int, int] = (-1, -1)
        self.views: dict[str, list[np.ndarray]] = {}
        self.narrow: dict[str, np.ndarray] = {}
        self.within: list[np.ndarray | None] = []
        self.free: deque[dict[str, np.ndarray]] = deque()  # fresh memory costs a page fault every 4 kB
        self.cuda = batches.device.type == "cuda"
        self.stream = torch.cuda.Stream(batches.device) if self.cuda else None

    def batch(self, start: int) -> Staged:
        """Stage positions [start, start + batch_rows) of this rank."""
        b = self.batches
        count = b.batch_rows // b.world
        buffers = self.free.popleft() if self.free else {name: self._empty(name, count) for name in self.names}
        arrays, at = dict(buffers), start  # position of the segment's first row
        for segment in self.order.segments(start, b.batch_rows):
            self._enter(segment)
            self._copy(segment, at, start, arrays)
            at += segment.length
        keep = arrays.pop("keep", np.empty(0, np.uint8))
        tensors = {name: as_codes(array) for name, array in arrays.items()}
        if self.stream is None:
            return Staged(start, tensors, keep, None, buffers)
        with torch.cuda.stream(self.stream):
            moved = {name: tensor.to(b.device, non_blocking=True) for name, tensor in tensors.items()}
            ready = torch.cuda.Event()
            ready.record(self.stream)
        keep = keep.copy()
        ready.synchronize()  # only now may the pinned buffers be filled again
        self.free.append(buffers)
        return Staged(start, moved, keep, ready, None)

    def release(self, item: Staged, batch: Batch) -> None:
        """Take back the host memory of a decoded batch, unless the caller was given that memory itself."""
        lent = {tensor.data_ptr() for tensor in batch.acts.values()}
        if item.buffers is not None and not any(array.ctypes.data in lent for array in item.buffers.values()):
            self.free.append(item.buffers)

    def _empty(self, name: str, count: int) -> np.ndarray:
        """A host buffer for `count` rows of an array, pinned when it is bound for a GPU."""
        spec = self.specs[name]
        dtype = {"int8": torch.int8, "uint8": torch.uint8, "float16": torch.float16, "bfloat16": torch.int16}
        buffer = torch.empty((count, *spec.shape[1:]), dtype=dtype[spec.dtype], pin_memory=self.cuda).numpy()
        return buffer.view(np.uint16) if spec.dtype == "bfloat16" else buffer

    def _enter(self, segment: Segment) -> None:
        """Look up the chunks of a group; each is checked on its first touch."""
        if self.group == (segment.epoch, segment.group):
            return
        self.group = (segment.epoch, segment.group)
        split = self.batches.split
        views = {n: [self.reader.chunk(split, n, int(c)) for c in segment.chunks] for n in self.names}
        self.within = [self.order.within(segment.epoch, int(c)) for c in segment.chunks]
        self.views = {n: parts for n, parts in views.items() if parts[0].ndim > 1}
        # One number a row (scales, classes): put the whole group in order at once, so a batch is a slice of it.
        self.narrow = {
            n: np.stack([p if w is None else p[w] for p, w in zip(views[n], self.within, strict=True)], axis=1).ravel()
            for n in views.keys() - self.views.keys()
        }

    def _copy(self, segment: Segment, at: int, start: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy this rank's rows of a segment whose first position is `at` into the batch that begins at `start`.

        Positions u ≡ j (mod r) of the group come from chunk j, one row further each turn; of those, every `stride`-th
        belongs to this rank.
        """
        r, world = len(segment.chunks), self.batches.world
        skipped = (self.batches.rank - at) % world  # of the segment's positions, before the first of this rank
        for name, ordered in self.narrow.items():
            mine = ordered[segment.first + skipped : segment.first + segment.length : world]
            first = (at + skipped - start) // world
            arrays[name][first : first + len(mine)] = mine
        stride = world // np.gcd(r, world)
        for j in range(r):
            u = segment.first + (j - segment.first) % r
            wanted = (self.batches.rank - (at + u - segment.first)) % world
            steps = next((k for k in range(stride) if (k * r) % world == wanted), None)
            if steps is None:
                continue
            u += steps * r
            count = -(-(segment.first + segment.length - u) // (stride * r))
            if count <= 0:
                continue
            target = (at + u - segment.first - start) // world
            places = slice(target, target + (count - 1) * (stride * r // world) + 1, stride * r // world)
            rows: slice | np.ndarray = slice(u // r, u // r + (count - 1) * stride + 1, stride)
            inner = self.within[j]
            if inner is not None:
                rows = inner[rows]
            for name, views in self.views.items():
                arrays[name][places] = views[j][rows]
