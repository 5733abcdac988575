"""What every firing rule is to the encoder, and the one form that most of them freeze to.

A rule answers two questions. In training, which entries of the batch are looked at (`select`) and what they become
(`fire`). At inference, which entries fire when each token must decide alone (`fire_frozen`): rules that count per
token do the same again; the others compare with a threshold per latent, found in training and, where the rule counts
over a batch, replaced by the exact one at the end (train/calibrate.py).

`Deployed` is what a saved dictionary carries: a constant threshold per latent on raw activations.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from thresher.cache.errors import UserError
from thresher.train.kernels import firing
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.padded import Room, wide
from thresher.train.kernels.sparse import Selection

if TYPE_CHECKING:
    from thresher.train.dictionary.spec import DictionarySpec


class Rule(nn.Module):
    """A firing rule. As it stands here: every positive pre-activation fires."""

    name: ClassVar[str] = ""
    """What a recipe calls it."""
    by_count: ClassVar[bool] = False
    """Whether `k` sets its sparsity; then no penalty does."""
    whole_k: ClassVar[bool] = False
    """Whether k must be a whole number."""
    penalties: ClassVar[tuple[str, ...]] = ()
    """Sparsity penalties that it admits, its default first."""
    thresholded: ClassVar[bool] = True
    """Whether it freezes to a constant threshold per latent: then a saved dictionary needs none of its code."""
    calibrated: ClassVar[bool] = False
    """Whether that threshold is set after training, such that k latents per token exceed it."""
    follows: ClassVar[bool] = False
    """Whether `observe` has to see each step's codes."""
    bounded: ClassVar[bool] = False
    """Whether the number of entries is known before they are selected."""

    def __init__(self, spec: "DictionarySpec") -> None:
        super().__init__()
        self.width = spec.n_latents
        self.kernels = Kernels()
        self.room = None if self.bounded else Room()

    @classmethod
    def check(cls, settings: Any) -> None:
        """Raise UserError for settings (those of a recipe's [dictionary] table) that make no sense with this rule."""
        if settings.preact > 0:
            raise UserError(f"dictionary.preact is for firing = 'jumprelu'; got firing = {cls.name!r}. Remove it.")

    def budget(self, tokens: int) -> int | None:
        """Entries that a batch of so many tokens may keep in all, where its tokens compete; None: they do not."""
        return None

    def select(self, a_NF: Tensor) -> Selection | None:
        """Entries that training looks at; None for all."""
        return firing.select_above(a_NF, 0.0, self.room, kernels=self.kernels)

    def fire(self, a: Tensor, selection: Selection | None) -> tuple[Tensor, Tensor | None]:
        """Codes of the selected pre-activations, and for a learned threshold its 0/1 gate; both with gradients."""
        return torch.relu(a), None

    def observe(self, z: Tensor) -> None:
        """Take note of one training step's codes."""

    def start(self, deviation: float) -> None:
        """Set initial state; `deviation` is the standard deviation of the initial pre-activations."""

    def thresholds(self) -> Tensor | None:
        """[F] frozen thresholds in training space; None for a rule that has no such form."""
        return torch.zeros(self.width)

    def fire_frozen(self, a_NF: Tensor) -> tuple[Selection, Tensor]:
        """Entries that fire at inference, every token on its own, and their codes [A]."""
        theta = self.thresholds()
        assert theta is not None, "a rule without thresholds selects in a way of its own"
        selection, values = firing.select_frozen(a_NF, theta.to(a_NF.device, wide(a_NF.dtype)))
        return selection, values.relu_()


class Deployed(Rule):
    """A constant threshold per latent, as saved with the weights."""

    bounded = True

    def __init__(self, spec: "DictionarySpec") -> None:
        super().__init__(spec)
        self.register_buffer("threshold", torch.zeros(spec.n_latents))
        self.threshold: Tensor

    def thresholds(self) -> Tensor:
        """[F], on raw activations."""
        return self.threshold
