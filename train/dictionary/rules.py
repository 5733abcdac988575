"""The firing rules as parts of an encoder: their parameters, their running state, and how they select.

A rule answers two questions. In training, which entries of the batch are looked at (`select`) and what they become
(`fire`). At inference, which entries fire when each token must decide alone (`fire_frozen`): TopK is the same; the
others compare with a threshold per latent. BatchTopK learns that threshold on the way, as a running mean of the
smallest value each batch kept, and calibration replaces it by the exact one at the end (train/calibrate.py).

`Deployed` is what a saved dictionary carries: a constant threshold per latent on raw activations.
"""

import torch
from torch import Tensor, nn

from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.kernels import firing, frozen
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.padded import Room, wide
from thresher.train.kernels.sparse import Selection


class ReLU(nn.Module):
    """Every positive pre-activation."""

    counted = False
    """Whether the number of entries is known before they are selected."""

    def __init__(self, spec: DictionarySpec) -> None:
        super().__init__()
        self.width = spec.n_latents
        self.kernels = Kernels()
        self.room = None if self.counted else Room()

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
        """[F] frozen thresholds in training space; None for a rule that keeps a count per token."""
        return torch.zeros(self.width)

    def fire_frozen(self, a_NF: Tensor) -> tuple[Selection, Tensor]:
        """Entries that fire at inference, every token on its own, and their codes [A]."""
        theta = self.thresholds()
        assert theta is not None
        selection, values = firing.select_frozen(a_NF, theta.to(a_NF.device, wide(a_NF.dtype)))
        return selection, values.relu_()


class TopK(ReLU):
    """The k largest of each token."""

    counted = True

    def __init__(self, spec: DictionarySpec) -> None:
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


class BatchTopK(ReLU):
    """The ⌊kN⌋ largest positive entries of the batch."""

    counted = True

    def __init__(self, spec: DictionarySpec) -> None:
        super().__init__(spec)
        assert spec.k is not None
        self.k = float(spec.k)
        self.decay = spec.threshold_decay
        self.register_buffer("threshold", torch.tensor(float("nan"), dtype=torch.float64))
        self.threshold: Tensor

    def select(self, a_NF: Tensor) -> Selection:
        """⌊kN⌋ entries, exactly."""
        return firing.select_batch_topk(a_NF, int(self.k * a_NF.shape[0]), self.kernels)

    def observe(self, z: Tensor) -> None:
        """Move the running threshold towards the smallest value this batch kept; the first batch sets it."""
        kept = torch.where(z > 0, z.detach(), torch.inf)
        smallest = kept.min().double() if kept.numel() else torch.full_like(self.threshold, torch.inf)
        moved = torch.where(self.threshold.isnan(), smallest, torch.lerp(smallest, self.threshold, self.decay))
        self.threshold.copy_(torch.where(smallest.isinf(), self.threshold, moved))

    def thresholds(self) -> Tensor:
        """The running threshold for every latent; 0 before the first step."""
        return self.threshold.nan_to_num(nan=0.0).float().expand(self.width)


class JumpReLU(ReLU):
    """Every entry above the latent's learned threshold θ = exp(log_theta)."""

    def __init__(self, spec: DictionarySpec) -> None:
        super().__init__(spec)
        self.relative = (spec.resolved_theta, spec.bandwidth)
        self.log_theta = nn.Parameter(torch.zeros(spec.n_latents))
        self.register_buffer("window", torch.tensor(1.0))
        self.window: Tensor

    def start(self, deviation: float) -> None:
        """Threshold and window in units of the pre-activations' standard deviation."""
        theta, width = self.relative
        with torch.no_grad():
            self.log_theta.fill_(torch.tensor(theta * deviation).log())
            self.window.fill_(width * deviation)

    def theta(self) -> Tensor:
        """[F] thresholds, with gradient to log_theta."""
        return self.log_theta.exp()

    def select(self, a_NF: Tensor) -> Selection | None:
        """Entries above θ − ε/2: those that fire and those close enough to pull the threshold down."""
        floor = (self.theta().detach() - self.window / 2).to(wide(a_NF.dtype))
        return firing.select_above(a_NF, floor, self.room, kernels=self.kernels)

    def fire(self, a: Tensor, selection: Selection | None) -> tuple[Tensor, Tensor | None]:
        """a · 1[a > θ] and 1[a > θ], with window gradients."""
        return firing.jump_relu(a, self.theta(), self.window, selection)

    def thresholds(self) -> Tensor:
        """θ."""
        return self.theta().detach().float()


class Deployed(ReLU):
    """A constant threshold per latent, as saved with the weights."""

    counted = True

    def __init__(self, spec: DictionarySpec) -> None:
        super().__init__(spec)
        self.register_buffer("threshold", torch.zeros(spec.n_latents))
        self.threshold: Tensor

    def thresholds(self) -> Tensor:
        """[F], on raw activations."""
        return self.threshold


RULES: dict[str, type[ReLU]] = {"relu": ReLU, "topk": TopK, "batchtopk": BatchTopK, "jumprelu": JumpReLU}


def rule(spec: DictionarySpec, deployed: bool) -> ReLU:
    """The rule a spec names; deployed, every rule but TopK is a constant threshold."""
    if deployed and spec.firing != "topk":
        return Deployed(spec)
    return RULES[spec.firing](spec)
