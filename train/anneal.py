"""The annealed power penalty of ReLU dictionaries: an L1 penalty that turns towards a count in the course of training.

After Karvonen et al. 2024, arXiv:2408.00113. With u_f = z_f n_f,

    λ · r · L_p,      L_p = ⟨Σ_f (u_f + δ)^p − δ^p⟩

p is 1 for the first `p_start` steps and then falls to `p_end` > 0 in `p_updates` equal steps, evenly spread over the
rest of the run. So that the penalty keeps its size, each of them multiplies r, which begins at 1, by
mean(L_p) / mean(L_next) over the last 10 optimiser steps, L_next being the same with the next p. δ > 0 keeps the
gradient at 0 finite, which that of z^p is not. At p = 1 the penalty is the L1 penalty itself.

p, r and the sums of those means are buffers of the dictionary in training, so they are in its checkpoints.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from thresher.cache.errors import UserError

if TYPE_CHECKING:
    from thresher.train.dictionary.spec import DictionarySpec

WINDOW = 10
"""Optimiser steps over which the two penalties are compared."""


class Anneal(nn.Module):
    """The exponent and the factor that goes with it."""

    def __init__(self, spec: "DictionarySpec") -> None:
        super().__init__()
        self.end, self.start, self.updates, self.offset = spec.p_end, spec.p_start, spec.p_updates, spec.p_offset
        self.register_buffer("p", torch.tensor(1.0))
        self.register_buffer("next_p", torch.tensor(self.exponent(1)))
        self.register_buffer("factor", torch.tensor(1.0))
        self.register_buffer("sums", torch.zeros(2))
        self.p: Tensor
        self.next_p: Tensor
        self.factor: Tensor
        self.sums: Tensor
        """[2] Σ L_p and Σ L_next over the steps of the window so far."""
        self.heard: Tensor | None = None
        """[2] the same by the parts of the step in progress; of ranks that share latents, of their own until they meet
        (train/meeting.py)."""

    def exponent(self, update: int) -> float:
        """p after so many updates."""
        return 1 - (1 - self.end) * min(update, self.updates) / self.updates

    def steps(self, total: int) -> list[int]:
        """Steps done before each update, in a run of `total` steps.

        Raises UserError when the run is too short for them.
        """
        if total - self.start < self.updates:
            raise UserError(
                f"dictionary.p_start is {self.start} and p_updates is {self.updates}, but the run has {total} steps, "
                "too few for every update to come at a step of its own. Lower p_start or p_updates, or train longer."
            )
        return [self.start + update * (total - self.start) // self.updates for update in range(self.updates)]

    def listens(self, done: int, total: int) -> bool:
        """Whether the step after `done` others is one of those before an update that are to be measured."""
        return any(step - WINDOW <= done < step for step in self.steps(total))

    def penalty(self, u: Tensor) -> Tensor:
        """r · Σ (u + δ)^p − δ^p over all entries of u ≥ 0, with gradient to u."""
        return self.factor * self.power(u, self.p)

    def power(self, u: Tensor, p: Tensor) -> Tensor:
        """Σ (u + δ)^p − δ^p."""
        delta = torch.full_like(p, self.offset)
        return ((u + delta).pow(p) - delta.pow(p)).sum()

    @torch.no_grad()
    def hear(self, us: Sequence[Tensor], tokens: int) -> None:
        """Measure a step's batch, or a part of it; us: z n by source, `tokens`: N of the whole batch."""
        values = [torch.stack([self.power(u, p) for u in us]).mean() / tokens for p in (self.p, self.next_p)]
        heard = torch.stack(values)
        self.heard = heard if self.heard is None else self.heard + heard

    @torch.no_grad()
    def advance(self, done: int, total: int, left_out: Tensor | None = None) -> None:
        """Go on by the step after `done` others; `left_out`: bool scalar, whether its update was."""
        heard, self.heard = self.heard, None
        if heard is not None:
            self.sums += heard if left_out is None else heard.where(~left_out, 0.0)
        steps = self.steps(total)
        if done + 1 in steps:
            self.factor *= torch.where(self.sums[1] > 0, self.sums[0] / self.sums[1], 1.0)
            self.p.copy_(self.next_p)
            self.next_p.fill_(self.exponent(steps.index(done + 1) + 2))
            self.sums.zero_()
