"""Rules whose sparsity a penalty sets: ReLU, and JumpReLU with its learned thresholds."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thresher.cache.errors import UserError
from thresher.train.dictionary.rules.base import Rule
from thresher.train.dictionary.rules.registry import register
from thresher.train.kernels import firing
from thresher.train.kernels.padded import wide
from thresher.train.kernels.sparse import Selection

if TYPE_CHECKING:
    from thresher.train.dictionary.spec import DictionarySpec


@register
class ReLU(Rule):
    """Every positive pre-activation."""

    name = "relu"
    penalties = ("l1", "lp")
    shareable = True


@register
class JumpReLU(Rule):
    """Every entry above the latent's learned threshold θ = exp(log_theta)."""

    name = "jumprelu"
    penalties = ("l0", "target_l0", "tanh")
    shareable = True
    uses = ("preact", "theta", "bandwidth", "theta_unit")

    def __init__(self, spec: "DictionarySpec") -> None:
        super().__init__(spec)
        self.initial = (spec.resolved_theta, spec.bandwidth)
        self.raw = spec.theta_unit == "raw"
        self.log_theta = nn.Parameter(torch.zeros(spec.n_latents))
        self.register_buffer("window", torch.tensor(1.0))
        self.window: Tensor

    @classmethod
    def check(cls, settings: Any) -> None:
        """A threshold in raw units has no default: what suits depends on the scale of a."""
        super().check(settings)
        if settings.theta_unit == "raw" and settings.theta is None:
            raise UserError(
                "dictionary.theta is missing: theta_unit = 'raw' needs the initial threshold as a number. Give theta "
                "and bandwidth, or remove theta_unit."
            )

    def start(self, deviation: float, b_enc: Tensor | None = None) -> None:
        """Threshold and window, in units of the pre-activations' standard deviation unless given raw."""
        theta, width = self.initial
        unit = 1.0 if self.raw else deviation
        with torch.no_grad():
            self.log_theta.fill_(torch.tensor(theta * unit).log())
            self.window.fill_(width * unit)

    def adopt(self, theta_F: Tensor, b_enc: Tensor) -> None:
        """log θ; a threshold that is not positive, as a ReLU's, has none and becomes half the gradient's window."""
        self.log_theta.copy_(torch.where(theta_F > 0, theta_F, self.window.double().cpu() / 2).log())

    def theta(self) -> Tensor:
        """[F] thresholds, with gradient to log_theta."""
        return self.log_theta.exp()

    def select(self, a_NF: Tensor) -> Selection | None:
        """Entries above θ − ε/2: those that fire and those close enough to pull the threshold down."""
        floor = (self.theta().detach() - self.window / 2).to(wide(a_NF.dtype))
        return firing.select_above(a_NF, floor, self.room, kernels=self.kernels)

    def fire(self, a: Tensor, selection: Selection | None, b_enc: Tensor) -> tuple[Tensor, Tensor | None]:
        """a · 1[a > θ] and 1[a > θ], with window gradients."""
        return firing.jump_relu(a, self.theta(), self.window, selection)

    def thresholds(self) -> Tensor:
        """θ."""
        return self.theta().detach().float()
