"""Rows that lie on an accelerator, encoded there in blocks and brought to the host while the next pass runs.

Blocks are of fixed size and cut from the lane's rows, never from the caller's batches: the order in which a block is
summed is the device's own, and this way it does not depend on how the shard was fed.
"""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.codec import Encoded, encode_bf16, encode_int8z, one_thread
from thresher.cache.kernels import encode
from thresher.cache.kernels.lines import whole_lines
from thresher.cache.lane import Lane, Shelf

BLOCK_ELEMENTS = 1 << 24
"""Of one site: enough to fill a GPU with few launches."""

_IN_FLIGHT = 4  # blocks on their way to the host


class _Block(NamedTuple):
    """An encoded block of one lane, all sites, on its way into the shard's buffers."""

    lane: Lane
    start: int
    """Its first row in the lane."""
    encoded: dict[str, Encoded]

    def to_host(self) -> "_Block":
        """The same in pinned host memory, once the copies that this begins are done."""

        def copy(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

        moved = {
            name: Encoded(*(None if part is None else copy(part) for part in encoded))  # type: ignore[arg-type]
            for name, encoded in self.encoded.items()
        }
        return self._replace(encoded=moved)


class BlockEncoder:
    """Collects rows on their device in a block for each lane, and encodes every block that is full."""

    def __init__(self, shelf: Shelf, block_elements: int = BLOCK_ELEMENTS) -> None:
        self._shelf = shelf
        self._on_device = {name: c.to(shelf.device) for name, c in shelf.calibrations.items()}
        self._inverse = {name: c.inverse.to(shelf.device) for name, c in shelf.calibrations.items()}
        self._lines = {name: whole_lines(array) for name, array in shelf.buffers.items()}
        self._capacity = max(64, block_elements // max(site.width for site in shelf.sites))
        self._stages: dict[int, tuple[Lane, dict[str, Tensor]]] = {}
        self._fill: dict[int, int] = {}
        self._lander: ThreadPoolExecutor | None = None
        self._landings: deque[Future[None]] = deque()

    def add(self, lane: Lane, acts: Mapping[str, Tensor], picked: np.ndarray) -> None:
        """Copy the rows into the lane's block, and send every full block on."""
        key, index, at = id(lane), torch.from_numpy(picked).to(self._shelf.device), 0
        if key not in self._stages:
            size = min(self._capacity, len(lane.rows))
            self._stages[key] = (lane, {s.name: acts[s.name].new_empty(size, s.width) for s in self._shelf.sites})
            self._fill[key] = 0
        while at < len(picked):
            fill = self._fill[key]
            count = min(self._capacity - fill, len(picked) - at)
            for name, stage_ND in self._stages[key][1].items():
                torch.index_select(acts[name], 0, index[at : at + count], out=stage_ND[fill : fill + count])
            self._fill[key] = fill + count
            at += count
            if self._fill[key] == self._capacity:
                self._send(key)

    def flush(self) -> None:
        for key in self._stages:
            if self._fill[key]:
                self._send(key)
        self._stages = {}

    def finish(self) -> None:
        try:
            while self._landings:
                self._landings.popleft().result()
        finally:
            self.close()

    def close(self) -> None:
        if self._lander is not None:
            self._lander.shutdown(wait=True, cancel_futures=True)

    def _send(self, key: int) -> None:
        """Encode a block, and land it: at once on a CPU, in a thread when it has to come from a device."""
        lane, stage = self._stages[key]
        rows = {name: x_ND[: self._fill[key]] for name, x_ND in stage.items()}
        block = _Block(lane, lane.done, {name: self._encode(name, x_ND) for name, x_ND in rows.items()})
        lane.done += self._fill[key]
        self._fill[key] = 0
        if self._shelf.device.type != "cuda":
            self._land(block)
            return
        on_host = block.to_host()
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._shelf.device))

        def land() -> None:
            copied.synchronize()
            self._land(on_host)

        if self._lander is None:
            self._lander = ThreadPoolExecutor(1, thread_name_prefix="thresher-land")
        self._landings.append(self._lander.submit(land))
        while len(self._landings) > _IN_FLIGHT:
            self._landings.popleft().result()

    def _encode(self, name: str, x_ND: Tensor) -> Encoded:
        x_ND = x_ND.to(torch.float32, copy=True)  # encoding overwrites
        with one_thread():
            if name in self._on_device:
                return encode_int8z(x_ND, self._on_device[name], self._inverse[name])
            return encode_bf16(x_ND)

    def _land(self, block: _Block) -> None:
        """Check a block on the host, scatter its rows to their stored places, and add its sums."""
        lane = block.lane
        for name, encoded in block.encoded.items():
            norm_N = encoded.norm.numpy().astype(np.float64)
            storable_N = np.isfinite(norm_N)
            if encoded.scale is not None:
                storable_N &= np.isfinite(encoded.scale.numpy())
            if not storable_N.all():
                self._shelf.refuse(name, lane, block.start + int(np.argmin(storable_N)))
            at = lane.at[block.start : block.start + len(norm_N)]
            codes = encoded.codes
            rows = codes.numpy() if encoded.scale is not None else codes.view(torch.int16).numpy().view(np.uint16)
            encode.scatter(rows, at, self._shelf.buffers[name], self._lines[name])
            if encoded.scale is not None:
                self._shelf.buffers[f"{name}.scale"][at] = encoded.scale.numpy()
            sums = lane.sums[name]
            sums.rows += len(norm_N)
            sums.values += encoded.sums.numpy()
            sums.norms += norm_N.sum(), np.square(norm_N).sum()
            sums.peak[0] = max(sums.peak[0], float(encoded.peak))
