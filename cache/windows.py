"""Training when not all of the corpus is stored at once: a window of shards at a time.

The train shards of a plan are cut into windows of equal size, and the order of reading keeps to them: all rows of a
window come, shuffled, before any of the next. So only the window in use and its two neighbours have to exist. Every
shard is a pure function of the plan, so whoever fills a window may be killed, and a reader that steps back gets the
same bytes made again.

Two stores keep the shards: a ring of files that another process refills (`ring`), or memory that a thread fills
(`memory_shards`, live mode). `WindowedSource` reads from either, behind the same protocol as a finished cache.

The price is shuffling: rows of one context share a window, so batches are as good as a perfect shuffle of a window,
not of the corpus. The larger the window, the less that matters.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from thresher.cache import stats
from thresher.cache.codec import Calibration
from thresher.cache.contracts import Site
from thresher.cache.layout import ArraySpec, Codec, Contexts, Store, known_split
from thresher.cache.order import ReadOrder
from thresher.cache.place import Place
from thresher.cache.plan import Plan
from thresher.cache.rows import Rows
from thresher.cache.stats import SiteStats


class Windows(NamedTuple):
    """The train shards of a plan, cut into windows; the last one may be short."""

    shards: int
    size: int

    @classmethod
    def of(cls, plan: Plan) -> "Windows":
        assert plan.window_shards is not None, "the plan keeps all shards"
        return cls(plan.splits["train"].shards, plan.window_shards)

    @property
    def number(self) -> int:
        """Number of windows."""
        return -(-self.shards // self.size)

    def holding(self, shard: int) -> int:
        """The window of a shard."""
        return shard // self.size

    def shards_in(self, window: int) -> range:
        """The shards of a window."""
        return range(window * self.size, min((window + 1) * self.size, self.shards))

    def after(self, window: int) -> int:
        """The window that is read next; after the last one an epoch begins anew."""
        return (window + 1) % self.number

    def kept(self, window: int) -> frozenset[int]:
        """The windows that exist while one is read: it, the next, and the one before, which threads may still read."""
        return frozenset({window, self.after(window), (window - 1) % self.number})

    def wanted(self, window: int) -> Iterator[int]:
        """The shards that have to be made while a window is read, the most urgent first."""
        for each in dict.fromkeys((window, self.after(window))):
            yield from self.shards_in(each)

    def turned(self, current: int, asked: int) -> int:
        """The window to be read, given the one so far and the one that a chunk was asked from.

        Threads read ahead, so one that lags behind may ask from the window before; that moves nothing.
        """
        behind = asked == (current - 1) % self.number and asked != self.after(current)
        return current if behind else asked


class Shards(Protocol):
    """Where the shards of a windowed source come from."""

    def chunk(self, split: str, name: str, shard: int, inner: int, stop: threading.Event | None) -> np.ndarray:
        """[C, …] chunk of a shard in stored form; waits until it is there, or raises Interrupted once `stop` is set."""
        ...

    def finish(self) -> None:
        """Nothing more is wanted, ever."""
        ...

    def close(self) -> None:
        """Let go of threads, locks and memory."""
        ...


class WindowedSource(Rows):
    """A `Source` of which one window of shards exists at a time."""

    SAMPLED_CHUNKS: ClassVar[int] = 64

    def __init__(
        self,
        path: Place,
        plan: Plan,
        shards: Shards,
        contexts: Callable[[str], Contexts],
        calibrations: Mapping[str, Calibration],
        statistics: Mapping[str, SiteStats],
    ) -> None:
        """`statistics` are those of the first window: the rest of the corpus is not there yet."""
        self.path, self.plan, self._shards = path, plan, shards
        self.identity: dict[str, Any] = plan.identity
        self.fingerprint: str = plan.fingerprint
        self.codec: Codec = plan.codec
        self.store: Store = plan.store
        self.chunk_rows: int = plan.chunk_rows
        self.sites: dict[str, Site] = {site.name: site for site in plan.sites}
        self.contexts, self._calibrations, self._statistics = contexts, calibrations, statistics
        self.windows = Windows.of(plan)

    def __enter__(self) -> "WindowedSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of threads, locks and memory."""
        self._shards.close()

    def finish(self) -> None:
        """Training is over: whoever fills the windows may stop."""
        self._shards.finish()

    def rows(self, split: str) -> int:
        """Rows of a split in all windows together."""
        return self.plan.splits[known_split(split, self.plan.splits)].rows

    def arrays(self, split: str) -> Mapping[str, ArraySpec]:
        """Every array with one entry per row, by name."""
        return self._specs[known_split(split, self.plan.splits)]

    def statistics(self, site: str) -> SiteStats:
        """Statistics of a site over the kept rows of the first window."""
        return self._statistics[self.site(site).name]

    def calibration(self, site: str) -> Calibration | None:
        """μ and σ of an int8z site; None for the other codecs."""
        return self._calibrations.get(self.site(site).name)

    def order(self, split: str, seed: int, group_chunks: int) -> ReadOrder:
        """The order in which the rows of a split are visited: window by window in train."""
        window = self.windows.size * self._chunks_per_shard if split == "train" else None
        return ReadOrder(self.rows(split) // self.chunk_rows, self.chunk_rows, seed, split, group_chunks, window)

    def chunk(self, split: str, name: str, index: int, stop: threading.Event | None = None) -> np.ndarray:
        """[C, …] read-only rows of an array in stored form; waits for the shard."""
        return self._shards.chunk(split, name, *divmod(index, self._chunks_per_shard), stop)

    def chunks_at_hand(self, split: str) -> int:
        """Those of the first window; of another split, all."""
        shards = self.windows.shards_in(0) if split == "train" else range(self.plan.splits[split].shards)
        return sum(self.plan.shard_rows_of(split, shard) for shard in shards) // self.chunk_rows

    @property
    def _chunks_per_shard(self) -> int:
        return self.plan.shard_rows // self.plan.chunk_rows

    @cached_property
    def _specs(self) -> dict[str, dict[str, ArraySpec]]:
        return {split: self.plan.sharded_arrays(split) for split in self.plan.splits}


def merged_statistics(plan: Plan, moments: Mapping[int, np.ndarray]) -> dict[str, SiteStats]:
    """Statistics of every site over the kept rows of some shards, from their moments [2, P], in order of the shards."""
    by_shard = [stats.unpack(plan.sites, moments[index][0]) for index in sorted(moments)]
    return {site.name: stats.merged(m[site.name] for m in by_shard).stats() for site in plan.sites}
