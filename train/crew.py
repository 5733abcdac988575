"""Several small dictionaries at once on the cores of one machine.

The operations of a small dictionary last tens of microseconds: spread over cores they mostly wait for one another.
So on a CPU each small dictionary steps on one thread and several step side by side; a large one takes all threads for
itself, in turn. Which of the two applies is decided by the dictionary's own shape, never by the company it keeps:
sums in another order would give other last bits, and a dictionary must come out the same alone and in a sweep.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch

from thresher.train.fit import Fit

_SMALL = 1 << 30  # multiply-adds of one encoder's product, N · D · F


class Task(NamedTuple):
    """One dictionary's step."""

    fit: Fit
    run: Callable[[], torch.Tensor]
    """Does the step; returns the gradient's norm."""


class Crew:
    """Runs the steps of one batch; a context manager that owns the threads."""

    def __init__(self, device: torch.device) -> None:
        self.threads = torch.get_num_threads()
        self._parallel = device.type == "cpu"
        self._pool = ThreadPoolExecutor(self.threads, "thresher-fit", initializer=lambda: torch.set_num_threads(1))

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self.threads)  # the workers' setting is the default of threads to come

    def step(self, tasks: Sequence[Task]) -> "list[torch.Tensor | torch.OutOfMemoryError]":
        """Run all steps; results in the order of the tasks. Other errors than lack of memory are raised."""
        started: dict[int, Future[torch.Tensor]] = {}
        if self._parallel:
            small = [index for index, task in enumerate(tasks) if is_small(task.fit)]
            small.sort(key=lambda index: -cost(tasks[index].fit))  # the longest first, so that all end together
            started = {index: self._pool.submit(tasks[index].run) for index in small}
        done: dict[int, torch.Tensor | torch.OutOfMemoryError] = {}
        for index, future in started.items():
            done[index] = _outcome(future.result)
        for index, task in enumerate(tasks):
            if index not in started:
                done[index] = _outcome(task.run)
        return [done[index] for index in range(len(tasks))]


def is_small(fit: Fit) -> bool:
    """Whether a dictionary steps on one thread."""
    spec = fit.plan.spec
    return fit.plan.train.batch_rows * spec.d_in * spec.n_latents <= _SMALL


def cost(fit: Fit) -> int:
    """Rough multiply-adds of a step, to order steps by."""
    spec = fit.plan.spec
    return fit.plan.train.batch_rows * spec.d_in * spec.n_latents * len(spec.reads)


def _outcome(run: Callable[[], torch.Tensor]) -> "torch.Tensor | torch.OutOfMemoryError":
    try:
        return run()
    except torch.OutOfMemoryError as error:
        return error
