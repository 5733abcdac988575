"""Memory of this process as the kernel counts it. Pages of files are left out: weights that are mapped are the model's.

Linux only; elsewhere nothing is known and every answer is None.
"""

from pathlib import Path
from typing import NamedTuple

_SELF = Path("/proc/self")


class Resident(NamedTuple):
    """Bytes in memory."""

    total: int
    peak: int
    """Of the total, since the process or `forget_peak`."""
    files: int

    @property
    def own(self) -> int:
        return self.total - self.files


def resident() -> Resident | None:
    """What is in memory now."""
    try:
        lines = (line.split() for line in (_SELF / "status").read_text().splitlines())
        found = {line[0]: 1024 * int(line[1]) for line in lines if line[0] in ("VmRSS:", "VmHWM:", "RssFile:")}
        return Resident(found["VmRSS:"], found["VmHWM:"], found["RssFile:"])
    except (OSError, KeyError):
        return None


def forget_peak() -> bool:
    """Let the peak begin anew; false where the kernel does not let us, and it may be that of something earlier."""
    try:
        (_SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return True
