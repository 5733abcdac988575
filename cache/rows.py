"""Rows of a source by number: a sample of them, and any of them decoded.

What a finished cache and a windowed source have in common above their chunks. The plain path: `Batches` is the fast
one, and its tests hold it against `gather`.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from thresher.cache.codec import Calibration, decode
from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.layout import KEPT, ArraySpec, raw_dtype
from thresher.cache.place import Place
from thresher.cache.records import nearest


class Rows(ABC):
    """The part of a `source.Source` that follows from its chunks."""

    SAMPLED_CHUNKS: ClassVar[int]
    """Chunks that a sample is taken from."""

    path: Place
    sites: dict[str, Site]
    chunk_rows: int

    @abstractmethod
    def rows(self, split: str) -> int:
        """Stored rows of a split."""

    @abstractmethod
    def arrays(self, split: str) -> Mapping[str, ArraySpec]:
        """Every array with one entry a row, by name."""

    @abstractmethod
    def calibration(self, site: str) -> Calibration | None:
        """μ and σ of an int8z site; None for the other codecs."""

    @abstractmethod
    def chunk(self, split: str, name: str, index: int, stop: threading.Event | None = None) -> np.ndarray:
        """[C, …] read-only chunk of an array in stored form."""

    @abstractmethod
    def chunks_at_hand(self, split: str) -> int:
        """How many chunks, from the first on, are cheap to reach."""

    def site(self, name: str) -> Site:
        """A stored site by name, or UserError with near misses."""
        if name not in self.sites:
            raise UserError(
                f"{self.path} does not hold site {name!r}.{nearest(name, self.sites)} It holds "
                f"{', '.join(self.sites)}. Choose one of them, or harvest again with that site."
            )
        return self.sites[name]

    def sample(self, split: str, count: int) -> np.ndarray:
        """Up to `count` kept rows, ascending, from a few chunks spread evenly: a chunk is a sample of its shard."""
        chunks = _spread(self.chunks_at_hand(split), self.SAMPLED_CHUNKS)
        rows = []
        for chunk, wanted in zip(chunks, np.diff(np.linspace(0, count, len(chunks) + 1).astype(int)), strict=True):
            kept = np.flatnonzero(self.chunk(split, "keep", int(chunk)) == KEPT)
            rows.append(chunk * self.chunk_rows + kept[_spread(len(kept), int(wanted))])
        return np.concatenate(rows) if rows else np.empty(0, np.int64)

    def gather(self, split: str, site: str, rows: np.ndarray) -> Tensor:
        """[n, d] float32: any rows of a site, decoded."""
        specs = self.arrays(split)
        names = [name for name in (self.site(site).name, f"{site}.scale") if name in specs]
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows(split)):
            raise UserError(f"rows of {split!r} are 0 to {self.rows(split) - 1}; got {rows.min()} to {rows.max()}.")
        chunk, inner = np.divmod(rows, self.chunk_rows)
        order = np.argsort(chunk, kind="stable")
        borders = np.flatnonzero(np.diff(chunk[order])) + 1
        raw = {name: np.empty((len(rows), *specs[name].shape[1:]), raw_dtype(specs[name].dtype)) for name in names}
        for here in np.split(order, borders) if len(rows) else []:
            for name in names:
                raw[name][here] = self.chunk(split, name, int(chunk[here[0]]))[inner[here]]
        scale = torch.from_numpy(raw[names[1]]) if len(names) > 1 else None
        return decode(as_codes(raw[site]), scale, self.calibration(site), torch.float32)


def as_codes(raw: np.ndarray) -> Tensor:
    """Stored rows as a tensor: bf16 patterns (uint16) become bfloat16, codes stay int8; nothing is copied."""
    return (
        torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16) if raw.dtype == np.uint16 else torch.from_numpy(raw)
    )


def _spread(available: int, wanted: int) -> np.ndarray:
    """Up to `wanted` of range(available), evenly spaced."""
    return np.unique(np.linspace(0, available - 1, min(wanted, available)).astype(np.int64))
