"""Which contexts a step takes, and which of their positions are patched and scored.

Training end to end consumes whole contexts of the cache's training split. Their order is one permutation per epoch, a
function of seed and epoch alone, so the place in it is one integer and going on from a checkpoint is exact. Contexts
without a scored position are left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.patching import Positions, patch_mask, score_mask


class Part(NamedTuple):
    """Some contexts of a step."""

    tokens: Tensor
    """[B, T] int64."""
    at: Positions
    """Positions in P and the others, of the flattened contexts."""
    scored: Tensor
    """[M] int64: source positions in S, of the flattened contexts."""
    following: Tensor
    """[M] int64: the token that follows each."""
    contexts: np.ndarray
    """[B] int64: their numbers in the split."""

    @property
    def patched(self) -> Tensor:
        """[N] int64: positions in P."""
        return self.at.patched


class Step(NamedTuple):
    """The contexts of one step, in parts."""

    parts: list[Part]
    patched: int
    """Positions in P of all parts."""
    scored: int
    """Positions in S of all parts."""


class Text:
    """The training contexts that can be scored, in order."""

    def __init__(self, contexts: Contexts, seed: int, device: torch.device, cached: np.ndarray | None = None) -> None:
        """`cached`, [M, T] bool: positions whose rows are at hand, where others may not be patched.

        Raises UserError when nothing can be scored.
        """
        self.seed, self.device = seed, device
        self.token = contexts.token_id
        self.patch, self.score = patch_mask(contexts), score_mask(contexts)
        if cached is not None:
            self.patch &= cached
            self.score &= cached
        self.usable = np.flatnonzero(self.score.any(axis=1))
        if not len(self.usable):
            raise UserError(
                f"The training contexts ({self.token.shape[0]} rows of {self.token.shape[1]} tokens) hold no position "
                "that can be scored: expected at least one kept token followed by a real token of the same document. "
                "Harvest more text, or longer contexts."
            )

    @property
    def length(self) -> int:
        """T."""
        return int(self.token.shape[1])

    @property
    def rows(self) -> int:
        """Positions of one epoch."""
        return len(self.usable) * self.length

    def numbers(self, start: int, count: int) -> np.ndarray:
        """[count] the contexts at places `start`, `start` + 1, … of the endless order."""
        places, size = np.arange(start, start + count), len(self.usable)
        epochs = range(start // size, (start + count - 1) // size + 1)
        order = np.concatenate([self._epoch(epoch) for epoch in epochs])
        return order[places - epochs[0] * size]

    def _epoch(self, epoch: int) -> np.ndarray:
        """The order of one epoch; the last one asked for is kept."""
        kept: tuple[int, np.ndarray] | None = self.__dict__.get("_kept")
        if kept is None or kept[0] != epoch:
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            kept = self.__dict__["_kept"] = (epoch, self.usable[rng.permutation(len(self.usable))])
        return kept[1]

    def step(self, start: int, count: int, part: int | None = None) -> Step:
        """`count` contexts from place `start` on, in parts of up to `part` contexts; None: one part."""
        numbers = self.numbers(start, count)
        size = count if part is None else part
        parts = [self._part(numbers[first : first + size]) for first in range(0, count, size)]
        return Step(parts, _total([part.patched for part in parts]), _total([part.scored for part in parts]))

    def _part(self, numbers: np.ndarray) -> Part:
        token_BT = torch.from_numpy(self.token[numbers].astype(np.int64))
        patch_BT, score_BT = self.patch[numbers], self.score[numbers]
        patched_N, others_M, scored_M = map(_places, (patch_BT, ~patch_BT, score_BT))
        next_M = token_BT.flatten()[scored_M + 1]  # S has no last position, so the next one is of the same context
        tensors = (token_BT, patched_N, others_M, scored_M, next_M)
        token_BT, patched_N, others_M, scored_M, next_M = (t.to(self.device, non_blocking=True) for t in tensors)
        return Part(token_BT, Positions(patched_N, others_M), scored_M, next_M, numbers)


def _places(mask_BT: np.ndarray) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask_BT))


def _total(places: Sequence[Tensor]) -> int:
    return sum(int(one.shape[0]) for one in places)
