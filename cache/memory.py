"""How much memory this process may still take."""

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


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
