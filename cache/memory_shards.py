"""Shards that are made when they are wanted and kept in memory: the store of live mode, and what writes into it."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from thresher.cache.buffers import Buffers
from thresher.cache.claims import Shard
from thresher.cache.codec import Calibration
from thresher.cache.interrupts import Interrupted
from thresher.cache.layout import Contexts
from thresher.cache.order import Stream
from thresher.cache.plan import Plan
from thresher.cache.shard import ShardData, ShardWriter
from thresher.cache.windows import Windows

_POLL_SECONDS = 0.1


class MemoryShards:
    """Shards made on demand by a thread; `windows.Shards` for live mode.

    The thread makes what is asked for first, then the window in use, then the next one.
    """

    def __init__(
        self, plan: Plan, produce: Callable[[str, int], ShardData], closed: Callable[[], None] = lambda: None
    ) -> None:
        """`produce` makes a shard; it is called in one thread only, train shard 0 first. `closed` follows `close`."""
        self._plan, self._produce, self._after = plan, produce, closed
        self._windows = Windows.of(plan)
        self._window = 0
        self._made: dict[Shard, ShardData] = {}
        self._asked: list[Shard] = []
        self._failure: BaseException | None = None
        self._waiting: Counter[Shard] = Counter()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="thresher-live", daemon=True)
        self._thread.start()

    def shard(self, split: str, index: int, stop: threading.Event | None = None) -> ShardData:
        """A shard, once it is made. Raises what went wrong in making it, and Interrupted once `stop` is set."""
        shard = (split, index)
        with self._changed:
            if split == "train":
                self._window = self._windows.turned(self._window, self._windows.holding(index))
            if shard not in self._made and shard not in self._asked:
                self._asked.append(shard)
            self._waiting[shard] += 1
            self._changed.notify_all()
            try:
                while shard not in self._made:
                    if self._failure is not None:
                        raise self._failure
                    if self._closed or (stop is not None and stop.is_set()):
                        raise Interrupted("Stopped while waiting for activations.")
                    self._changed.wait(_POLL_SECONDS)
                return self._made[shard]
            finally:
                self._waiting[shard] -= 1

    def chunk(self, split: str, name: str, shard: int, inner: int, stop: threading.Event | None) -> np.ndarray:
        """[C, …] view of a shard in memory."""
        rows = self._plan.chunk_rows
        view = self.shard(split, shard, stop).arrays[name][inner * rows : (inner + 1) * rows]
        view.flags.writeable = False
        return view

    def finish(self) -> None:
        """Nothing to tell anybody: the thread ends with `close`."""

    def close(self) -> None:
        """Stop the thread after the shard that it is making."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._made = {}
        self._after()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                shard = self._next()
                if self._closed or shard is None:
                    return
                self._evict()
            try:
                made = self._produce(*shard)
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._made[shard] = made
                self._asked = [asked for asked in self._asked if asked != shard]
                self._changed.notify_all()

    def _next(self) -> Shard | None:
        """What to make now: train shard 0 first, which calibrates."""
        wanted = [("train", index) for index in self._windows.wanted(self._window)]
        first = [] if self._made else [("train", 0)]
        return next((shard for shard in [*first, *self._asked, *wanted] if shard not in self._made), None)

    def _evict(self) -> None:
        """Forget windows that are behind, unless somebody is still to be given a shard of theirs.

        Who reads them keeps them alive. Held-out splits are small and stay.
        """
        kept = self._windows.kept(self._window)
        for split, index in list(self._made):
            behind = split == "train" and self._windows.holding(index) not in kept
            if behind and not self._waiting[split, index]:
                del self._made[split, index]


class MemoryWriter:
    """Makes shards of a plan without a disk: what `CacheWriter` is to a cache."""

    def __init__(self, plan: Plan, contexts: Mapping[str, Contexts], fvu_gate: float = 1e-3) -> None:
        self.plan, self.fvu_gate, self.buffers = plan, fvu_gate, Buffers()
        self.calibrations: dict[str, Calibration] = {}
        """μ and σ by site (int8z), once train shard 0 has fixed them."""
        self._contexts = contexts
        self._streams = {
            split: Stream(contexts[split].stored(plan.store), plan.seed, split, sizes.rows)
            for split, sizes in plan.splits.items()
        }
        self._made: ShardData | None = None

    def shard(self, split: str, index: int) -> ShardWriter:
        """Begin a shard; with codec int8z train shard 0 comes first."""
        source = self._streams[split].shard(index, self.plan.shard_rows)
        return ShardWriter(self, split, index, source, self._contexts[split])

    def made(self) -> ShardData:
        """The shard that was committed last."""
        assert self._made is not None
        made, self._made = self._made, None
        return made

    # What a shard asks of its owner.

    def calibration(self, site: str) -> Calibration | None:
        """μ and σ of a site once they are fixed."""
        return self.calibrations.get(site)

    def calibrated(self, by_site: Mapping[str, Calibration]) -> None:
        """Fix μ and σ for good."""
        self.calibrations.update(by_site)

    def publish_shard(self, split: str, index: int, finish: Callable[[], ShardData]) -> None:
        """Keep the shard for `made`."""
        self._made = finish()
