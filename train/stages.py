"""The stages of a training step by name: marks for a profiler, and the time each takes.

Code says `with stage("encode"):` around what it does; the names are listed in `STAGES`. As long as nobody watches, the
mark is an object that does nothing. A profiler that is on (train/profile.py) sees the mark as a labelled span; a clock
that is running adds up its seconds.

Seconds are the host's on a CPU. On CUDA the host only queues work, so every mark also leaves two events in the stream,
which are read once they have passed: nothing ever waits for the device.

Marks of several threads run at the same time (train/crew.py), so one clock may count more seconds than have passed.
"""

import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import NamedTuple

import torch

STAGES = {
    "read": "waiting for the rows of the next batch",
    "transfer": "rows into the space that dictionaries train in",
    "task": "one dictionary's step, all of the stages below together",
    "encode": "the encoder's matrix product",
    "select": "choosing the latents that fire",
    "decode": "reconstructions from the codes",
    "target": "passes of the language model, forward and, where it is cut off from the dictionaries, backward",
    "loss": "losses, with AuxK",
    "auxk": "AuxK alone",
    "backward": "gradients",
    "update": "clipping, optimiser, renormalisation",
}
"""Every name that is used, and what it stands for."""


class Seconds(NamedTuple):
    """Time by stage."""

    host: dict[str, float]
    """Between entering and leaving, on the host."""
    device: dict[str, float]
    """The same in the device's own time; on a CPU equal to `host`."""


class Clock:
    """Adds up the seconds of every stage while it is watching; any thread may add."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self._cuda = device if device.type == "cuda" else None
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        with self._lock:
            self._began = self.now()
            self._host: dict[str, float] = defaultdict(float)
            self._device: dict[str, float] = defaultdict(float)
            self._open: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self.now() - self._began

    def mark(self) -> "torch.cuda.Event | None":
        """An event at this point of the stream; None on a CPU."""
        if self._cuda is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._cuda))
        return event

    def add(self, name: str, seconds: float, first: "torch.cuda.Event | None" = None) -> None:
        """One stage has ended that began at the mark `first`."""
        last = self.mark() if first is not None else None
        with self._lock:
            self._host[name] += seconds
            if first is not None and last is not None:
                self._open.append((name, first, last))
                self._collect()

    def seconds(self) -> Seconds:
        """Time by stage so far; of a device's time what it has already reached."""
        with self._lock:
            self._collect()
            host = dict(self._host)
            return Seconds(host, dict(self._device) if self._cuda is not None else host)

    def _collect(self) -> None:
        """Read the events that have passed."""
        while self._open and self._open[0][2].query():
            name, first, last = self._open.popleft()
            self._device[name] += first.elapsed_time(last) / 1e3


class _Watch:
    """Who looks at the marks of this process."""

    def __init__(self) -> None:
        self.clock: Clock | None = None
        self.tracing = False


_WATCH = _Watch()
_UNWATCHED = contextlib.nullcontext()


class _Stage:
    """A mark that somebody watches."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock = _WATCH.clock
        self.span = torch.profiler.record_function(name) if _WATCH.tracing else None

    def __enter__(self) -> None:
        if self.span is not None:
            self.span.__enter__()
        if self.clock is not None:
            self.first, self.began = self.clock.mark(), self.clock.now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.clock is not None:
            self.clock.add(self.name, self.clock.now() - self.began, self.first)
        if self.span is not None:
            self.span.__exit__(kind, error, trace)


def stage(name: str) -> AbstractContextManager[None]:
    """Mark what happens inside as one of `STAGES`."""
    assert name in STAGES, f"stage {name!r} is not listed"
    if _WATCH.clock is None and not _WATCH.tracing:
        return _UNWATCHED
    return _Stage(name)


@contextlib.contextmanager
def timed_by(clock: Clock) -> Iterator[None]:
    """Let a clock watch; one at a time."""
    _WATCH.clock = clock
    try:
        yield
    finally:
        _WATCH.clock = None


def unwatch(clock: Clock) -> None:
    """End a clock's watch before its block does; nothing happens when it watches no more."""
    if _WATCH.clock is clock:
        _WATCH.clock = None


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Let the profiler see the marks."""
    _WATCH.tracing = True
    try:
        yield
    finally:
        _WATCH.tracing = False
