"""The penalties that make ReLU and JumpReLU codes sparse, and the pre-activation loss.

All are sums over tokens divided by N of the whole batch, weighted, the mean over sources.

- l1: λ⟨Σ z_f n_f⟩, n_f the norm of the latent's decoder row. l0: λ⟨Σ 1[a_f > θ_f]⟩. target_l0: λ(L0/k − 1)².
  tanh: λ⟨Σ tanh(c n_f z_f)⟩. The step functions see a, not z: z is 0 in the lower half of the window.
- Pre-activation loss: λ_P⟨Σ n_f relu(θ_f − a_f)⟩.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.encoder import Fired
from thresher.train.dictionary.rules import JumpReLU
from thresher.train.kernels import padded
from thresher.train.kernels.silent import Dead
from thresher.train.kernels.sparse import spread


def penalties(
    coder: Coder, fired: Sequence[Fired], xs: Sequence[Tensor], tokens: int | None = None, l0: Tensor | None = None
) -> Tensor:
    """Weighted sparsity and pre-activation terms, the mean over sources.

    Of a part of a larger batch, its share: `tokens` is then N of the whole, and `l0` [sources] its mean L0, detached,
    which the target_l0 penalty wants. xs: [N, D] by source.
    """
    spec = coder.spec
    terms = []
    for source, part in enumerate(fired):
        count = part.tokens if tokens is None else tokens
        if spec.resolved_penalty == "target_l0":
            term = _target_l0(coder, part, count, None if l0 is None else l0[source])
        else:
            term = PENALTIES[spec.resolved_penalty or "l1"](coder, source, part) / count
        term = spec.sparsity * term
        if spec.preact > 0:
            term = term + spec.preact * preactivation_loss(coder, source, xs[source]) / count
        terms.append(term)
    return torch.stack(terms).mean()


def _l1(coder: Coder, source: int, part: Fired) -> Tensor:
    if coder.spec.unit_norm:
        return part.z.sum()
    return (part.z * spread(coder.decoder_norm(source), part.selection)).sum()


def _l0(coder: Coder, source: int, part: Fired) -> Tensor:
    assert part.gate is not None
    return part.gate.sum()


def _tanh(coder: Coder, source: int, part: Fired) -> Tensor:
    norm = spread(coder.decoder_norm(source), part.selection)
    return torch.tanh(coder.spec.tanh_scale * norm * part.z).sum()


def _target_l0(coder: Coder, part: Fired, tokens: int, mean: Tensor | None) -> Tensor:
    """(L0/k − 1)². Of a part: its share by tokens in value, and the gradient that L0's chain rule gives its gates."""
    assert coder.spec.k is not None
    assert part.gate is not None
    l0 = part.gate.sum() / tokens
    if mean is None:
        return (l0 / coder.spec.k - 1).square()
    miss = mean / coder.spec.k - 1
    return miss.square() * (part.tokens / tokens) + 2 * miss / coder.spec.k * (l0 - l0.detach())


PENALTIES = {"l1": _l1, "l0": _l0, "tanh": _tanh}
"""Those that are sums over tokens, before the division by N."""


def preactivation_loss(coder: Coder, source: int, x_ND: Tensor) -> Tensor:
    """Σ n_f relu(θ_f − a_f) over tokens and dead latents, or all: a dense pass on their rows, by plain autograd."""
    encoder = coder.encoder(source)
    assert isinstance(encoder.rule, JumpReLU)
    rows: tuple[Tensor, ...] = encoder.W_enc, coder.bias(source), encoder.rule.theta(), coder.decoder_norm(source)
    real: Tensor | float = 1.0
    if coder.spec.preact_on == "dead":
        dead = encoder.asleep(x_ND.shape[0])
        if dead is None and padded.must_not_ask(x_ND):
            return x_ND.new_zeros(())
        dead = dead or Dead(torch.empty(0, dtype=torch.int64))
        rows, real = tuple(tensor.index_select(0, dead.latents) for tensor in rows), dead.real()
    weight, bias, theta, norm = rows
    below = torch.relu(theta - F.linear(x_ND, weight, bias)).sum(0)
    return (below * norm * real).sum()
