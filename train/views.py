"""A batch as dictionaries see it: in their training spaces (normalise.py)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.cache.source import Source
from thresher.train.normalise import Affine, Mode, affine

_SPACE_ROWS = 8192
"""Rows that mean and variance are estimated from in a space that the cache's statistics do not cover."""


class Views:
    """One batch in the training spaces that its dictionaries use, each made once."""

    def __init__(self, acts: Mapping[str, Tensor]) -> None:
        self.acts = acts
        self._made: dict[tuple[str, str], Tensor] = {}

    def get(self, site: str, mode: str, space: Affine) -> Tensor:
        """[N, D] float32 rows of a site in training space."""
        key = (site, mode)
        if key not in self._made:
            self._made[key] = space.apply(self.acts[site].to(torch.float32))
        return self._made[key]


class Inputs(NamedTuple):
    """A batch in one dictionary's training space."""

    xs: list[Tensor]
    """[N, D] per source."""
    ys: list[Tensor]
    """[N, E] per destination."""


def space_of(mode: Mode, reader: Source, site: str) -> Affine:
    """A site's training space; always the same for a source."""
    sample = None
    if mode == "per_token":
        sample = reader.gather("train", site, reader.sample("train", _SPACE_ROWS))
    return affine(mode, reader.statistics(site), site, sample)
