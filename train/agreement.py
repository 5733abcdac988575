"""What ranks that share a dictionary have to know of one another in every step.

Whoever shares a dictionary takes part in every exchange or in none, so whatever decides how a run goes on is decided by
all alike: a stop that one of them was asked for, memory that one of them lacked, updates that drift apart. Each adds
its own flags to a sum that the step makes anyway (`say`), and all read the same totals (`hear`): at once on a CPU, on a
device `Lagged.LAG` steps later, where nobody waits for them.
"""

import torch
from torch import Tensor

from thresher.cache.interrupts import StopFlag
from thresher.train.kernels.padded import Lagged
from thresher.train.mesh import Group

STOP, MEMORY = range(2)
"""Places of the flags in what `say` gives."""
FLAGS = 2
"""How many there are."""


class Agreement:
    """One dictionary's."""

    def __init__(self, everyone: Group, stop: StopFlag | None = None) -> None:
        """`everyone`: the ranks that share it; `stop`: set where this rank is asked to stop."""
        self.everyone, self._flag = everyone, stop or StopFlag()
        self._told = Lagged()
        self.stop = False
        """Whether some rank was asked to stop, as all know by now."""
        self.short: bool = False
        """Whether some rank lacked memory in a step, as all know by now."""

    def say(self, short: bool = False) -> list[float]:
        """[FLAGS] this rank's part of a sum over all; `short`: whether it lacked memory."""
        return [float(self._flag.requested), float(short)]

    def hear(self, totals: Tensor, now: bool = False) -> None:
        """Take note of the sums [FLAGS]; `now`: of all that were told, which on a device is waited for."""
        if self.everyone.alone:
            return
        bits = 2 ** torch.arange(FLAGS, device=totals.device)
        self._told.put(((totals > 0) * bits).sum(), 0)
        now = now or totals.device.type == "cpu"
        for code in [int(code) for code in self._told.listed()[::2]] if now else self._oldest():
            self.stop |= bool(code >> STOP & 1)
            self.short |= bool(code >> MEMORY & 1)
        if now:
            self._told.clear()

    def _oldest(self) -> list[int]:
        old = self._told.take()
        return [] if old is None else [old[0]]


def short_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out; on a CPU torch has no exception of its own for that."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)
