"""Rules whose sparsity is a count: TopK and GroupMax per token, BatchTopK over a batch, of one layer or of all.

BatchTopK learns its frozen threshold on the way, as a running mean of the smallest score each batch kept, and
calibration replaces it by the exact one at the end. Scores are pre-activations a_f, or a_f n_f where a recipe ranks by
the decoder norm n_f; codes are a_f either way. k may start high and come down in a straight line (`Count`).
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.train.counting import entries
from thresher.train.dictionary.rules.base import Rule, Seen
from thresher.train.dictionary.rules.registry import register
from thresher.train.kernels import firing, frozen
from thresher.train.kernels.sparse import Selection

if TYPE_CHECKING:
    from thresher.train.dictionary.spec import DictionarySpec


class Count(NamedTuple):
    """k as a function of the optimiser step."""

    last: float
    first: float
    steps: int
    """Steps over which it comes down; 0: it is what it is."""

    def at(self, step: int) -> float:
        """k in the step of that number, counted from 0."""
        if step >= self.steps:
            return self.last
        return self.first + (self.last - self.first) * step / self.steps


def count_of(spec: "DictionarySpec") -> Count:
    """The schedule that a spec names."""
    assert spec.k is not None
    return Count(spec.k, spec.resolved_k_start, spec.k_anneal)


class PerToken(Rule):
    """A whole number of entries of every token, chosen from that token alone: the same in training and when served."""

    by_count = bounded = whole_k = shareable = True
    thresholded = False
    uses = ("rank_by", "k_anneal", "k_start")

    def __init__(self, spec: "DictionarySpec") -> None:
        super().__init__(spec)
        self.count = count_of(spec)
        self.k = int(self.count.last)

    def thresholds(self) -> None:
        """None: the rule is already a matter of one token."""


@register
class TopK(PerToken):
    """The k largest of each token."""

    name = "topk"

    def at(self, step: int) -> None:
        """k of the step, rounded."""
        self.k = round(self.count.at(step))

    def select(self, a_NF: Tensor) -> Selection:
        """k entries per token, of a share of the latents as many at most."""
        return firing.select_topk(a_NF, min(self.k, a_NF.shape[1]), self.kernels)

    def per_token(self) -> int:
        """k."""
        return self.k

    def fire_frozen(self, a_NF: Tensor) -> tuple[Selection, Tensor]:
        """The k largest of each token, on a CPU without those that are not positive, which have no code."""
        k = min(self.k, a_NF.shape[1])
        if not frozen.can_choose(a_NF):
            selection = firing.select_topk(a_NF, k)
        elif (found := frozen.largest(a_NF, k)) is not None:
            return found
        else:
            selection = firing.compress(firing.plain_topk(a_NF, k))  # what is not a number is among the largest
        return selection, selection.take(a_NF).relu_()


@register
class GroupMax(PerToken):
    """The largest of each of k groups of neighbouring latents."""

    name = "groupmax"

    @classmethod
    def check_size(cls, spec: "DictionarySpec") -> None:
        """Groups are of one size."""
        if spec.k is not None and spec.n_latents % int(spec.k):
            raise UserError(
                f"dictionary.k is {spec.k:g} with firing = 'groupmax' and {spec.n_latents} latents, which do not part "
                f"into {spec.k:g} groups of one size. Choose k so that it divides n_latents."
            )

    def at(self, step: int) -> None:
        """k of the step, or the next larger number that divides F."""
        self.k = next(k for k in range(round(self.count.at(step)), self.width + 1) if self.width % k == 0)

    def select(self, a_NF: Tensor) -> Selection:
        """k entries per token, one per group."""
        return firing.select_groupmax(a_NF, self.k, self.kernels)

    def fire_frozen(self, a_NF: Tensor) -> tuple[Selection, Tensor]:
        """As in training."""
        selection = firing.select_groupmax(a_NF, self.k)
        return selection, selection.take(a_NF).relu_()


@register
class BatchTopK(Rule):
    """The ⌊kN⌋ largest positive entries of the batch; of all L layers together the ⌊kNL⌋ largest."""

    name = "batchtopk"
    by_count = bounded = follows = calibrated = shareable = True
    uses = ("pool", "rank_by", "k_anneal", "k_start", "threshold_decay")

    def __init__(self, spec: "DictionarySpec") -> None:
        super().__init__(spec)
        self.count = count_of(spec)
        self.k = self.count.last
        self.sharing = len(spec.reads) if spec.pool == "joint" else 1
        self.decay = spec.threshold_decay
        self.by_norm = spec.rank_by == "norm"
        self.register_buffer("threshold", torch.tensor(float("nan"), dtype=torch.float64))
        self.threshold: Tensor

    def adopt(self, theta_F: Tensor, b_enc: Tensor) -> None:
        """The running threshold, one for all latents; ranked by norm the scores are others, and the first batch sets
        it."""
        if not self.by_norm:
            self.threshold.copy_(theta_F.mean())

    def at(self, step: int) -> None:
        """k of the step."""
        self.k = self.count.at(step)

    def budget(self, tokens: int) -> int:
        """⌊kN⌋, or ⌊kNL⌋ of all layers together."""
        return entries(self.k, tokens * self.sharing)

    def select(self, a_NF: Tensor) -> Selection:
        """As many entries as the batch may keep, exactly; of a joint pool, candidates for them."""
        return firing.select_batch_topk(a_NF, min(self.budget(a_NF.shape[0]), a_NF.numel()), self.kernels)

    def observe(self, seen: Seen) -> None:
        """Move the running threshold towards the smallest score this batch kept; the first batch sets it."""
        smallest = seen.smallest
        moved = torch.where(self.threshold.isnan(), smallest, torch.lerp(smallest, self.threshold, self.decay))
        self.threshold.copy_(torch.where(smallest.isinf(), self.threshold, moved))

    def thresholds(self) -> Tensor:
        """The running threshold for every latent; 0 before the first step."""
        return self.threshold.nan_to_num(nan=0.0).float().expand(self.width)
