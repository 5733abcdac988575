"""The ranks of one job keep track of one another: who is at work, who has ended, who has fallen silent.

Every rank counts up a number of its own in a store of torch.distributed once a second, from a thread. Rank 0 watches
the others, they watch rank 0. What goes wrong with one of them (an error, a stop, silence) becomes the job's `fault`:
every rank's stop flag is set, so that each saves what it has at its next step and ends. torchrun ends the others of a
host by itself when one dies; this also holds between hosts, and for ranks that were started without it.

Nobody waits without a bound: a rank that is silent for a minute, or does not appear within ten, is given up. A rank
whose main thread hangs while its other threads live is not noticed.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from thresher.cache.errors import UserError
from thresher.cache.interrupts import ECHO_SECONDS, Interrupted, StopFlag, deferred_interrupts
from thresher.cache.world import World, from_environment

if TYPE_CHECKING:
    from torch.distributed import Store

_BEAT_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
_ARRIVAL_SECONDS = 600.0
"""A rank may be loading a model while others are at work."""
_POLL_SECONDS = 0.05
_DONE = "done"


class Roster:
    """What one rank knows of the others; a context manager, whose end tells them how it ended.

    Alone it does nothing. A fault of another rank comes out of the block as UserError on the rank that speaks and as
    Interrupted, which is silent there, on the others.
    """

    def __init__(
        self,
        world: World | None = None,
        store: "Store | None" = None,
        *,
        beat_s: float = _BEAT_SECONDS,
        patience_s: float = _PATIENCE_SECONDS,
        arrival_s: float = _ARRIVAL_SECONDS,
        again: str = "The same command goes on from there.",
    ) -> None:
        """`store`: the one that all ranks share, with nothing in it; needed unless `world` is of one process.

        `again`: how the user goes on with a job that was stopped.
        """
        self.world = world or World()
        self.fault: str | None = None
        """Why the job cannot go on, in a sentence; None as long as it can."""
        assert store is not None or self.world.alone, "several ranks need a store"
        self._store, self._beat_s, self._patience_s, self._arrival_s = store, beat_s, patience_s, arrival_s
        self._again, self._stop = again, StopFlag()
        self._unsaid = False  # whether rank 0 knows of the fault, and so says it
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        now = time.monotonic()
        watched = range(1, self.world.size) if self.world.speaks else range(1)
        self._heard: dict[int, tuple[int, float]] = dict.fromkeys(watched, (0, now))
        """By rank that is watched and has not ended: its last count, and when that was new."""

    def __enter__(self) -> Self:
        if self._store is not None:
            now = time.monotonic()
            self._heard = dict.fromkeys(self._heard, (0, now))
            self._thread = threading.Thread(target=self._keep_watch, name="thresher-roster", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None or self._store is None:
            return
        self._over.set()
        self._thread.join(timeout=2 * self._beat_s)
        with suppress(RuntimeError):  # where the store is gone, so is whoever might have read this
            self._store.set(f"ended/{self.world.rank}", _DONE if error is None else _said(error))
        if isinstance(error, Interrupted) and self.fault is not None and (self.world.speaks or self._unsaid):
            raise UserError(f"{self.fault} {error}") from error

    @property
    def stopping(self) -> bool:
        """Whether this rank is to save and end."""
        return self._stop.requested

    @contextmanager
    def interrupts(self) -> Iterator[StopFlag]:
        """`deferred_interrupts`, whose flag a fault sets too, and which ends whatever waits here."""
        with deferred_interrupts(0.0 if self.world.alone else ECHO_SECONDS) as stop:
            stop.requested = self._stop.requested
            self._stop = stop
            stop.requested |= self.fault is not None  # one that came between the two lines
            yield stop

    def meeting_place(self, name: str) -> "Store":
        """A part of the job's store, for process groups of the same ranks."""
        from torch.distributed import PrefixStore

        assert self._store is not None, "a rank alone meets nobody"
        return PrefixStore(name, self._store)

    def tell(self, name: str, text: str) -> None:
        """From rank 0 to all others."""
        if self._store is not None:
            self._store.set(f"told/{name}", text)

    def hear(self, name: str) -> str:
        """What rank 0 tells under this name; waits for it, and ends with the job."""
        assert self._store is not None, "a rank alone tells itself nothing"
        while not self._store.check([f"told/{name}"]):
            self._check()
            time.sleep(_POLL_SECONDS)
        return str(self._store.get(f"told/{name}").decode())

    def wait(self) -> None:
        """On rank 0: until every other rank has ended its work well. Raises Interrupted when the job is to stop."""
        while self._thread is not None and self._heard:
            self._check()
            time.sleep(_POLL_SECONDS)

    def _check(self) -> None:
        if self.fault is not None or self._stop.requested:
            raise Interrupted(f"What was done is saved. {self._again}")

    def _keep_watch(self) -> None:
        """Count up and look at the others until the end; in a thread."""
        while True:
            try:
                fault = self._look()
            except RuntimeError as error:  # whatever the store's connection raises
                fault = f"The job's store cannot be reached any more ({_first_line(error)}): rank 0 or torchrun ended."
                self._unsaid = True
            if fault is not None:
                self.fault, self._stop.requested = fault, True
                return
            if self._over.wait(self._beat_s):
                return

    def _look(self) -> str | None:
        """A fault, if there is one; rank 0 passes it on to all."""
        store, world = self._store, self.world
        assert store is not None
        store.add(f"beat/{world.rank}", 1)
        for rank in list(self._heard):
            if (fault := self._news(store, rank)) is not None:
                if world.speaks:
                    store.set("fault", fault)
                return fault
        if not world.speaks and store.check(["fault"]):
            return str(store.get("fault").decode())
        return None

    def _news(self, store: "Store", rank: int) -> str | None:
        """Look at one rank: what is wrong with it; one that has ended well is watched no longer."""
        who = World(rank=rank, size=self.world.size)
        if store.check([f"ended/{rank}"]):
            said = str(store.get(f"ended/{rank}").decode())
            if said != _DONE:
                return f"{str(who).capitalize()} ended: {said.rstrip('.')}."
            del self._heard[rank]
            return None
        (count, since), now = self._heard[rank], time.monotonic()
        if (latest := store.add(f"beat/{rank}", 0)) != count:
            self._heard[rank] = (latest, now)
        elif now - since > (bound := self._patience_s if count else self._arrival_s):
            what = "has died or hangs" if count else "has not come"
            self._unsaid = not self.world.speaks
            return f"{str(who).capitalize()} {what}: nothing was heard of it for {bound:g} s."
        return None


def meet(stage: str, again: str) -> Roster:
    """The roster of this process's job; `stage` keeps those of several stages apart, `again` as in `Roster`.

    Raises UserError where RANK and WORLD_SIZE are set but nobody says where the ranks meet.
    """
    world = from_environment()
    if world.alone:
        return Roster(world)
    from datetime import timedelta

    from torch import distributed

    try:
        store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=_ARRIVAL_SECONDS)))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"RANK and WORLD_SIZE say that this is {world}, but the ranks cannot meet ({_first_line(error)}). Start "
            "them with torchrun, which also sets MASTER_ADDR and MASTER_PORT, or unset RANK and WORLD_SIZE."
        ) from error
    store.set_timeout(timedelta(seconds=_PATIENCE_SECONDS))
    return Roster(world, distributed.PrefixStore(f"thresher/{stage}/{world.restarts}", store), again=again)


def _said(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, (UserError, Interrupted)) else f"{type(error).__name__}: {text}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
