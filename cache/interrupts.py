"""Ctrl-C and SIGTERM as a flag that a loop reads between two steps, so that it can save first."""

import signal
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):  # noqa: N818 - it is no error: the work was saved
    """The user asked to stop and the stage stopped whole; the text says how to go on."""


class StopFlag:
    """Set by the first signal; read by the loop between two steps.

    So reading it is also how a loop shows that it gets on: where several ranks work together, one whose loop has
    stopped reading is found out (progress.py).
    """

    def __init__(self, requested: bool = False) -> None:
        self.raised = requested
        """Whether it is set; asking this counts as no progress, which suits a loop that waits for something."""
        self.reads = 0
        """How often `requested` was read."""

    @property
    def requested(self) -> bool:
        """Whether to save and end."""
        self.reads += 1
        return self.raised

    @requested.setter
    def requested(self, value: bool) -> None:
        self.raised = value


ECHO_SECONDS = 2.0
"""Ctrl-C reaches every process of a terminal, and torchrun, being one of them, passes it on to its own."""


@contextmanager
def deferred_interrupts(echo_s: float = 0.0) -> Iterator[StopFlag]:
    """Within the block the first SIGINT or SIGTERM sets the flag; a second one raises KeyboardInterrupt at once.

    One that follows the first within `echo_s` is taken for its echo. Outside the main thread signals cannot be caught:
    the flag then stays False.
    """
    flag, first = StopFlag(), 0.0

    def handle(number: int, frame: types.FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first and now - first >= echo_s:
            raise KeyboardInterrupt
        flag.requested, first = True, first or now

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield flag
        return
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
