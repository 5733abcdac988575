"""How an object store is read from this machine: settings of the machine, hence of its environment, not of a recipe."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from thresher.cache.errors import UserError
from thresher.cache.memory import available_memory

_MEMORY_SHARE = 0.125


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How chunks of a cache in an object store get here, and which of them stay."""

    read_ahead_mb: float = 64.0
    """Chunks that are on their way or wait for their use, in MB: as many whole groups as that is, at least one."""
    keep_gb: float = 1.0
    """Bound on the chunks that stay here for later epochs; in memory an eighth of what is available. 0: none."""
    keep_in: Path | None = None
    """Directory for them, which several processes may share; None: memory."""

    def __post_init__(self) -> None:
        for name, value in (("READ_AHEAD_MB", self.read_ahead_mb), ("KEEP_GB", self.keep_gb)):
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"THRESHER_{name} is {value}; expected a number that is not negative.")

    @classmethod
    def from_environment(cls) -> "Reading":
        """The settings in $THRESHER_READ_AHEAD_MB, $THRESHER_KEEP_GB and $THRESHER_KEEP_IN."""
        usual, folder = cls(), os.environ.get("THRESHER_KEEP_IN")
        return cls(
            read_ahead_mb=_number("THRESHER_READ_AHEAD_MB", usual.read_ahead_mb),
            keep_gb=_number("THRESHER_KEEP_GB", usual.keep_gb),
            keep_in=Path(folder) if folder else None,
        )

    @property
    def read_ahead_bytes(self) -> int:
        return int(self.read_ahead_mb * 1e6)

    @property
    def keep_bytes(self) -> int:
        """Of chunks that stay."""
        wanted = int(self.keep_gb * 1e9)
        return wanted if self.keep_in is not None else min(wanted, int(_MEMORY_SHARE * available_memory()))


def _number(name: str, usual: float) -> float:
    text = os.environ.get(name)
    if text is None:
        return usual
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}; expected a number, as {usual:g}.") from None
