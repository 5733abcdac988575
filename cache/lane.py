"""The rows of one class, kept or special, on their way through a shard, and how rows get to their stored places.

Two encoders do the same work: `cache/host.py` on rows where they lie in a CPU's memory, `cache/blocks.py` on blocks of
rows where they lie on an accelerator. Both take the rows of a lane in their order, and neither the bytes nor the sums
depend on how many of them come at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from thresher.cache.codec import Calibration
from thresher.cache.contracts import Site
from thresher.cache.stats import Sums


class Lane:
    """Rows of one class (kept or special) of a shard, in stream order, and what was added up over them so far."""

    def __init__(self, rows: np.ndarray, at: np.ndarray, sites: Sequence[Site]) -> None:
        self.rows = rows
        """[K] indices into the shard's stream rows."""
        self.at = at
        """[K] stored place of each."""
        self.done = 0
        """How many of them were taken."""
        self.sums = {site.name: Sums(site.width) for site in sites}


Refuse = Callable[[str, Lane, int], NoReturn]
"""Raises UserError for the activation of a site at the index of a lane that cannot be stored."""


class Shelf(NamedTuple):
    """Where the rows of a shard go."""

    sites: tuple[Site, ...]
    buffers: Mapping[str, np.ndarray]
    """By array name: [rows, d] int8 or uint16 (bit patterns of bfloat16), and [rows] float16 scales of int8z."""
    calibrations: Mapping[str, Calibration]
    """By site on the CPU; empty for bf16."""
    device: torch.device
    """Where the activations come from."""
    refuse: Refuse


class Encoder(Protocol):
    """Encodes the rows of a shard's lanes into its buffers and adds up their sums."""

    def add(self, lane: Lane, acts: Mapping[str, Tensor], picked: np.ndarray) -> None:
        """Take the lane's next rows: those at `picked` [K] of the activations [R, width] by site."""
        ...

    def flush(self) -> None:
        """Nothing more comes; called by the thread that adds."""
        ...

    def finish(self) -> None:
        """Wait until every row is in place; any thread may call it, after `flush`."""
        ...

    def close(self) -> None:
        """Let threads go, whatever is left to be done."""
        ...
