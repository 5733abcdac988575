"""Whether a thread gets on with its work, as others see it: how long it has stood still, and where.

A loop reads its stop flag between two steps; every reading is a sign of life. Between two of them a thread may stand
still for `stall_s` before it counts as hung. It may for `phase_s` in a phase that was declared to be long, before its
first sign, outside of any loop, and where it waits in a collective: there it is some other rank that does not come.
"""

import faulthandler
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from thresher.cache.errors import UserError
from thresher.cache.interrupts import StopFlag

STALL_VARIABLE = "THRESHER_STALL_SECONDS"
_STALL_SECONDS = 600.0
"""No step, no batch of an evaluation and no forward pass takes ten minutes."""
_PHASE_SECONDS = 3600.0
_WORTH_A_LOOK_SECONDS = 10.0
_OURS = str(Path(__file__).parent.parent) + os.sep
_WAITING = (os.sep + "threading.py", os.sep.join(("", "torch", "autograd", "graph.py")))
"""Where a thread is that waits for another of its process."""
_COLLECTIVES = os.sep.join(("", "torch", "distributed", ""))


class Bounds(NamedTuple):
    """For how long a thread may stand still, in seconds."""

    stall_s: float = _STALL_SECONDS
    phase_s: float = _PHASE_SECONDS


class Still(NamedTuple):
    """A thread that stands still."""

    seconds: float
    """Since its last sign of life."""
    where: str
    """`in _step (train/feed.py:145)`, and in which phase."""
    waits: bool
    """Whether it is in a collective, where it waits for others."""
    over: bool
    """Whether that is longer than it may."""

    @classmethod
    def read(cls, values: list[object]) -> Self:
        """From JSON."""
        seconds, where, waits, over = values
        return cls(float(str(seconds)), str(where), bool(waits), bool(over))


def bounds_from_environment() -> Bounds:
    """`Bounds` with THRESHER_STALL_SECONDS in place of `stall_s`, if it is set. Raises UserError for no number."""
    told = os.environ.get(STALL_VARIABLE)
    if not told:
        return Bounds()
    try:
        seconds = float(told)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(
            f"The environment variable {STALL_VARIABLE} is {told!r}; expected a number of seconds above 0, after which "
            "a process that makes no progress counts as hung. Unset it for ten minutes."
        )
    return Bounds(seconds, max(seconds, _PHASE_SECONDS))


class Progress:
    """The progress of the thread that made it, looked at from another."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds, self._thread = bounds, threading.get_ident()
        self._flag, self._before = StopFlag(), 0  # signs of earlier flags
        self._phases: list[str] = ["before or after its work"]
        self._seen, self._still_s, self._looked = 0, 0.0, time.monotonic()

    def follow(self, flag: StopFlag) -> None:
        """Let readings of this flag be the signs from now on; until it is read, the thread is in no loop."""
        self._before += self._flag.reads
        self._flag = flag

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within the block the thread may stand still for `phase_s`; `name` says in messages what it did."""
        self._before += 1
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.remove(name)
            self._before += 1

    def look(self, at_most_s: float) -> Still:
        """How it stands; to be called regularly, by one thread.

        Of the time since the last call `at_most_s` count: if more has passed, the whole process was stopped meanwhile.
        """
        now = time.monotonic()
        signs, passed = self._before + self._flag.reads, min(now - self._looked, at_most_s)
        self._looked, self._still_s = now, 0.0 if signs != self._seen else self._still_s + passed
        self._seen = signs
        if self._still_s <= min(self._bounds.stall_s, _WORTH_A_LOOK_SECONDS) / 2:
            return Still(self._still_s, "at work", False, False)
        phases = self._phases[1:] if self._flag.reads else self._phases
        where, waits = _place(self._thread)
        where += f", {phases[-1]}" if phases else ""
        bound = self._bounds.phase_s if phases or waits else self._bounds.stall_s
        return Still(self._still_s, where, waits, self._still_s > bound)


def _place(thread: int) -> tuple[str, bool]:
    """Where a thread is, by the innermost call that is ours, and whether it waits for other ranks.

    It does in a collective, and where it waits for another thread of ours, or of autograd's, that is in one.
    """
    calls = _calls_by_thread()
    if not calls.get(thread):
        return "at its end", False
    where, waits = _innermost(calls[thread])
    if not waits and calls[thread][0].file.endswith(_WAITING):
        waits = any(_innermost(other)[1] for which, other in calls.items() if which != thread and other)
    return where, waits


class _Call(NamedTuple):
    file: str
    line: str
    name: str


def _calls_by_thread() -> dict[int, list[_Call]]:
    """The calls that every thread is in, the innermost first.

    From faulthandler, which takes no lock: `sys._current_frames` takes the interpreter's, and what is to find a
    process that hangs must not be able to hang it.
    """
    with tempfile.TemporaryFile() as told:
        faulthandler.dump_traceback(told, all_threads=True)
        told.seek(0)
        lines = told.read().decode(errors="replace").splitlines()
    found: dict[int, list[_Call]] = {}
    calls: list[_Call] = []
    for line in lines:
        if head := re.match(r"(?:Current t|T)hread (0x[0-9a-f]+)", line):
            calls = found.setdefault(int(head[1], 16), [])
        elif call := re.match(r'  File "(.*)", line (\S+) in (.*)', line):
            calls.append(_Call(*call.groups()))
    return found


def _innermost(calls: Sequence[_Call]) -> tuple[str, bool]:
    """The innermost call of ours, else of anybody, and whether it is in a collective."""
    waits = False
    for file, line, name in calls:
        if file.startswith(_OURS) and "site-packages" not in file.removeprefix(_OURS):
            return f"in {name} ({file.removeprefix(_OURS)}:{line})", waits
        waits |= _COLLECTIVES in file
    return f"in {calls[0].name} ({Path(calls[0].file).name}:{calls[0].line})", waits
