"""Gated: one product, two readings of it. Which latents fire, and how strongly, have biases of their own.

After Rajamanoharan et al. 2024, arXiv:2404.16014. With π = W_enc (x − b_dec), the pre-bias being an SAE's,

    π_g = π + b_gate        π_m = exp(r) ⊙ π + b_mag        z = 1[π_g > 0] relu(π_m)

The encoder's own bias is b_gate, so its pre-activation is π_g, and selecting and AuxK see the gate. The step gives no
gradient; the gate learns from an L1 penalty on relu(π_g) and from the reconstruction that relu(π_g) alone
would make, ⟨‖y − sg(W_dec)ᵀ relu(π_g) − sg(b_dec)‖²⟩, which teaches no decoder.

π_m is a line in π_g: exp(r) π_g + (b_mag − exp(r) b_gate). So the rule freezes exactly to a constant threshold: rows
exp(r) W_enc, bias b_mag − exp(r) W_enc b_dec, θ = max(0, b_mag − exp(r) b_gate).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from thresher.train.dictionary.rules.base import Line, Rule
from thresher.train.dictionary.rules.registry import register
from thresher.train.kernels.sparse import Selection, add_decoded, spread

if TYPE_CHECKING:
    from thresher.train.dictionary.coder import Coder, Pass
    from thresher.train.dictionary.encoder import Fired
    from thresher.train.dictionary.spec import DictionarySpec
    from thresher.train.kernels.residual import Left


@register
class Gated(Rule):
    """Positive gates, with a scale and a bias for their magnitudes."""

    name = "gated"
    penalties = ("l1",)
    shareable = True

    def __init__(self, spec: "DictionarySpec") -> None:
        super().__init__(spec)
        self.r = nn.Parameter(torch.zeros(spec.n_latents))
        self.b_mag = nn.Parameter(torch.zeros(spec.n_latents))

    @torch.no_grad()
    def start(self, deviation: float, b_enc: Tensor | None = None) -> None:
        """Magnitudes start as what the gates see."""
        self.r.zero_()
        if b_enc is not None:
            self.b_mag.copy_(b_enc)

    def adopt(self, theta_F: Tensor, b_enc: Tensor) -> None:
        """π > θ is a gate with the bias less θ."""
        self.b_mag.copy_(b_enc)
        b_enc.sub_(theta_F.to(b_enc))

    def line(self, b_enc: Tensor) -> Line:
        """π_m from π_g."""
        slope = self.r.exp()
        return Line(slope, self.b_mag - slope * b_enc)

    def fire(self, a: Tensor, selection: Selection | None, b_enc: Tensor) -> tuple[Tensor, Tensor | None]:
        """1[π_g > 0] relu(π_m)."""
        slope, lift = self.line(b_enc)
        z = torch.relu(spread(slope, selection) * a + spread(lift, selection))
        return z * (a.detach() > 0), None

    def penalised(self, a: Tensor, z: Tensor) -> Tensor:
        """relu(π_g)."""
        return torch.relu(a)

    def decoded_terms(self, coder: "Coder", fired: "Sequence[Fired]", zero_NSE: Tensor) -> Tensor:
        """[N, S, E] what gates decode to, less what codes do."""
        for source, part in enumerate(fired):
            change = torch.relu(part.a) - part.z.detach()
            W_dec, first = coder.W_dec[source].detach(), coder.written(source).start
            zero_NSE = add_decoded(zero_NSE, change, W_dec, part.selection, first, coder.kernels)
        return zero_NSE

    def terms(self, coder: "Coder", done: "Pass", lefts: Sequence["Left"], divisors: Sequence[float]) -> Tensor:
        """The reconstruction from the gates, the mean over destinations.

        It differs from the pass's by the decoded difference of codes, whatever else a topology adds to its output; so
        what it leaves is the pass's residual less that.
        """
        assert len(lefts) == done.y.shape[1], "gates learn from residuals, whatever else is trained on"
        known = None if done.sums is None else done.sums.rule
        change_NSE = (
            self.decoded_terms(coder, done.fired, torch.zeros_like(done.y.detach())) if known is None else known
        )
        errors = [(left.residual - change_NSE[:, index]).square().sum() for index, left in enumerate(lefts)]
        return torch.stack([error / divisor for error, divisor in zip(errors, divisors, strict=True)]).mean()
