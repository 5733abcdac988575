"""What every firing rule is to the encoder, and the one form that most of them freeze to.

A rule answers two questions. In training, which entries of the batch are looked at (`select`) and what they become
(`fire`). At inference, which entries fire when each token must decide alone (`fire_frozen`): rules that count per
token do the same again; the others compare with a threshold per latent, found in training and, where the rule counts
over a batch, replaced by the exact one at the end (train/calibrate.py).

`Deployed` is what a saved dictionary carries: a constant threshold per latent on raw activations.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from thresher.cache.errors import UserError
from thresher.train.dictionary.rules.registry import users
from thresher.train.kernels import firing
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.padded import Room, wide
from thresher.train.kernels.sparse import Selection

if TYPE_CHECKING:
    from thresher.train.dictionary.coder import Coder, Pass
    from thresher.train.dictionary.encoder import Fired
    from thresher.train.dictionary.spec import DictionarySpec
    from thresher.train.kernels.residual import Left

SPECIAL: dict[str, Any] = {
    "preact": 0.0, "theta_unit": "spread", "pool": "layer", "rank_by": "activation", "k_anneal": 0, "k_start": "auto",
}  # fmt: skip
"""Settings that only some rules have a use for (`Rule.uses`), with the values that stand for not given."""


class Line(NamedTuple):
    """Codes that are not the pre-activations themselves: slope · a + lift, cut off below 0."""

    slope: Tensor
    """[F], above 0."""
    lift: Tensor
    """[F]."""


class Seen(NamedTuple):
    """What a rule that follows the training is told of one step's batch.

    All of it adds up, or is the least, over parts of a batch: so a step in parts, or on several ranks, tells the same.
    """

    smallest: Tensor
    """Scalar float64: the smallest score of the entries that fired; infinite when none did."""
    active: Tensor
    """Scalar: how many fired."""
    tokens: int
    """N."""
    woken: Tensor | None = None
    """Scalar: entries of dead latents that exceeded `aux_floor`; None: it has none, or no latent is dead."""


def seen(scores: Tensor, tokens: int, woken: Tensor | None = None) -> Seen:
    """Of scores [A] of the entries of a batch; 0 for one that did not fire."""
    kept = torch.where(scores > 0, scores.detach(), torch.inf)
    smallest = kept.min().double() if kept.numel() else kept.new_full((), torch.inf, dtype=torch.float64)
    return Seen(smallest, (scores > 0).sum(), tokens, woken)


def merged(parts: Sequence[Seen]) -> Seen:
    """Of the parts of one batch."""
    counts = [part.woken for part in parts if part.woken is not None]
    return Seen(
        torch.stack([part.smallest for part in parts]).min(),
        torch.stack([part.active for part in parts]).sum(),
        sum(part.tokens for part in parts),
        torch.stack(counts).sum() if counts else None,
    )


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
    uses: ClassVar[tuple[str, ...]] = ()
    """Which of the settings in `SPECIAL` mean something to it."""
    shareable: ClassVar[bool] = False
    """Whether several processes may hold its latents in shares: it selects every entry by itself, or by count as
    `budget` and `per_token` say, and what it gathers of a step is a `Seen`."""
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
        for name, default in SPECIAL.items():
            value = getattr(settings, name)
            if value != default and name not in cls.uses:
                raise UserError(
                    f"dictionary.{name} is {value!r} with firing = {cls.name!r}, which has no use for it; expected "
                    f"{', '.join(users(name))}. Remove it or change firing."
                )

    @classmethod
    def check_size(cls, spec: "DictionarySpec") -> None:
        """Raise UserError where the resolved sizes do not suit the rule."""

    def at(self, step: int) -> None:
        """Be as in the training step of that number, counted from 0: schedules are functions of it alone."""

    def budget(self, tokens: int) -> int | None:
        """Entries that a batch of so many tokens may keep in all, where its tokens compete; None: they do not."""
        return None

    def per_token(self) -> int | None:
        """Entries of every token that are kept, the largest of all its latents; None: it does not count so."""
        return None

    def select(self, a_NF: Tensor) -> Selection | None:
        """Entries that training looks at; None for all."""
        return firing.select_above(a_NF, 0.0, self.room, kernels=self.kernels)

    def fire(self, a: Tensor, selection: Selection | None, b_enc: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes of the selected pre-activations, and for a learned threshold its 0/1 gate; both with gradients.

        `b_enc` [F] is the encoder's bias, as far as a rule has to know its part in a.
        """
        return torch.relu(a), None

    def penalised(self, a: Tensor, z: Tensor) -> Tensor:
        """What an L1 penalty sums at the selected entries, of their pre-activations and codes."""
        return z

    def terms(self, coder: "Coder", done: "Pass", lefts: Sequence["Left"], divisors: Sequence[float]) -> Tensor | None:
        """Further terms of the loss; None: it has none.

        `lefts`: what the pass `done` left of every destination; `divisors`: what makes of Σ‖e‖² there a loss in the
        unit of the reconstruction.
        """
        return None

    def decoded_terms(self, coder: "Coder", fired: "Sequence[Fired]", zero_NSE: Tensor) -> Tensor | None:
        """[N, S, E] what `terms` decode of codes, on top of zeros: the sum over latents that ranks which share them
        give `terms` in `Pass.sums`; None: nothing."""
        return None

    def observe(self, seen: Seen) -> None:
        """Take note of one training step; scores are codes, unless latents are ranked by norm."""

    def start(self, deviation: float, b_enc: Tensor | None = None) -> None:
        """Set initial state; `deviation` is the standard deviation of the initial pre-activations."""

    def adopt(self, theta_F: Tensor, b_enc: Tensor) -> None:
        """Go on from thresholds [F] float64 that another run froze to, on pre-activations with the bias `b_enc` [F],
        which may change; after `start`, without gradient. Whoever learns no threshold has no use for them."""

    def line(self, b_enc: Tensor) -> Line | None:
        """How codes follow from pre-activations, where they are not the same."""
        return None

    def aux_floor(self) -> Tensor | None:
        """A threshold that AuxK wakes dead latents by; None: it takes the k_aux largest of each token."""
        return None

    def thresholds(self) -> Tensor | None:
        """[F] thresholds that a training-space score has to exceed; None for a rule that has no such form."""
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
