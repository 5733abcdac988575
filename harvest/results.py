"""Memory for what passes give, used again.

A recorded tensor is copied once, into pages that stay, and the model's own goes back at once, in the thread that made
it. So what a pass needs does not hang on what was recorded before, and results take the same room from first to last.
The copy costs about a percent of a pass.
"""

import queue

import numpy as np
import torch
from torch import Tensor

from thresher.cache.buffers import Buffers
from thresher.harvest.sites import Point


class Room:
    """Memory for the results of one pass, by point, as large as the largest so far."""

    def __init__(self) -> None:
        self._pages: dict[Point, np.ndarray] = {}

    def keep(self, point: Point, x: Tensor) -> Tensor:
        """A copy of `x`, good until the room is used again."""
        size = x.numel() * x.itemsize
        if point not in self._pages or len(self._pages[point]) < size:
            self._pages[point] = Buffers().take((size,), np.dtype(np.uint8))
        return torch.from_numpy(self._pages[point][:size]).view(x.dtype).view(x.shape).copy_(x)


class Results(dict[str, Tensor]):
    """The activations of one pass [B, T, width] by site, and the room that they lie in, if it is ours."""

    room: Room | None = None


class Rooms:
    """Rooms that are free. One that is never given back is simply replaced by another."""

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[Room] = queue.SimpleQueue()

    def take(self) -> Room:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return Room()

    def give(self, results: Results) -> None:
        """The next pass may overwrite these results."""
        if results.room is not None:
            self._free.put(results.room)
            results.room = None
