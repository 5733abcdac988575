"""Ctrl-C and SIGTERM as a flag that a loop reads between two steps, so that it can save first."""

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Interrupted(Exception):  # noqa: N818 - it is no error: the work was saved
    """The user asked to stop and the stage stopped whole; the text says how to go on."""


@dataclass
class StopFlag:
    """Set by the first signal; read by the loop."""

    requested: bool = False


@contextmanager
def deferred_interrupts() -> Iterator[StopFlag]:
    """Within the block the first SIGINT or SIGTERM sets the flag; a second one raises KeyboardInterrupt at once.

    Outside the main thread signals cannot be caught: the flag then stays False.
    """
    flag = StopFlag()

    def handle(number: int, frame: types.FrameType | None) -> None:
        if flag.requested:
            raise KeyboardInterrupt
        flag.requested = True

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
