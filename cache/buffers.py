"""Memory for shards that is used again.

Memory fresh from the kernel costs a page fault every 4 kB, which for a shard is as much as writing it. So the buffers
of a shard that was published serve the one after next: two shards are alive at a time, one being filled and one on its
way to the disk. They begin on a page, as unbuffered writing needs it, and ask for large pages, since rows go to random
places.
"""

import mmap
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
_LARGE = 2 << 20


class Buffers:
    """Page-aligned arrays, lent and taken back. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[np.ndarray] = []
        self._lent: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array whose content is whatever was there before."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with self._lock:
            fitting = [i for i, memory in enumerate(self._free) if len(memory) >= size]
            best = min(fitting, key=lambda i: len(self._free[i]), default=None)
            memory = _pages(size) if best is None else self._free.pop(best)
            self._lent[memory.ctypes.data] = memory
        return memory[:size].view(dtype).reshape(shape)

    def give(self, arrays: Iterable[np.ndarray]) -> None:
        """Take arrays back that nobody looks at any more; those that did not come from here are left alone."""
        with self._lock:
            for array in arrays:
                memory = self._lent.get(array.ctypes.data)
                if memory is not None and array.base is memory:
                    del self._lent[array.ctypes.data]
                    self._free.append(memory)


def _pages(size: int) -> np.ndarray:
    """Whole pages of zeros, at least `size` bytes."""
    if size < _LARGE:
        mapped = mmap.mmap(-1, -(-max(size, 1) // PAGE) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(mapped, np.uint8)
    whole = -(-size // PAGE) * PAGE
    mapped = mmap.mmap(-1, whole + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    skipped = -np.frombuffer(mapped, np.uint8).ctypes.data % _LARGE
    return np.frombuffer(mapped, np.uint8, whole, skipped)
