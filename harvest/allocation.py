"""Where tensors of forward passes come from: small ones from heaps that stay, large ones straight from the kernel.

Left alone, glibc maps what is larger than a threshold that moves, trims its heaps and so has the kernel zero the same
pages again and again: a pass of the bundled model spends a quarter of its time on that. Heaps that stay cost memory
that no formula foresees (several times what is in use at a time), so they are for the blocks that need them and are
measured before a harvest (timing.py). A tensor above the threshold belongs to a model so wide that it computes far
longer on a page than the kernel zeroes it; it is mapped and unmapped by itself, and takes its own size, no more.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
LARGE = 2 << 20
"""Bytes: 256 numbers in fp32 for each of the 2,048 tokens of a pass on a CPU."""
_NEVER, _USUAL = 1 << 30, 32 << 20  # the usual one is where glibc's own, moving threshold ends


@contextmanager
def heaps_that_stay() -> Iterator[None]:
    """Within the block, freed tensors of less than `LARGE` bytes wait for the next; all go back at its end.

    Does nothing without glibc, whose thresholds do not move any more afterwards.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, LARGE)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)
        libc.malloc_trim(0)
