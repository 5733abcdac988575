"""How this process takes memory, and how much it may still take."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def ask_for_huge_pages() -> None:
    """Have PyTorch ask the kernel for huge pages (2 MiB) behind its tensors on the CPU that are as large as one.

    The kernel then zeroes and maps 512 pages at a time. It counts from the first tensor of a process, so it is said
    before that; whoever set THP_MEM_ALLOC_ENABLE decides.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def available_memory() -> int:
    """Bytes of host memory that can be taken without swapping, within the limit of a container."""
    available = 1 << 62
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            available = 1024 * int(line.split()[1])
    limit, used = (_lines(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdigit():
        files = sum(int(line.split()[1]) for line in _lines(_CGROUP / "memory.stat") if line.startswith("file "))
        available = min(available, int(limit[0]) - int(used[0]) + files)
    return max(available, 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
