"""Where training reads from: a finished cache, a ring that is being refilled, or the target itself.

`Batches` and the trainer see only this. A source knows its sites, its statistics and an order of rows, and gives any
chunk of any array in stored form; how a chunk gets into memory (mapped, read past the page cache, decompressed,
waited for) is its own affair.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from thresher.cache.codec import Calibration
from thresher.cache.contracts import Site
from thresher.cache.layout import ArraySpec, Codec, Contexts, Store
from thresher.cache.order import ReadOrder
from thresher.cache.place import Place
from thresher.cache.remote.settings import Reading
from thresher.cache.stats import SiteStats


class Source(Protocol):
    """Rows of activations in stored form, in chunks of `chunk_rows`."""

    @property
    def path(self) -> Place:
        """Where it lives; of a live source, where it would."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the fingerprint is of."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the rows and their order."""
        ...

    @property
    def codec(self) -> Codec: ...

    @property
    def store(self) -> Store:
        """`all`: special rows are among the rows and have to be masked."""
        ...

    @property
    def chunk_rows(self) -> int:
        """C."""
        ...

    @property
    def sites(self) -> Mapping[str, Site]: ...

    def site(self, name: str) -> Site:
        """A site by name, or UserError with near misses."""
        ...

    def rows(self, split: str) -> int:
        """Stored rows of a split, a multiple of C. Raises UserError for a split it does not have."""
        ...

    def arrays(self, split: str) -> Mapping[str, ArraySpec]:
        """Every array with one entry per row, by name: sites, `<site>.scale`, `keep`, … as they look decompressed."""
        ...

    def statistics(self, site: str) -> SiteStats:
        """Statistics of a site over kept rows of train."""
        ...

    def calibration(self, site: str) -> Calibration | None:
        """μ and σ of an int8z site; None for the other codecs."""
        ...

    def contexts(self, split: str) -> Contexts:
        """The packed tokens of a split."""
        ...

    def order(self, split: str, seed: int, group_chunks: int) -> ReadOrder:
        """The order in which training visits the rows of a split."""
        ...

    def chunk(self, split: str, name: str, index: int, stop: threading.Event | None = None) -> np.ndarray:
        """[C, …] read-only rows of an array in stored form (bf16 as uint16), checked; from any thread.

        May wait when the source is still being filled; raises Interrupted once `stop` is set meanwhile. Raises
        UserError naming the chunk when it is damaged.
        """
        ...

    def finish(self) -> None:
        """Nothing more is wanted: whoever fills the source may stop."""
        ...

    def sample(self, split: str, count: int) -> np.ndarray:
        """Up to `count` row numbers, spread evenly over the kept rows that are cheap to reach; always the same ones."""
        ...

    def gather(self, split: str, site: str, rows: np.ndarray) -> Tensor:
        """[n, d] float32: given rows of a site, decoded, by the plain path."""
        ...


@runtime_checkable
class OnDisk(Protocol):
    """What a source can do besides when all of it is stored for good, on a disk or in an object store."""

    def stored_bytes(self, split: str, names: Sequence[str]) -> int:
        """Bytes of whole arrays of a split, decompressed."""
        ...

    def read(self, split: str, name: str, index: int, out: np.ndarray, *, direct: bool = False) -> None:
        """Copy a chunk into `out` [C, …], decompressed and checked; from any thread.

        `direct` reads past the page cache where file system and buffer allow it.
        """
        ...

    @property
    def reading(self) -> Reading | None:
        """How it is read from an object store; None where it is on a disk."""
        ...

    def by_file(self, split: str, name: str, run: Sequence[int]) -> list[list[int]]:
        """A run of neighbouring chunks cut where one file ends and the next begins."""
        ...

    def read_run(self, split: str, name: str, index: int, outs: Sequence[np.ndarray]) -> None:
        """Chunks `index`, `index` + 1, … of one shard in an object store into `outs`, by as few requests as sensible.

        As `read`; from any thread.
        """
        ...
