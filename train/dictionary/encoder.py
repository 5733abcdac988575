"""One source's encoder: pre-activations by one dense product, a selection from them, gradients only where selected.

`forward` (training) and `encode` (everything else) share the pre-activations and the rule, so no second encoder can
drift away from the first. The dense product runs without autograd, in bf16 where asked; selection and thresholds are
fp32, and gradients return through `gathered_linear`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from thresher.cache.contracts import Codes
from thresher.train.dictionary.rules import rule
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.kernels.sparse import Selection, gathered_linear


class Fired(NamedTuple):
    """A training pass through one encoder."""

    selection: Selection | None
    """Entries looked at; None: all."""
    a: Tensor
    """[A] (or [N, F]) pre-activations there, with gradient to the encoder."""
    z: Tensor
    """[A] (or [N, F]) codes, with gradient."""
    tokens: int
    """N."""


class Encoder(nn.Module):
    """W_enc [F, D], b_enc [F], a firing rule and the count of tokens since each latent fired."""

    def __init__(self, spec: DictionarySpec, deployed: bool = False) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(spec.n_latents, spec.d_in))
        self.b_enc = nn.Parameter(torch.zeros(spec.n_latents))
        self.rule = rule(spec, deployed)
        self.register_buffer("tokens_since_fired", torch.zeros(spec.n_latents, dtype=torch.int64))
        self.tokens_since_fired: Tensor
        self.matmul_dtype: torch.dtype | None = None

    def preactivations(self, x_ND: Tensor, bias_F: Tensor) -> Tensor:
        """a [N, F] in the parameters' dtype, without gradient."""
        with torch.no_grad():
            if self.matmul_dtype is None:
                return torch.addmm(bias_F, x_ND, self.W_enc.T)
            low_x, low_W = x_ND.to(self.matmul_dtype), self.W_enc.to(self.matmul_dtype)
            return (low_x @ low_W.T).to(bias_F.dtype).add_(bias_F)

    def forward(self, x_ND: Tensor, bias_F: Tensor) -> Fired:
        """Training codes; `bias_F` is b_enc with any pre-bias folded in, with gradient."""
        a_NF = self.preactivations(x_ND, bias_F)
        with torch.no_grad():
            selection = self.rule.select(a_NF)
            values = a_NF if selection is None else selection.take(a_NF)
        a = gathered_linear(x_ND, self.W_enc, bias_F, values, selection)
        return Fired(selection, a, self.rule.fire(a, selection), x_ND.shape[0])

    @torch.no_grad()
    def encode(self, x_ND: Tensor, bias_F: Tensor) -> Codes:
        """Codes under the frozen rule: each token alone decides."""
        a_NF = self.preactivations(x_ND, bias_F)
        selection = self.rule.select_frozen(a_NF)
        values = selection.take(a_NF).relu_()
        return Codes(values, selection.latents, selection.offsets, selection.width)

    @torch.no_grad()
    def observe(self, fired: Fired) -> Tensor:
        """Advance the running threshold and the dead counters: once per optimiser step, never by an evaluation.

        Returns the number of active entries, a scalar on the device.
        """
        self.rule.observe(fired.z)
        active = (fired.z > 0).to(torch.float32)
        if fired.selection is None:
            count_F = active.sum(0)
        else:
            count_F = torch.zeros_like(self.b_enc, dtype=torch.float32)
            count_F.index_add_(0, fired.selection.latents, active)
        self.tokens_since_fired.add_(fired.tokens).masked_fill_(count_F > 0, 0)
        return count_F.sum(dtype=torch.float64)

    def dead(self, dead_after: int) -> Tensor:
        """[F] bool: silent for `dead_after` training tokens or more; what AuxK revives is what the log counts."""
        return self.tokens_since_fired >= dead_after
