"""Several small dictionaries at once on the cores of one machine.

The operations of a small dictionary last tens of microseconds: spread over cores they mostly wait for one another.
So on a CPU each small dictionary steps on one thread and several step side by side; a large one takes all threads for
itself, in turn. Which of the two applies is decided by the dictionary's own shape, never by the company it keeps:
sums in another order would give other last bits, and a dictionary must come out the same alone and in a sweep.

Left out: one grouped product for dictionaries of the same shape. For eight of N × D × F = 2048 × 128 × 1024 on two
threads, one product with all their rows and a pass over each block took 1.4 times the CPU time of the products one by
one (64 MB of pre-activations leave the caches before they are looked at, 8 MB per thread do not), a batched product
1.0 times; each product alone is large enough to keep a core busy. On CUDA, where launches of small products may cost
more than they do, it was not measured.
"""

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch

from thresher.train.dictionary.spec import DictionarySpec

_SMALL = 1 << 30  # multiply-adds of one encoder's product, N · D · F, or of a larger one that a topology has


class Task(NamedTuple):
    """One dictionary's share of the work on a batch."""

    spec: DictionarySpec
    rows: int
    """Nominal rows of the batch, or of a part of it."""
    run: Callable[[], object]
    """Does the work."""

    @property
    def small(self) -> bool:
        """Whether it runs on one thread."""
        return self.rows * self.spec.row_work <= _SMALL

    @property
    def cost(self) -> int:
        """Rough multiply-adds, to order tasks by."""
        return self.rows * self.spec.row_work * len(self.spec.reads)


class Crew:
    """Does the tasks of one batch; a context manager that owns the threads."""

    def __init__(self, device: torch.device, in_turn: bool = False) -> None:
        """`in_turn`: one task after the other, each on as many threads as ever: what several ranks do together must
        come in the same order on all of them."""
        self.in_turn = in_turn
        self.threads = torch.get_num_threads()
        self._parallel = device.type == "cpu"
        self._pool = ThreadPoolExecutor(self.threads, "thresher-fit", initializer=keep_to_one_thread)
        if self._parallel:
            _keep_freed_memory()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self.threads)  # the workers' setting is the default of threads to come

    def run(self, tasks: Sequence[Task]) -> list[object]:
        """Results in the order of the tasks; an error of any of them is raised."""
        apart = [index for index, task in enumerate(tasks) if self._parallel and task.small]
        # With nothing large to do, the caller's own operations (decoding the next batch) must not wake a team of
        # threads either: it would spin for a while afterwards, on the cores that the workers need.
        torch.set_num_threads(1 if len(apart) == len(tasks) else self.threads)
        if self.in_turn:
            return [self._pool.submit(t.run).result() if i in apart else t.run() for i, t in enumerate(tasks)]
        apart.sort(key=lambda index: -tasks[index].cost)  # the longest first, so that all end together
        started = {index: self._pool.submit(tasks[index].run) for index in apart}
        done = {index: future.result() for index, future in started.items()}
        for index, task in enumerate(tasks):
            if index not in started:
                done[index] = task.run()
        return [done[index] for index in range(len(tasks))]


def _keep_freed_memory() -> None:
    """Tell glibc not to hand freed blocks back to the system; elsewhere nothing happens.

    Every step frees and takes again megabytes of temporaries. Returned and mapped anew, their page faults cost an
    eighth of the time of small dictionaries.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Hand what is free to the system all the same; elsewhere than under glibc nothing happens.

    For after things that are done once and are large, such as the drawing of weights: later blocks of other sizes would
    not fit into what they have left, and it would count against the peak to the end.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_to_one_thread() -> None:
    """Let this thread's operators run in it alone.

    PyTorch gives a new thread the setting of the moment when it is first asked, so it is asked before it is told.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)
