"""Large tensors of forward passes straight from the kernel and straight back.

glibc keeps freed blocks of up to 32 MB in a heap per thread. Here one thread makes activations and another frees them,
so such heaps grow to several times what is in use, by an amount that nobody can predict. With a fixed threshold every
large tensor is mapped and unmapped by itself. The page faults are not free: 7 to 11 % more CPU time for the bundled
model (two runs of each), whose MLP has tensors of 8 MB. Without it, a model of two layers in GPT-2 small's shape took
1.5 GB of memory where the estimate says 0.8.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_LARGE, _USUAL = 4 << 20, 32 << 20  # the usual one is where glibc's own, moving threshold ends


@contextmanager
def returned_to_the_kernel() -> Iterator[None]:
    """Within the block, tensors of 4 MiB or more go back when they are freed. Does nothing without glibc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)
