"""Tensors of forward passes straight from the kernel and straight back.

glibc keeps freed blocks of up to 32 MB in a heap for every thread. Such heaps grow beyond what is in use, by an amount
that no formula here foresees: two layers in GPT-2 small's shape took 842 MB where 503 do. With a fixed threshold
every tensor of a pass is mapped and unmapped by itself, except small ones. The price is page faults: a quarter of the
speed of the bundled model's harvest (benchmarks/RESULTS.md), and 3 to 13 % of the passes of GPT-2 small's shape. The
heaps with what is smaller are not trimmed: that would cost another 12 % and save next to nothing.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_LARGE, _USUAL = 1 << 19, 32 << 20  # the usual one is where glibc's own, moving threshold ends


@contextmanager
def returned_to_the_kernel() -> Iterator[None]:
    """Within the block, tensors of 512 KiB or more go back when they are freed. Does nothing without glibc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGE)
    libc.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL)
