"""Shuffled batches of activations, endless, from any position, the same whatever the prefetching.

A thread stages the stored bytes of the next batches: consecutive rows of every chunk of a group, block by block, into
the order of positions (`order.ReadOrder`). Only the batch itself is decoded, on the device that will use it; a GPU
receives the stored bytes from pinned memory on a stream of its own.

The state is one integer: `Batches(..., start=batch.start + batch.rows)` goes on after a batch.
"""

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.codec import decode
from thresher.cache.contracts import UserError
from thresher.cache.layout import KEPT
from thresher.cache.order import ReadOrder, Segment
from thresher.cache.reader import CacheReader, as_codes

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
        reader: CacheReader,
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
        n_chunks = reader.rows(split) // reader.plan.chunk_rows
        if not 0 < batch_rows <= max(1, reader.rows(split)) or batch_rows % world or not n_chunks:
            raise UserError(
                f"train.batch_rows is {batch_rows}; expected a multiple of the {world} ranks between 1 and the "
                f"{reader.rows(split)} rows of {split!r}. Choose a smaller batch, or harvest more tokens."
            )
        self.reader, self.sites, self.split = reader, tuple(reader.site(name).name for name in sites), split
        self.batch_rows, self.start, self.rank, self.world = batch_rows, start, rank, world
        self.device, self.dtype = torch.device(device), dtype
        self.order = ReadOrder(n_chunks, reader.plan.chunk_rows, seed, split, group_chunks)
        self._masked = reader.plan.store == "all" and not special
        self._calibrations = {
            name: c.to(self.device) for name in self.sites if (c := reader.calibration(name)) is not None
        }
        self._stop: threading.Event | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `start` on, for ever."""
        self.close()
        stop = self._stop = threading.Event()
        staged: queue.Queue[_Staged | BaseException] = queue.Queue(_DEPTH)
        thread = threading.Thread(target=self._stage, args=(staged, stop), name="thresher-batches", daemon=True)
        thread.start()
        try:
            while not stop.is_set():
                try:
                    item = staged.get(timeout=0.1)
                except queue.Empty:
                    continue
                if isinstance(item, BaseException):
                    raise item
                yield self._decoded(item)
        finally:
            stop.set()
            thread.join()

    def close(self) -> None:
        """Stop the prefetch thread; the iterator ends."""
        if self._stop is not None:
            self._stop.set()

    def _stage(self, staged: "queue.Queue[_Staged | BaseException]", stop: threading.Event) -> None:
        """The thread: stage batch after batch until told to stop."""
        stager, start = _Stager(self), self.start
        while not stop.is_set():
            try:
                item: _Staged | BaseException = stager.batch(start)
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

    def _decoded(self, item: "_Staged") -> Batch:
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


class _Staged(NamedTuple):
    """A batch in stored form."""

    start: int
    arrays: Mapping[str, Tensor]
    """Codes and scales by array name, on the device."""
    keep: np.ndarray
    """[B] uint8, or empty when every stored row counts."""
    ready: "torch.cuda.Event | None"
    """Set once the copy to the device is done; None on the CPU."""


class _Stager:
    """What the thread remembers between batches: the views of the group it is in, and the copy stream."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.reader, self.order = batches, batches.reader, batches.order
        specs = self.reader.plan.sharded_arrays(batches.split)
        self.names = [n for s in batches.sites for n in (s, f"{s}.scale") if n in specs]
        if batches._masked:
            self.names.append("keep")
        self.specs = {name: specs[name] for name in self.names}
        self.group: tuple[int, int] = (-1, -1)
        self.views: dict[str, list[np.ndarray]] = {}
        self.within: list[np.ndarray | None] = []
        self.cuda = batches.device.type == "cuda"
        self.stream = torch.cuda.Stream(batches.device) if self.cuda else None

    def batch(self, start: int) -> _Staged:
        """Stage positions [start, start + batch_rows) of this rank."""
        b = self.batches
        count = b.batch_rows // b.world
        arrays = {name: self._empty(name, count) for name in self.names}
        at = start  # position of the segment's first row
        for segment in self.order.segments(start, b.batch_rows):
            self._enter(segment)
            self._copy(segment, at, start, arrays)
            at += segment.length
        keep = arrays.pop("keep", np.empty(0, np.uint8))
        tensors = {name: as_codes(array) for name, array in arrays.items()}
        if self.stream is None:
            return _Staged(start, tensors, keep, None)
        with torch.cuda.stream(self.stream):
            moved = {name: tensor.to(b.device, non_blocking=True) for name, tensor in tensors.items()}
            ready = torch.cuda.Event()
            ready.record(self.stream)
        ready.synchronize()  # the pinned buffers go back to their pool only now
        return _Staged(start, moved, keep, ready)

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
        self.views = {n: [self.reader.chunk(split, n, int(c)) for c in segment.chunks] for n in self.names}
        self.within = [self.order.within(segment.epoch, int(c)) for c in segment.chunks]

    def _copy(self, segment: Segment, at: int, start: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy this rank's rows of a segment whose first position is `at` into the batch that begins at `start`.

        Positions u ≡ j (mod r) of the group come from chunk j, one row further each turn; of those, every `stride`-th
        belongs to this rank.
        """
        r, world = len(segment.chunks), self.batches.world
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
            for name, array in arrays.items():
                array[places] = self.views[name][j][rows]
