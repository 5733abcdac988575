"""The clean model: logits to compare with, and rows at the sites that dictionaries read and write.

Rows come from the model's clean pass, exactly, or from the cache (`train.clean_from = "cache"`), as exactly as it
stored them: an objective of CE then needs no clean pass at all. Rows of a cache lie shuffled over its chunks, and a few
positions are missing where the last chunk was cut; those are not patched.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from thresher.cache.contracts import Target
from thresher.cache.errors import UserError
from thresher.cache.layout import KEPT
from thresher.cache.patching import read_rows, recording_edits
from thresher.cache.reader import Provenance
from thresher.cache.source import Source
from thresher.train.endtoend.contexts import Part


class Clean(NamedTuple):
    """What the model does with some contexts when nothing is patched."""

    logits: Tensor | None
    """[B, T, V]; None where nobody asked."""
    rows: dict[str, Tensor]
    """[N, D] raw activations at P by site name, float32 or wider."""


@runtime_checkable
class _Placed(Protocol):
    """A source that knows where its rows come from."""

    def provenance(self, split: str) -> Provenance: ...


class Cached:
    """Rows of the training split by context and position."""

    def __init__(self, reader: Source) -> None:
        """Raises UserError for a source that does not keep its rows."""
        if not isinstance(reader, _Placed):
            raise UserError(
                'train.clean_from = "cache" takes clean rows by their position in the text, which only a finished '
                'cache can give; a ring or a live target cannot. Set clean_from = "model".'
            )
        found, shape = reader.provenance("train"), reader.contexts("train").keep.shape
        self.reader = reader
        self.row_MT = np.full(shape, -1, np.int64)
        kept = found.keep == KEPT
        self.row_MT[found.context[kept], found.position[kept]] = np.flatnonzero(kept)

    @property
    def known(self) -> np.ndarray:
        """[M, T] bool: positions that have a row."""
        return self.row_MT >= 0

    def rows(self, part: Part, sites: Sequence[str]) -> dict[str, Tensor]:
        """As `Clean.rows`."""
        device = part.patched.device
        numbers = self.row_MT[part.contexts].reshape(-1)[part.patched.cpu().numpy()]
        return {site: self.reader.gather("train", site, numbers).to(device) for site in sites}


def clean(target: Target, part: Part, sites: Sequence[str], cached: Cached | None, logits: bool) -> Clean:
    """Rows of `sites` and, if asked, logits of the clean pass; without gradient."""
    rows: dict[str, Tensor] = {} if cached is None else cached.rows(part, sites)
    with torch.no_grad():
        if logits:
            edits = recording_edits(sites if cached is None else (), part.patched, rows)
            return Clean(target.logits(part.tokens, edits), rows)
        if cached is None:
            recorded = target.record(part.tokens, target.sites(list(sites)))
            rows = {site: read_rows(x_BTD, part.patched) for site, x_BTD in recorded.items()}
    return Clean(None, rows)
