"""Rows that lie in a CPU's memory, encoded where they lie by the kernels of `cache/kernels/encode.py`."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from thresher.cache.kernels import encode
from thresher.cache.kernels.lines import whole_lines
from thresher.cache.lane import Lane, Shelf
from thresher.cache.stats import Sums


class HostEncoder:
    """Takes rows one by one, in the thread that adds them; nothing is copied or waits."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._units = {name: (c.mean.numpy(), c.inverse.numpy()) for name, c in shelf.calibrations.items()}
        self._lines = {name: whole_lines(array) for name, array in shelf.buffers.items()}

    def add(self, lane: Lane, acts: Mapping[str, Tensor], picked: np.ndarray) -> None:
        at = lane.at[lane.done : lane.done + len(picked)]
        for name, sums in lane.sums.items():
            bad = self._store(name, host_rows(acts[name]), picked, at, sums)
            if bad >= 0:
                self._shelf.refuse(name, lane, lane.done + bad)
            sums.rows += len(picked)
        lane.done += len(picked)

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _store(self, name: str, x_RD: np.ndarray, picked: np.ndarray, at: np.ndarray, sums: Sums) -> int:
        """Encode rows of one site; the index of the first that cannot be stored, or -1."""
        out, lines, added = self._shelf.buffers[name], self._lines[name], (sums.values, sums.norms)
        if name in self._units:
            scales = self._shelf.buffers[f"{name}.scale"].view(np.uint16)
            return int(encode.store_int8z(x_RD, picked, at, *self._units[name], out, scales, lines, *added, sums.peak))
        store = encode.copy_bf16 if x_RD.dtype == np.uint16 else encode.round_bf16
        return int(store(x_RD, picked, at, out, lines, *added))


def host_rows(x: Tensor) -> np.ndarray:
    """Activations [R, D] on the CPU as the kernels take them: float32, or bit patterns of bfloat16 (uint16)."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(np.uint16)
    return x.to(torch.float32).contiguous().numpy()
