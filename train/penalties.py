"""The penalties that make ReLU and JumpReLU codes sparse, and the pre-activation loss.

All are sums over tokens divided by N of the whole batch, weighted, the mean over sources. n_f is the norm of a latent's
decoder row over all it writes to, l2 or l1 (`spec.penalty_norm`), with gradient; or 1.

- l1: λ⟨Σ z_f n_f⟩. l0: λ⟨Σ 1[a_f > θ_f]⟩. target_l0: λ(L0/k − 1)². tanh: λ⟨Σ tanh(c n_f z_f)⟩, with gradient to z, θ
  and n_f. The step functions see a, not z: z is 0 in the lower half of the window. lp: train/anneal.py.
- Pre-activation loss: λ_P⟨Σ n_f relu(θ_f − a_f)⟩, or λ_P⟨Σ relu(−a_f)⟩; it has no warm-up.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.encoder import Fired
from thresher.train.dictionary.holding import Sums
from thresher.train.dictionary.rules import JumpReLU
from thresher.train.kernels import padded
from thresher.train.kernels.silent import Dead
from thresher.train.kernels.sparse import spread


def penalties(
    coder: Coder,
    fired: Sequence[Fired],
    xs: Sequence[Tensor],
    ramp: float = 1.0,
    tokens: int | None = None,
    l0: Tensor | None = None,
    sums: Sums | None = None,
) -> Tensor:
    """Weighted sparsity and pre-activation terms, the mean over sources; `ramp`: factor of the former.

    Of a part of a larger batch, its holding: `tokens` is then N of the whole, and `l0` [sources] its mean L0, detached,
    which the target_l0 penalty wants. xs: [N, D] by source. `sums`: where ranks that share latents have added them up.
    """
    spec = coder.spec
    terms = []
    for source, part in enumerate(fired):
        count = part.tokens if tokens is None else tokens
        cost = _cost(coder, source, part) if sums is None or sums.sparsity is None else sums.sparsity[source]
        if spec.resolved_penalty == "target_l0":
            term = _target_l0(coder, cost, part.tokens, count, None if l0 is None else l0[source])
        else:
            term = cost / count
        term = ramp * spec.sparsity * term
        if spec.preact > 0:
            below = None if sums is None or sums.preact is None else sums.preact[source]
            below = preactivation_loss(coder, source, xs[source]) if below is None else below
            term = term + spec.preact * below / count
        terms.append(term)
    return torch.stack(terms).mean()


def costs(coder: Coder, fired: Sequence[Fired], xs: Sequence[Tensor]) -> Sums:
    """The sums over tokens and latents that `penalties` weighs, of a rank's own latents."""
    spec = coder.spec
    if not (spec.sparsity > 0 or spec.preact > 0):
        return Sums()
    sparsity = torch.stack([_cost(coder, source, part) for source, part in enumerate(fired)])
    if spec.preact == 0:
        return Sums(sparsity)
    return Sums(sparsity, torch.stack([preactivation_loss(coder, source, x_ND) for source, x_ND in enumerate(xs)]))


def _cost(coder: Coder, source: int, part: Fired) -> Tensor:
    return PENALTIES[coder.spec.resolved_penalty or "l1"](coder, source, part)


def row_norm(coder: Coder, source: int) -> Tensor | None:
    """[F] n_f with gradient; None: 1."""
    if coder.spec.penalty_norm == "l2":
        return coder.decoder_norm(source)
    return coder.W_dec[source].flatten(1).abs().sum(1) if coder.spec.penalty_norm == "l1" else None


def weighed(coder: Coder, source: int, part: Fired) -> Tensor:
    """[A] (or [N, F]) z_f n_f, or what the rule has penalised in the place of z."""
    norm, z = row_norm(coder, source), coder.encoder(source).rule.penalised(part.a, part.z)
    return z if norm is None else z * spread(norm, part.selection)


def _l1(coder: Coder, source: int, part: Fired) -> Tensor:
    if coder.spec.unit_norm and coder.spec.penalty_norm == "l2":
        return coder.encoder(source).rule.penalised(part.a, part.z).sum()
    return weighed(coder, source, part).sum()


def _l0(coder: Coder, source: int, part: Fired) -> Tensor:
    assert part.gate is not None
    return part.gate.sum()


def _tanh(coder: Coder, source: int, part: Fired) -> Tensor:
    return torch.tanh(coder.spec.tanh_scale * weighed(coder, source, part)).sum()


def _target_l0(coder: Coder, gates: Tensor, own: int, tokens: int, mean: Tensor | None) -> Tensor:
    """(L0/k − 1)² of the sum of gates. Of a part of `own` tokens: its share by tokens in value, and the gradient that
    L0's chain rule gives its gates."""
    assert coder.spec.k is not None
    l0 = gates / tokens
    if mean is None:
        return (l0 / coder.spec.k - 1).square()
    miss = mean / coder.spec.k - 1
    return miss.square() * (own / tokens) + 2 * miss / coder.spec.k * (l0 - l0.detach())


def _lp(coder: Coder, source: int, part: Fired) -> Tensor:
    assert coder.anneal is not None
    return coder.anneal.penalty(weighed(coder, source, part))


PENALTIES = {"l1": _l1, "l0": _l0, "target_l0": _l0, "tanh": _tanh, "lp": _lp}
"""What they add up over tokens and latents; of target_l0 the gates, of which it wants so many."""


def preactivation_loss(coder: Coder, source: int, x_ND: Tensor) -> Tensor:
    """Σ n_f relu(θ_f − a_f), or Σ relu(−a_f), over tokens and dead latents, or all; by plain autograd.

    A dense pass on the rows of those latents.
    """
    encoder, norm = coder.encoder(source), None
    rows: tuple[Tensor, ...] = encoder.W_enc, coder.bias(source)
    if coder.spec.preact_form == "threshold":
        assert isinstance(encoder.rule, JumpReLU)
        norm = row_norm(coder, source)
        rows += (encoder.rule.theta(), *(() if norm is None else (norm,)))
    real: Tensor | float = 1.0
    if coder.spec.preact_on == "dead":
        dead = encoder.asleep(x_ND.shape[0])
        if dead is None and padded.must_not_ask(x_ND):
            return x_ND.new_zeros(())
        dead = dead or Dead(torch.empty(0, dtype=torch.int64))
        rows, real = tuple(tensor.index_select(0, dead.latents) for tensor in rows), dead.real()
    weight, bias, *others = rows
    theta = others[0] if others else 0.0
    below = torch.relu(theta - F.linear(x_ND, weight, bias)).sum(0) * real
    return (below if norm is None else below * others[1]).sum()
