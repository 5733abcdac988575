"""Rolling mode: a bounded ring of train shards on disk, refilled by harvest while training reads it.

    zarr.json …       as in a cache, with a plan that has windows; held-out splits are stored whole
    RING.json         written once the first window and the held-out splits are there: from then on one may train
    ring/cursor.json  the window that training is in, and whether training is over
    ring/filler.lock  held by harvest while it refills; ring/reader.lock held by the one training that reads

Harvest keeps the window that the cursor names, its two neighbours, and nothing else. A shard that is evicted loses its
commit record first, so what is left of it never counts; asked for again, it is made again, with the same bytes. So
either side may be killed at any moment and started again, and training may resume from a checkpoint of long ago.
"""

import itertools
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from thresher.cache.claims import Shard
from thresher.cache.commit import ROOT, commit_path, side_digests
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.layout import FORMAT, VERSION
from thresher.cache.locks import is_held, share, try_hold
from thresher.cache.part import Part
from thresher.cache.place import local
from thresher.cache.plan import Plan
from thresher.cache.publish import publish, read_sealed, sealed
from thresher.cache.records import canonical, differences
from thresher.cache.stored import read_root
from thresher.cache.windows import WindowedSource, Windows
from thresher.cache.writer import CacheWriter

READY = "RING.json"
FOLDER = "ring"
CURSOR, FILLER, READER = (f"{FOLDER}/{name}" for name in ("cursor.json", "filler.lock", "reader.lock"))
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 2.0


class Cursor(NamedTuple):
    """Where training is."""

    window: int
    done: bool
    """Training is over and asks for nothing more."""
    training: str
    """Tells one training from another, so that harvest knows an end that it has seen before."""


def read_cursor(path: Path) -> Cursor:
    """What the ring's reader last said; the first window when nobody reads yet. Raises UserError when it is damaged."""
    file = path / CURSOR
    return Cursor(**read_sealed(file)) if file.exists() else Cursor(0, False, "")


def write_cursor(path: Path, cursor: Cursor) -> None:
    """Say where training is."""
    publish(path / CURSOR, [canonical(sealed(cursor._asdict()))])


class RingKeeper:
    """The filling side: which shards to make next, and which to evict. Any number of processes may fill one ring."""

    def __init__(self, writer: CacheWriter) -> None:
        self._writer, self.path, self.plan = writer, local(writer.path, "a ring (harvest.window_gb)"), writer.plan
        self.windows = Windows.of(writer.plan)
        (self.path / FOLDER).mkdir(exist_ok=True)
        (self.path / FILLER).touch()
        self._alive = share(self.path / FILLER)
        self._over = self._ended()  # an earlier training, which is not the one that is waited for

    def close(self) -> None:
        """No longer fill."""
        if self._alive is not None:
            self._alive.release()
            self._alive = None

    def over(self) -> bool:
        """Whether a training has ended since this began to fill."""
        return self._ended() not in (None, self._over)

    def wanted(self) -> list[Shard]:
        """The shards that should exist now, the most urgent first: what training waits for, the rest, the next window.

        Shards that are behind are evicted first, so that the ring never outgrows its bound.
        """
        window = read_cursor(self.path).window
        kept = self.windows.kept(window)
        for index in range(self.windows.shards):
            if self.windows.holding(index) not in kept and commit_path(self.path, "train", index).exists():
                self._writer.claims.evict(("train", index))
        held_out = [(s, i) for s, sizes in self.plan.splits.items() if s != "train" for i in range(sizes.shards)]
        train = [("train", index) for index in self.windows.wanted(window)]
        current = len(self.windows.shards_in(window))
        return train[:current] + held_out + train[current:]

    def _ended(self) -> str | None:
        """The training that says it is over, if one does."""
        cursor = read_cursor(self.path)
        return cursor.training if cursor.done else None

    def publish_ready(self) -> bool:
        """Whether one may train; writes statistics and RING.json once first window and held-out splits are there."""
        first = self.windows.shards_in(0)
        needed = [("train", index) for index in first]
        needed += [(s, i) for s, sizes in self.plan.splits.items() if s != "train" for i in range(sizes.shards)]
        if (self.path / READY).exists():
            return True
        if not all(commit_path(self.path, *shard).exists() for shard in needed):
            return False
        self._writer.prepare_reading(first)
        record = {
            "format": f"{FORMAT}-ring",
            "version": VERSION,
            "fingerprint": self.plan.fingerprint,
            "files": side_digests(self.path, self.plan),
        }
        publish(self.path / READY, [canonical(sealed(record))])
        return True


class RingShards:
    """The reading side: chunks of shards that come and go."""

    def __init__(self, path: Path, plan: Plan, make: Callable[[], Part], notify: Callable[[str], None]) -> None:
        """`make` opens the directory anew: with nothing mapped, nothing remembered."""
        window = read_cursor(path).window  # before the lock: it may be damaged
        lock = try_hold(path / READER, patience=1.0)
        if lock is None:
            raise UserError(
                f"another training reads the ring {path}, and a ring follows one training only. Wait for it to end, "
                f"train all dictionaries of a sweep in one run, or harvest a second ring with --cache PATH."
            )
        self._path, self._plan, self._make, self._notify, self._reading = path, plan, make, notify, lock
        self._windows, self._window = Windows.of(plan), window
        self._training = secrets.token_hex(8)
        self._say(self._window)
        self._held_out, self._parts = make(), dict[int, Part]()
        self._told = ""
        self._closed, self._turning = False, threading.Lock()

    def chunk(self, split: str, name: str, shard: int, inner: int, stop: threading.Event | None) -> np.ndarray:
        """[C, …] chunk of a shard, once harvest has made it."""
        index = shard * (self._plan.shard_rows // self._plan.chunk_rows) + inner
        if split != "train":
            return self._held_out.chunk(split, name, index)
        for attempt in itertools.count():
            part = self._part(shard)
            self._wait_for(split, shard, stop)
            try:
                return part.chunk(split, name, index)
            except (UserError, OSError, RuntimeError):  # evicted while it was opened, or really damaged
                if attempt and commit_path(self._path, split, shard).exists():
                    raise
                with self._turning:
                    self._parts.pop(self._windows.holding(shard), None)
        raise AssertionError("unreachable")

    def finish(self) -> None:
        """Tell harvest that nothing more is wanted."""
        self._say(self._window, done=True)

    def close(self) -> None:
        """Let others read the ring."""
        self._closed, self._parts = True, {}
        self._reading.release()

    def _say(self, window: int, *, done: bool = False) -> None:
        write_cursor(self._path, Cursor(window, done, self._training))

    def _part(self, shard: int) -> Part:
        """The directory as seen in a window; what was mapped of windows behind is let go, or it would fill the disk."""
        with self._turning:
            asked = self._windows.holding(shard)
            window = self._windows.turned(self._window, asked)
            if window != self._window:
                self._window = window
                self._say(window)
                kept = self._windows.kept(window)
                self._parts = {each: part for each, part in self._parts.items() if each in kept}
            if asked not in self._parts:
                self._parts[asked] = self._make()
            return self._parts[asked]

    def _wait_for(self, split: str, shard: int, stop: threading.Event | None) -> None:
        """Wait for a shard; after a while say who makes it, and again when that changes."""
        waited = 0.0
        while not commit_path(self._path, split, shard).exists():
            if self._closed or (stop is not None and stop.is_set()):
                raise Interrupted("Stopped while waiting for the ring.")
            time.sleep(_POLL_SECONDS)
            waited += _POLL_SECONDS
            if waited >= _PATIENCE_SECONDS:
                with self._turning:
                    state = _state(self._path)
                    if state != self._told:
                        self._notify(f"Waiting for shard {shard} of {split}: {state}.")
                    self._told = state


def open_ring(path: Path, identity: Mapping[str, Any], notify: Callable[[str], None]) -> WindowedSource:
    """The ring with this identity at `path` as a source, once its first window is there; waits for that.

    Raises UserError when the directory holds something else, or when another training reads it.
    """
    told = False
    while not (path / READY).exists():
        _check_same(path, identity)
        if not told:
            notify(f"Waiting for the first window of {path}: {_state(path)}.")
            told = True
        time.sleep(_POLL_SECONDS)
    _check_same(path, identity)
    plan, facts = read_root(path)
    manifest = read_sealed(path / READY)

    def make() -> Part:
        return Part(path, plan, facts, manifest)

    held = make()
    calibrations = {name: c for name in held.sites if (c := held.calibration(name)) is not None}
    statistics = {name: held.statistics(name) for name in held.sites}
    return WindowedSource(path, plan, RingShards(path, plan, make, notify), held.contexts, calibrations, statistics)


def _check_same(path: Path, identity: Mapping[str, Any]) -> None:
    """Raise UserError when something else than this ring is at `path`."""
    if not (path / ROOT).exists():
        return
    lines = differences(json.loads(json.dumps(dict(identity))), read_root(path).plan.identity)
    if lines:
        raise UserError(
            f"{path} was made of something else: {'; '.join(lines)}. Choose another place with --cache PATH, or "
            f"harvest with this recipe."
        )


def _state(path: Path) -> str:
    """Whether anybody fills the ring."""
    if is_held(path / FILLER):
        return "harvest is making it"
    return "no harvest is running; start `thresher harvest` with the same recipe beside this"
