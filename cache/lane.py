"""The rows of one class, kept or special, on their way through a shard: the block being filled, and an encoded one."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache import stats
from thresher.cache.quality import Tally


@dataclass
class Lane:
    """Rows of one class (kept or special) of a shard: the block being filled and the sums so far."""

    rows: np.ndarray
    """[K] indices into the shard's stream rows."""
    done: int = 0
    """How many of them left in blocks."""
    fill: int = 0
    """How many lie in the block."""
    stage: dict[str, Tensor] = field(default_factory=dict)
    """The block, by site."""
    centre: dict[int, tuple[list[Tensor], np.ndarray, np.ndarray]] = field(default_factory=dict)
    """By width: shift of each site on the device, then shift and scale [S, d] float64, as `stats.of_block` needs."""
    tally: Tally = field(default_factory=Tally)


class EncodedBlock(NamedTuple):
    """An encoded block of all sites of one width, on its way into the shard's buffers."""

    code: int
    start: int
    width: int
    codes: list[Tensor]
    scale: Tensor | None
    """[S, R] float16."""
    norm: Tensor
    """[S, R]."""
    sums: Tensor
    """[S, 3, d]."""
    moments: stats.Moments | None
    """Set for special rows, which are measured in float64."""

    def to_host(self) -> "EncodedBlock":
        """The same in pinned host memory, once the copies that this begins are done."""

        def copy(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

        return self._replace(
            codes=[copy(codes) for codes in self.codes],
            scale=None if self.scale is None else copy(self.scale),
            norm=copy(self.norm),
            sums=copy(self.sums),
        )
