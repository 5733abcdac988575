"""One threshold for all latents, which a controller moves until k latents fire per token.

z = a · 1[a > θ]. The first batch is taken as BatchTopK would, and the smallest value it kept is θ. After each step θ is
multiplied by 1 + r where L0 > k and divided by it otherwise, r = .001 · |L0 − k| and at most .1. Dead latents have a
threshold of their own, θ_aux: .01 θ at first, never below 1e-6, driven the same way to k_aux entries per token; AuxK
then wakes what exceeds it, in place of the k_aux largest.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.train.counting import entries
from thresher.train.dictionary.rules.base import Rule, Seen
from thresher.train.dictionary.rules.counted import count_of
from thresher.train.dictionary.rules.registry import register
from thresher.train.kernels import firing
from thresher.train.kernels.padded import wide
from thresher.train.kernels.sparse import Selection

if TYPE_CHECKING:
    from thresher.train.dictionary.spec import DictionarySpec

_RATE = 1e-3
"""Share by which a threshold moves for each latent that too many or too few fire."""
_LARGEST = 0.1
"""Largest such share in one step."""
_FLOOR = 1e-6
"""Smallest θ_aux."""


@register
class Global(Rule):
    """Every entry above one threshold, driven to k per token."""

    name = "global"
    by_count = follows = calibrated = shareable = True
    uses = ("k_anneal", "k_start")

    def __init__(self, spec: "DictionarySpec") -> None:
        super().__init__(spec)
        self.count = count_of(spec)
        self.k, self.aux_k, self.step = self.count.last, spec.resolved_aux_k, 0
        for name in ("threshold", "aux_threshold"):
            self.register_buffer(name, torch.tensor(float("nan"), dtype=torch.float64))
        self.threshold: Tensor
        self.aux_threshold: Tensor

    @classmethod
    def check(cls, settings: Any) -> None:
        """AuxK goes by a threshold here, which dead latents of all layers do not share."""
        super().check(settings)
        if settings.aux_scope == "all" and settings.aux > 0:
            raise UserError(
                "dictionary.aux_scope is 'all' with firing = 'global', whose layers have a threshold each for their "
                "dead latents. Set aux_scope = 'own', or aux = 0."
            )

    def adopt(self, theta_F: Tensor, b_enc: Tensor) -> None:
        """One for all latents."""
        self.threshold.copy_(theta_F.mean())
        self.aux_threshold.copy_((0.01 * self.threshold).clamp_min(_FLOOR))

    def at(self, step: int) -> None:
        """k of the step, and whether there is a threshold already."""
        self.k, self.step = self.count.at(step), step

    def budget(self, tokens: int) -> int | None:
        """⌊kN⌋ for the first batch."""
        return entries(self.k, tokens) if self.step == 0 else None

    def select(self, a_NF: Tensor) -> Selection | None:
        """Entries above the threshold; of the first batch the ⌊kN⌋ largest."""
        budget = self.budget(a_NF.shape[0])
        if budget is not None:
            return firing.select_batch_topk(a_NF, min(budget, a_NF.numel()), self.kernels)
        floor_F = self.thresholds().to(wide(a_NF.dtype)).contiguous()  # kernels read one number per latent
        return firing.select_above(a_NF, floor_F, self.room, kernels=self.kernels)

    def fire(self, a: Tensor, selection: Selection | None, b_enc: Tensor) -> tuple[Tensor, Tensor | None]:
        """a · 1[a > θ]."""
        if self.step == 0:
            return torch.relu(a), None
        return a * (a.detach() > self.thresholds()[0].to(a.dtype)), None

    def observe(self, seen: Seen) -> None:
        """Move both thresholds; the first batch sets them."""
        smallest, new, tokens = seen.smallest, self.threshold.isnan(), max(seen.tokens, 1)
        active = seen.active / tokens
        driven = _driven(self.threshold, active - self.k)
        self.threshold.copy_(torch.where(new, torch.where(smallest.isinf(), self.threshold, smallest), driven))
        aux = self.aux_threshold
        if seen.woken is not None:
            aux = _driven(aux, seen.woken / tokens - self.aux_k)
        self.aux_threshold.copy_(torch.where(new, 0.01 * self.threshold, aux).clamp_min(_FLOOR))

    def aux_floor(self) -> Tensor:
        """θ_aux; its smallest value before the first step."""
        return self.aux_threshold.nan_to_num(nan=_FLOOR)

    def thresholds(self) -> Tensor:
        """θ for every latent; 0 before the first step."""
        return self.threshold.nan_to_num(nan=0.0).float().expand(self.width)


def _driven(threshold: Tensor, excess: Tensor) -> Tensor:
    """A threshold after one step in which so many entries per token were too many."""
    share = 1 + (_RATE * excess.abs()).clamp_max(_LARGEST)
    return torch.where(excess > 0, threshold * share, threshold / share)
