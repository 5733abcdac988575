"""Ranks that share dictionaries as threads of the test's process: a `Group` that meets in memory.

What it exchanges is what processes would: sums in the order of ranks, which come out the same on all.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from thresher.train.mesh import Group, Mesh

_SECONDS = 60.0


class Meeting:
    """Where the ranks of one group exchange."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._news = threading.Condition()
        self._rounds: dict[int, dict[int, Tensor]] = {}
        self._counts = [0] * size
        self._left = False

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """What all ranks bring in the same round, once all have."""
        with self._news:
            number = self._counts[rank]
            self._counts[rank] += 1
            brought = self._rounds.setdefault(number, {})
            brought[rank] = tensor.clone()
            self._news.notify_all()
            self._news.wait_for(lambda: len(brought) == self.size or self._left, _SECONDS)
            if len(brought) < self.size:
                raise RuntimeError("gloo: a thread has left")
            self._rounds.pop(number - 1, None)  # all have what they wanted of it
        found = [brought[other] for other in range(self.size)]
        assert len({(one.shape, one.dtype) for one in found}) == 1, f"ranks exchange unlike tensors: {found}"
        return found

    def leave(self) -> None:
        """A rank ends: the others shall not wait for it."""
        with self._news:
            self._left = True
            self._news.notify_all()


class ThreadGroup(Group):
    """One rank's end of a `Meeting`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(rank, meeting.size)
        self.meeting = meeting
        self.sizes: list[int] = []
        """Of each exchange, how many numbers this rank has brought."""

    def _sum(self, tensor: Tensor) -> None:
        self.sizes.append(tensor.numel())
        tensor.copy_(torch.stack(self.meeting.exchange(self.index, tensor)).sum(0))

    def _gather(self, tensor: Tensor) -> Tensor:
        self.sizes.append(tensor.numel())
        return torch.stack(self.meeting.exchange(self.index, tensor))


def data_meshes(size: int) -> list[Mesh]:
    """Of each of the ranks that share the rows of all batches, one cell."""
    if size == 1:
        return [Mesh()]
    rows, cell = Meeting(size), Meeting(size)
    return [Mesh(data=ThreadGroup(rows, rank), everyone=ThreadGroup(cell, rank)) for rank in range(size)]


def latent_meshes(size: int, data: int = 1) -> list[Mesh]:
    """Of each of the ranks that share the latents, and with `data` the rows of all batches too, one cell."""
    rows = [Meeting(size) for _ in range(data)]
    columns = [Meeting(data) for _ in range(size)]
    cell = Meeting(data * size)
    return [
        Mesh(
            data=ThreadGroup(columns[column], row) if data > 1 else Group(),
            latents=ThreadGroup(rows[row], column),
            everyone=ThreadGroup(cell, row * size + column),
        )
        for row in range(data)
        for column in range(size)
    ]


def side_by_side(work: Callable[[Mesh], Any], meshes: list[Mesh]) -> list[Any]:
    """What `work` returns on each; an error of one is raised, and ends the waiting of all."""

    def one(mesh: Mesh) -> Any:
        try:
            return work(mesh)
        except BaseException:
            for group in (mesh.data, mesh.latents, mesh.everyone):
                if isinstance(group, ThreadGroup):
                    group.meeting.leave()
            raise

    with ThreadPoolExecutor(len(meshes)) as pool:
        futures = [pool.submit(one, mesh) for mesh in meshes]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: "a thread has left" in str(error)):
            raise error
        return [future.result() for future in futures]
