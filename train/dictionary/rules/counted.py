"""Rules whose sparsity is a count: TopK per token, BatchTopK over a batch.

BatchTopK learns its frozen threshold on the way, as a running mean of the smallest value each batch kept, and
calibration replaces it by the exact one at the end.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thresher.train.dictionary.rules.base import Rule
from thresher.train.dictionary.rules.registry import register
from thresher.train.kernels import firing, frozen
from thresher.train.kernels.sparse import Selection

if TYPE_CHECKING:
    from thresher.train.dictionary.spec import DictionarySpec


@register
class TopK(Rule):
    """The k largest of each token."""

    name = "topk"
    by_count = bounded = whole_k = True
    thresholded = False

    def __init__(self, spec: "DictionarySpec") -> None:
        super().__init__(spec)
        assert spec.k is not None
        self.k = int(spec.k)

    def select(self, a_NF: Tensor) -> Selection:
        """k entries per token."""
        return firing.select_topk(a_NF, self.k, self.kernels)

    def thresholds(self) -> None:
        """None: the rule is already a matter of one token."""

    def fire_frozen(self, a_NF: Tensor) -> tuple[Selection, Tensor]:
        """The k largest of each token, on a CPU without those that are not positive, which have no code."""
        if not frozen.can_choose(a_NF):
            selection = firing.select_topk(a_NF, self.k)
        elif (found := frozen.largest(a_NF, self.k)) is not None:
            return found
        else:
            selection = firing.compress(firing.plain_topk(a_NF, self.k))  # what is not a number is among the largest
        return selection, selection.take(a_NF).relu_()


@register
class BatchTopK(Rule):
    """The ⌊kN⌋ largest positive entries of the batch."""

    name = "batchtopk"
    by_count = bounded = follows = calibrated = True

    def __init__(self, spec: "DictionarySpec") -> None:
        super().__init__(spec)
        assert spec.k is not None
        self.k = float(spec.k)
        self.decay = spec.threshold_decay
        self.register_buffer("threshold", torch.tensor(float("nan"), dtype=torch.float64))
        self.threshold: Tensor

    def budget(self, tokens: int) -> int:
        """⌊kN⌋."""
        return int(self.k * tokens)

    def select(self, a_NF: Tensor) -> Selection:
        """⌊kN⌋ entries, exactly."""
        return firing.select_batch_topk(a_NF, self.budget(a_NF.shape[0]), self.kernels)

    def observe(self, z: Tensor) -> None:
        """Move the running threshold towards the smallest value this batch kept; the first batch sets it."""
        kept = torch.where(z > 0, z.detach(), torch.inf)
        smallest = kept.min().double() if kept.numel() else torch.full_like(self.threshold, torch.inf)
        moved = torch.where(self.threshold.isnan(), smallest, torch.lerp(smallest, self.threshold, self.decay))
        self.threshold.copy_(torch.where(smallest.isinf(), self.threshold, moved))

    def thresholds(self) -> Tensor:
        """The running threshold for every latent; 0 before the first step."""
        return self.threshold.nan_to_num(nan=0.0).float().expand(self.width)
