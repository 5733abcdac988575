"""From the chunks of a group to the rows of a batch, in the order of positions.

`HostStager` gathers from chunks in host memory. Bound for the CPU in float32, rows are decoded on the way, straight to
their places in the batch; bound for another device or dtype, stored bytes are gathered (pinned, and copied on a stream
of their own, for a GPU) and decoded there. `DeviceStager` gathers from whole arrays in the device's memory.

Rows that a mask leaves out are left out here already, so nothing later depends on how many there are.
"""

import ctypes
import math
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from thresher.cache.codec import Calibration, decode
from thresher.cache.kernels.decode import bf16_rows, copy_rows, int8_rows
from thresher.cache.kernels.lines import LINE_BYTES, whole_lines
from thresher.cache.layout import KEPT, ArraySpec, raw_dtype
from thresher.cache.loading import Loader, Tier, array_names, in_order
from thresher.cache.order import ReadOrder, Segment
from thresher.cache.rows import as_codes
from thresher.cache.source import Source

_SPARE = 6  # buffers of a kind that wait for use


class Request(NamedTuple):
    """What is to be staged: the settings of a `Batches`."""

    source: Source
    split: str
    sites: tuple[str, ...]
    batch_rows: int
    seed: int
    group_chunks: int
    device: torch.device
    dtype: torch.dtype
    rank: int
    world: int
    masked: bool
    """Whether special rows are left out."""
    tier: Tier
    end: int | None

    def order(self) -> ReadOrder:
        """An order of one's own: an order remembers the last permutation that it made."""
        return self.source.order(self.split, self.seed, self.group_chunks)

    def calibrations(self) -> dict[str, Calibration]:
        """μ and σ of the sites that have them, on the device."""
        known = {name: self.source.calibration(name) for name in self.sites}
        return {name: c.to(self.device) for name, c in known.items() if c is not None}


class Staged(NamedTuple):
    """A batch that a thread made ready."""

    start: int
    finish: Callable[[], dict[str, Tensor]]
    """Called by the consumer, once: the rows by site, decoded, on the device."""
    places: np.ndarray
    """[B'] where the rows stand among those that all ranks get of this batch."""
    whole: int
    """How many those are."""


class Stager(Protocol):
    """Makes batches ready, in a thread."""

    def batch(self, start: int) -> Staged:
        """The batch of positions [start, start + batch_rows), of this rank."""
        ...

    def close(self) -> None:
        """Let go of threads and memory."""
        ...


def stager(request: Request, stop: threading.Event | None = None) -> Stager:
    """The way of staging that belongs to the tier. Once `stop` is set, nothing is waited for any more."""
    return DeviceStager(request) if request.tier == "device" else HostStager(request, stop)


class Pool:
    """Host memory that comes back by itself once nothing refers to it any more, tensors and their views included."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._spare: dict[tuple[tuple[int, ...], str], deque[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Memory of a shape, its content arbitrary."""
        key = (shape, dtype.str)
        with self._lock:
            spare = self._spare.setdefault(key, deque(maxlen=_SPARE))
        try:
            base = spare.pop()
        except IndexError:
            size = max(1, math.prod(shape) * dtype.itemsize)
            base = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned).numpy()
        # An array's views would refer to `base`, past itself.
        lent = (ctypes.c_ubyte * base.nbytes).from_buffer(base.data)
        weakref.finalize(lent, spare.append, base).atexit = False
        return np.frombuffer(memoryview(lent), dtype, math.prod(shape)).reshape(shape)


class HostStager:
    """Gathers batches from chunks in host memory."""

    def __init__(self, request: Request, stop: threading.Event | None = None) -> None:
        self.request, self.order = request, request.order()
        source, split = request.source, request.split
        names = array_names(source, split, request.sites) + (["keep"] if request.masked else [])
        specs = source.arrays(split)
        self.specs: dict[str, ArraySpec] = {name: specs[name] for name in names}
        self.cuda = request.device.type == "cuda"
        self.fused = request.device.type == "cpu" and request.dtype == torch.float32
        self.pool = Pool(pinned=self.cuda)
        self.stream = torch.cuda.Stream(request.device) if self.cuda else None
        self.calibrations = request.calibrations()
        self.loader = Loader(
            source,
            split,
            names,
            request.order(),
            request.tier,
            rank=request.rank,
            world=request.world,
            end=request.end,
            stop=stop,
        )
        self._bytes = 0  # of a batch
        self._places = self._layout()
        self._start = -1  # of the group that is prepared
        self._chunk_U = self._row_U = np.empty(0, np.int32)
        self._addresses: dict[str, np.ndarray] = {}
        self._ordered: dict[str, np.ndarray] = {}

    def close(self) -> None:
        self.loader.close()

    def batch(self, start: int) -> Staged:
        request, kept, whole, at = self.request, 0, 0, start
        out, places = self._memory(), []
        for segment in self.order.segments(start, request.batch_rows):
            self._enter(segment, at)
            skipped = (request.rank - at) % request.world  # positions before the first of this rank
            taken: slice | np.ndarray
            every = np.arange(segment.length)
            if request.masked:
                every = np.flatnonzero(self._ordered["keep"][segment.first :][: segment.length] == KEPT)
                mine = np.flatnonzero(every % request.world == skipped)
                taken = every[mine] + segment.first
            else:
                mine = every[skipped :: request.world]
                taken = slice(segment.first + skipped, segment.first + segment.length, request.world)
            kept += self._gather(taken, {name: memory[kept:] for name, memory in out.items()})
            places.append(whole + mine)
            at, whole = at + segment.length, whole + len(every)
        finish = self._finished({name: memory[:kept] for name, memory in out.items()})
        return Staged(start, finish, np.concatenate(places), whole)

    def _layout(self) -> dict[str, tuple[int, np.dtype, tuple[int, ...]]]:
        """Where each array of a batch lies in its memory, each on a cache line: offset, dtype and shape."""
        layout, end, count = {}, 0, -(-self.request.batch_rows // self.request.world)
        for name, spec in self.specs.items():
            if name == "keep" or (self.fused and name not in self.request.sites):
                continue
            dtype = np.dtype(np.float32) if self.fused else raw_dtype(spec.dtype)
            layout[name] = end, dtype, (count, *spec.shape[1:])
            end += -(-count * math.prod(spec.shape[1:]) * dtype.itemsize // LINE_BYTES) * LINE_BYTES
        self._bytes = end
        return layout

    def _memory(self) -> dict[str, np.ndarray]:
        """Memory for a batch: of decoded numbers where rows are decoded on the way, else of rows as they are stored."""
        memory = self.pool.take((self._bytes,), np.dtype(np.uint8))
        return {name: np.ndarray(shape, dtype, memory, start) for name, (start, dtype, shape) in self._places.items()}

    def _enter(self, segment: Segment, at: int) -> None:
        """Get the chunks of a segment's group; on the first call for it, prepare what its batches need."""
        group = self.loader.group(segment, at)
        if self._start == at - segment.first:
            return
        self._start = at - segment.first
        r, c = len(segment.chunks), self.order.chunk_rows
        self._chunk_U = np.tile(np.arange(r, dtype=np.int32), c)
        self._row_U = np.repeat(np.arange(c, dtype=np.int32), r)
        if segment.epoch:
            orders = [self.order.within(segment.epoch, int(chunk)) for chunk in segment.chunks]
            self._row_U = np.stack(orders, axis=1).astype(np.int32).ravel()  # type: ignore[arg-type] # None in epoch 0 only
        flat_U = self._chunk_U.astype(np.int64) * c + self._row_U
        for name, chunks in group.items():
            if len(self.specs[name].shape) > 1:
                addresses = [0 if chunk is None else chunk.ctypes.data for chunk in chunks]
                self._addresses[name] = np.array(addresses, np.uint64)
                continue
            columns_RC = np.zeros((r, c), raw_dtype(self.specs[name].dtype))
            for column_C, chunk in zip(columns_RC, chunks, strict=True):
                if chunk is not None:
                    column_C[:] = chunk
            ordered = columns_RC.reshape(-1).take(flat_U)
            self._ordered[name] = ordered.astype(np.float32) if self.fused and name != "keep" else ordered

    def _gather(self, taken: slice | np.ndarray, out: Mapping[str, np.ndarray]) -> int:
        """Rows at some offsets of the group to the beginning of `out`, of every array; how many they are."""
        chunk_N, row_N = self._chunk_U[taken], self._row_U[taken]
        count = len(chunk_N)
        for name, memory in out.items():
            rows, ordered = memory[:count], self._ordered.get(name)
            if ordered is not None:
                rows[:] = ordered[taken]
                continue
            where, lines = (self._addresses[name], chunk_N, row_N), whole_lines(rows)
            if not self.fused or self.specs[name].dtype == "float32":
                copy_rows(*where, rows, lines)
            elif name in self.calibrations:
                mean, std = (part.numpy() for part in self.calibrations[name])
                int8_rows(*where, self._ordered[f"{name}.scale"][taken], mean, std, rows, lines)
            else:
                bf16_rows(*where, rows.view(np.uint32), lines)
        return count

    def _finished(self, out: Mapping[str, np.ndarray]) -> Callable[[], dict[str, Tensor]]:
        """What is left to do for the consumer. For a GPU the copy is begun here, and waited for."""
        if self.fused:
            return lambda: {name: torch.from_numpy(memory) for name, memory in out.items()}
        stored = {name: as_codes(memory) for name, memory in out.items()}
        if self.stream is None:
            return lambda: self._decoded(stored)
        with torch.cuda.stream(self.stream):
            moved = {name: tensor.to(self.request.device, non_blocking=True) for name, tensor in stored.items()}
            copied = torch.cuda.Event()
            copied.record(self.stream)
        copied.synchronize()  # only now may the pinned memory go back to the pool

        def finish() -> dict[str, Tensor]:
            current = torch.cuda.current_stream(self.request.device)
            current.wait_event(copied)
            for tensor in moved.values():
                tensor.record_stream(current)
            return self._decoded(moved)

        return finish

    def _decoded(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return decoded(stored, self.request.sites, self.calibrations, self.request.dtype)


class DeviceStager:
    """Gathers batches from whole arrays in the memory of the device, in stored form."""

    def __init__(self, request: Request) -> None:
        self.request, self.order = request, request.order()
        self.calibrations = request.calibrations()
        source, split = request.source, request.split
        self.arrays = {name: self._resident(name) for name in array_names(source, split, request.sites)}
        chunks = range(self.order.n_chunks if request.masked else 0)
        self._keep = np.concatenate([source.chunk(split, "keep", c) for c in chunks]) if chunks else np.empty(0)
        self._start = -1
        self._rows = np.empty(0, np.int64)

    def close(self) -> None:
        self.arrays = {}

    def batch(self, start: int) -> Staged:
        request, parts, at = self.request, [], start
        for segment in self.order.segments(start, request.batch_rows):
            parts.append(self._group_rows(segment, at)[segment.first :][: segment.length])
            at += segment.length
        every = np.concatenate(parts)
        number = np.arange(start, start + len(every))
        if request.masked:
            kept = self._keep[every] == KEPT
            every, number = every[kept], number[kept]
        places = np.flatnonzero(number % request.world == request.rank)
        index, arrays = torch.from_numpy(every[places]), self.arrays  # which the last batches need after `close`
        if request.device.type == "cuda":
            index = index.pin_memory().to(request.device, non_blocking=True)

        def finish() -> dict[str, Tensor]:
            stored = {name: array.index_select(0, index) for name, array in arrays.items()}
            return decoded(stored, request.sites, self.calibrations, request.dtype)

        return Staged(start, finish, places, len(every))

    def _group_rows(self, segment: Segment, at: int) -> np.ndarray:
        """[r · C] stored rows of a segment's group, in the order of positions."""
        if self._start != at - segment.first:
            self._start = at - segment.first
            turns = np.arange(self.order.chunk_rows)
            columns = [
                int(chunk) * self.order.chunk_rows + (turns if within is None else within)
                for chunk in segment.chunks
                for within in [self.order.within(segment.epoch, int(chunk))]
            ]
            self._rows = np.stack(columns, axis=1).ravel()
        return self._rows

    def _resident(self, name: str) -> Tensor:
        """A whole array on the device."""
        source, split, c = self.request.source, self.request.split, self.order.chunk_rows
        spec = source.arrays(split)[name]
        array = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self.request.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            for index, chunk in enumerate(in_order(source, split, name, self.order.n_chunks)):
                array[index * c : (index + 1) * c] = as_codes(chunk)
        return array


def decoded(
    stored: Mapping[str, Tensor], sites: Sequence[str], calibrations: Mapping[str, Calibration], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Rows by site in `dtype`, on the device where their codes are."""
    return {name: decode(stored[name], stored.get(f"{name}.scale"), calibrations.get(name), dtype) for name in sites}
