"""The ranks of one job keep track of one another: who is at work, who has ended, who hangs, who has fallen silent.

Every rank counts up a number of its own in a store of torch.distributed once a second, from a thread. Rank 0 watches
the others, they watch rank 0. A rank also looks at the progress of its own main thread (progress.py) and says so when
that has stood still for too long; rank 0 finds out who holds up whom. What goes wrong with one rank (an error, a stop,
silence, a hang) becomes the job's `fault`: every rank's stop flag is set, so that each saves what it has at its next
step and ends. torchrun ends the others of a host by itself when one dies; this also holds between hosts, and for ranks
that were started without it.

Nobody waits without a bound: a rank that is silent for a minute, does not appear within ten, or makes no progress for
ten, is given up. Nor can a rank outlive its job: one whose main thread does not come to its end once a fault is known,
because it hangs itself or waits in a collective for one that does, is ended by a second thread, without a last save.
Checkpoints are published whole, so what was saved before is whole.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from thresher.cache.errors import UserError
from thresher.cache.interrupts import ECHO_SECONDS, Interrupted, StopFlag, deferred_interrupts
from thresher.cache.progress import Bounds, Progress, Still, bounds_from_environment
from thresher.cache.world import World, from_environment

if TYPE_CHECKING:
    from torch.distributed import Store

_BEAT_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
_ARRIVAL_SECONDS = 600.0
"""A rank may be loading a model while others are at work."""
_GRACE_SECONDS = 120.0
"""Between a fault and the end by force. An eighth of it for a rank that stands still and has to say what happened, a
quarter for another that does: torchrun kills what is left of a host 30 s after the first process has ended."""
_GATHERED_BEATS = 3  # for ranks that hold one another up to be looked at together
_POLL_SECONDS = 0.05
_DONE = "done"


def _write(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


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
        grace_s: float = _GRACE_SECONDS,
        bounds: Bounds | None = None,
        again: str = "The same command goes on from there.",
        say: Callable[[str], None] = _write,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """`store`: the one that all ranks share, with nothing in it; needed unless `world` is of one process.

        `bounds`: for how long the main thread may stand still. `again`: how the user goes on with a job that was
        stopped. `say` and `end` are for a rank whose main thread can do neither: the first gets the message, unless
        another rank has it, the second the exit code.
        """
        self.world = world or World()
        self.fault: str | None = None
        """Why the job cannot go on, in a sentence; None as long as it can."""
        assert store is not None or self.world.alone, "several ranks need a store"
        self._store, self._beat_s, self._patience_s, self._arrival_s = store, beat_s, patience_s, arrival_s
        self._grace_s, self._bounds, self._again, self._say, self._end = grace_s, bounds or Bounds(), again, say, end
        self._stop, self._progress = StopFlag(), Progress(self._bounds)
        self._still, self._stuck, self._suspicious = Still(0.0, "", False, False), False, 0
        self._unsaid = False  # whether rank 0 knows of the fault, and so says it
        self._over, self._left, self._outcome = threading.Event(), threading.Event(), _DONE
        self._threads: list[threading.Thread] = []
        self._answered, self._failed = time.monotonic(), 0.0  # when the store last did, when the fault was known
        watched = range(1, self.world.size) if self.world.speaks else range(1)
        self._heard: dict[int, tuple[int, float]] = dict.fromkeys(watched, (0, self._answered))
        """By rank that is watched and has not ended: its last count, and when that was new."""

    def __enter__(self) -> Self:
        if self._store is not None:
            self._answered = time.monotonic()
            self._heard = dict.fromkeys(self._heard, (0, self._answered))
            self._progress = Progress(self._bounds)
            self._progress.follow(self._stop)
            # A connection of its own: on one that is shared, whoever waits for a key keeps all others waiting.
            store: Store = cast(Any, self._store).clone()
            watch = threading.Thread(target=self._keep_watch, args=(store,), name="thresher-roster", daemon=True)
            self._threads = [watch, threading.Thread(target=self._guard, name="thresher-guard", daemon=True)]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._threads:
            return
        broken = error is not None and _in_a_collective(error)
        if broken:
            self._await_fault()
        self._outcome = _DONE if error is None else _said(error)
        self._over.set()
        self._threads[0].join(timeout=self._beat_s + 5.0)
        if error is not None and self.world.speaks:
            time.sleep(2 * self._beat_s)  # for the others to hear of it, in case the store ends with this process
        self._left.set()
        mine = self.world.speaks or self._unsaid
        if broken and self.fault is None:
            raise UserError(
                f"A rank has ended or cannot be reached: an exchange of {self.world} with the others failed "
                f"({_first_line(error)}). What was saved before is whole. {self._again}"
            ) from error
        if self.fault is not None and (broken or isinstance(error, Interrupted)):
            saved = f"What was saved before is whole. {self._again}" if broken else str(error)
            raise (UserError if mine else Interrupted)(f"{self.fault} {saved}") from error

    @property
    def stopping(self) -> bool:
        """Whether this rank is to save and end."""
        return self._stop.requested

    @contextmanager
    def interrupts(self) -> Iterator[StopFlag]:
        """`deferred_interrupts`, whose flag a fault sets too, and which ends whatever waits here.

        The flag is to be read between any two steps: that is how this rank shows that it gets on.
        """
        with deferred_interrupts(0.0 if self.world.alone else ECHO_SECONDS) as stop:
            stop.raised = self._stop.raised
            self._stop = stop
            stop.raised |= self.fault is not None  # one that came between the two lines
            self._progress.follow(stop)
            try:
                yield stop
            finally:
                self._progress.follow(StopFlag())  # in no loop any more

    def meeting_place(self, name: str) -> "Store":
        """A part of the job's store, for process groups of the same ranks."""
        from torch.distributed import PrefixStore

        assert self._store is not None, "a rank alone meets nobody"
        return PrefixStore(name, self._store)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A block that may take up to an hour without a step, such as `loading the model`."""
        return self._progress.phase(name)

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
        while self._threads and self._heard:
            self._check()
            time.sleep(_POLL_SECONDS)

    def _check(self) -> None:
        if self._stop.requested or self.fault is not None:
            raise Interrupted(f"What was done is saved. {self._again}")

    def _await_fault(self) -> None:
        """After an exchange that failed: wait until it is known which rank is to blame, or the user has enough."""
        end = time.monotonic() + self._patience_s + _GATHERED_BEATS * self._beat_s
        with suppress(KeyboardInterrupt):
            while self.fault is None and not self._stop.requested and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)

    def _fail(self, fault: str) -> None:
        self.fault, self._failed = fault, time.monotonic()
        self._stop.raised = True

    def _keep_watch(self, store: "Store") -> None:
        """Count up and look at the others until the end, and tell how that was; in a thread."""
        while not self._over.is_set():
            if self.fault is None:
                try:
                    fault = self._look(store)
                except RuntimeError as error:  # whatever the store's connection raises
                    fault = f"The job's store cannot be reached any more ({_first_line(error)}): rank 0 or torchrun "
                    fault, self._unsaid = f"{fault}ended.", True
                if fault is not None:
                    self._fail(fault)
            self._answered = time.monotonic()
            self._over.wait(self._beat_s)
        with suppress(RuntimeError):  # where the store is gone, so is whoever might have read this
            store.set(f"ended/{self.world.rank}", self._outcome)

    def _look(self, store: "Store") -> str | None:
        """A fault, if there is one; rank 0 passes it on to all."""
        world = self.world
        store.add(f"beat/{world.rank}", 1)
        self._report(store)
        for rank in list(self._heard):
            if (fault := self._news(store, rank)) is not None:
                break
        else:
            fault = self._hung(store) if world.speaks else None
        if fault is not None and world.speaks:
            store.set("fault", fault)
        if fault is None and not world.speaks and store.check(["fault"]):
            return str(store.get("fault").decode())
        return fault

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
            self._unsaid = not self.world.speaks and store.add("said", 1) == 1
            return f"{str(who).capitalize()} {what}: nothing was heard of it for {bound:g} s."
        return None

    def _report(self, store: "Store") -> None:
        """Say that this rank stands still, and that it does no longer."""
        still = self._still
        if still.over:
            store.set(f"still/{self.world.rank}", json.dumps(still))
        if still.over != self._stuck:
            self._stuck = still.over
            store.add("standing", 1 if still.over else -1)

    def _hung(self, store: "Store") -> str | None:
        """On rank 0: the ranks that stand still, the one first that holds up the others."""
        self._suspicious = self._suspicious + 1 if store.add("standing", 0) > 0 else 0
        if self._suspicious <= _GATHERED_BEATS:
            return None
        size, told = self.world.size, {}
        for rank in range(size):
            if store.check([f"still/{rank}"]):
                told[rank] = Still.read(json.loads(store.get(f"still/{rank}")))
        # Who waits for others in a collective is not to blame; nor is who has come further than another.
        first, *others = sorted(told, key=lambda rank: (told[rank].waits, -told[rank].seconds))
        still = told[first]
        fault = f"Rank {first} of {size} hangs: it has made no progress for {still.seconds:.0f} s, {still.where}."
        if others:
            fault += " So do " + ", ".join(f"rank {rank} ({told[rank].where})" for rank in others[:3]) + "."
        return fault

    def _guard(self) -> None:
        """Look at the main thread until it has left the block, and end the process if it cannot; in a thread.

        Nothing here waits for the store.
        """
        seen, silent_s, looked = self._answered, 0.0, time.monotonic()
        while not self._left.wait(self._beat_s):
            self._still, now = self._progress.look(3 * self._beat_s), time.monotonic()
            silent_s = 0.0 if self._answered != seen else silent_s + min(now - looked, 3 * self._beat_s)
            seen, looked = self._answered, now
            if self.fault is None and silent_s > self._patience_s:
                self._unsaid = True
                self._fail(f"The job's store has not answered for {self._patience_s:g} s: rank 0 or torchrun hangs.")
            if self.fault is None:
                continue
            speaks = self.world.speaks or self._unsaid
            stuck = self._still.over or self._still.waits
            if now - self._failed > self._grace_s / ((8 if speaks else 4) if stuck else 1):
                if speaks:
                    where = f" {str(self.world).capitalize()} did not come to its end ({self._still.where})."
                    where = "" if self.fault.startswith(str(self.world).capitalize()) else where
                    self._say(f"{self.fault}{where} What was saved before is whole. {self._again}")
                self._end(2 if speaks else 130)
                return


def meet(
    stage: str,
    again: str,
    *,
    say: Callable[[str], None] = _write,
    phase_s: float | None = None,
) -> Roster:
    """The roster of this process's job; `stage` keeps those of several stages apart, the rest as in `Roster`.

    `phase_s`: for how long a rank may be in a phase that is known to be long, if not for an hour.

    Raises UserError where RANK and WORLD_SIZE are set but nobody says where the ranks meet.
    """
    world = from_environment()
    if world.alone:
        return Roster(world)
    from datetime import timedelta

    from torch import distributed

    bounds = bounds_from_environment()
    bounds = bounds if phase_s is None else bounds._replace(phase_s=phase_s)
    try:
        store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=_ARRIVAL_SECONDS)))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"RANK and WORLD_SIZE say that this is {world}, but the ranks cannot meet ({_first_line(error)}). Start "
            "them with torchrun, which also sets MASTER_ADDR and MASTER_PORT, or unset RANK and WORLD_SIZE."
        ) from error
    store.set_timeout(timedelta(seconds=_PATIENCE_SECONDS))
    own = distributed.PrefixStore(f"thresher/{stage}/{world.restarts}", store)
    return Roster(world, own, again=again, bounds=bounds, say=say)


def _in_a_collective(error: BaseException) -> bool:
    """Whether an exchange with other ranks failed."""
    if not isinstance(error, RuntimeError):
        return False
    trace, files = error.__traceback__, []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    inside = os.sep.join(("", "torch", "distributed", ""))
    return any(inside in file for file in files[-4:]) or "gloo" in str(error) or "NCCL" in str(error)


def _said(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, (UserError, Interrupted)) else f"{type(error).__name__}: {text}"


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().split("\n")[0]
