"""What a process asks of the libraries below it, before it loads them. Whoever set a variable decides."""

import os

_WANTED = {
    # PyTorch asks for huge pages (2 MiB) behind its tensors on the CPU that are as large as one: the kernel then zeroes
    # and maps 512 pages at a time.
    "THP_MEM_ALLOC_ENABLE": "1",
    # A thread of OpenMP that has nothing to do keeps its core busy for so many looks at its lock, 300,000 if nobody
    # says otherwise: several milliseconds, in which the threads of our own loops find no core (cache/kernels/cpu_pool).
    "GOMP_SPINCOUNT": "10000",
}


def prepare_process() -> bool:
    """Set what is not set yet; whether anything was. OpenMP reads it when torch is imported, PyTorch a little later."""
    missing = {name: value for name, value in _WANTED.items() if name not in os.environ}
    if "OMP_WAIT_POLICY" in os.environ:  # which sets the other, unless that is there too
        missing.pop("GOMP_SPINCOUNT", None)
    os.environ.update(missing)
    return bool(missing)
