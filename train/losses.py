"""Training losses: reconstruction, AuxK, and the penalties that make ReLU and JumpReLU codes sparse.

All are means over tokens. Where a batch is taken in parts, every term is the part's share of the whole batch's: values
and gradients of the parts add up to those of one pass. What couples the tokens of a batch (their number, the mean L0,
the residual's variance) is then known beforehand and comes in as a `Whole`.

- Reconstruction is the fraction of variance unexplained, ⟨‖y − ŷ‖²⟩ / V with V from the cache's statistics; a CLT's is
  the mean over its layers.
- AuxK is in train/auxk.py; it is divided by the residual's own variance, which does depend on the batch.
- l1: λ⟨Σ z_f n_f⟩, n_f the norm of the latent's decoder row. l0: λ⟨Σ 1[a_f > θ_f]⟩. target_l0: λ(L0/k − 1)².
  tanh: λ⟨Σ tanh(c n_f z_f)⟩. The step functions see a, not z: z is 0 in the lower half of the window.
- Pre-activation loss: λ_P⟨Σ n_f relu(θ_f − a_f)⟩.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.train.auxk import auxiliary
from thresher.train.dictionary.coder import Coder, Pass
from thresher.train.dictionary.encoder import Fired
from thresher.train.dictionary.rules import JumpReLU
from thresher.train.kernels import padded
from thresher.train.kernels.residual import Left, left
from thresher.train.kernels.silent import Dead
from thresher.train.kernels.sparse import spread
from thresher.train.stages import stage


class Whole(NamedTuple):
    """What the parts of one batch have to know of all of it."""

    tokens: int
    """N of the whole batch."""
    l0: Tensor | None = None
    """[sources] mean number of latents that fire per token, detached; for the target_l0 penalty alone."""
    residual: Tensor | None = None
    """[S] Σ‖e − ē‖² over the whole batch, e what the dictionary left of a destination; for AuxK alone."""


class Losses(NamedTuple):
    """The terms of one step, or of one part of it; scalars, `total` with gradient."""

    total: Tensor
    """What is minimised."""
    fvu: Tensor
    """[S] per destination, against the fixed V."""
    aux: Tensor
    """AuxK, unweighted; 0 without dead latents."""
    penalty: Tensor
    """Sparsity and pre-activation terms, as weighted in the total."""


def losses(
    coder: Coder,
    done: Pass,
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    variances: Sequence[float],
    ramp: float,
    whole: Whole | None = None,
) -> Losses:
    """All terms of one batch in training space; xs, ys: [N, width] by source and destination; `ramp`: of penalties.

    `whole`: these rows are a part of a larger batch, and the terms are their shares of it; None: they are all.
    """
    spec = coder.spec
    tokens = xs[0].shape[0] if whole is None else whole.tokens
    outputs = [done.y.flatten(1)] if len(ys) == 1 else done.y.unbind(1)
    lefts = residuals(coder, done, ys)
    errors = [squared_error(*pair) for pair in zip(outputs, lefts, strict=True)]
    fvu = torch.stack([error / (tokens * v) for error, v in zip(errors, variances, strict=True)])
    total = fvu.mean()
    aux = penalty = total.new_zeros(())
    if spec.aux > 0:
        with stage("auxk"):
            aux = auxiliary(coder, done, xs, lefts, None if whole is None else whole.residual)
        total = total + spec.aux * aux
    if ramp > 0 and (spec.sparsity > 0 or spec.preact > 0):
        penalty = ramp * penalties(coder, done.fired, xs, whole)
        total = total + penalty
    return Losses(total, fvu.detach(), aux.detach(), penalty.detach())


def residuals(coder: Coder, done: Pass, ys: Sequence[Tensor]) -> list[Left]:
    """What a pass left of every destination [N, E], without gradient."""
    return [left(y, done.y[:, destination], coder.kernels) for destination, y in enumerate(ys)]


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, guess: Tensor, residual: Tensor, squares: Tensor) -> Tensor:
        ctx.save_for_backward(residual)
        return squares.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (residual,) = ctx.saved_tensors
        return residual * (-2 * g), None, None


def squared_error(guess: Tensor, found: Left) -> Tensor:
    """Σ (y − guess)², which is known, with gradient to the guess alone."""
    out: Tensor = _SquaredError.apply(guess, found.residual, found.squares)
    return out


def penalties(coder: Coder, fired: Sequence[Fired], xs: Sequence[Tensor], whole: Whole | None = None) -> Tensor:
    """Weighted sparsity and pre-activation terms, the mean over sources."""
    spec = coder.spec
    terms = []
    for source, part in enumerate(fired):
        tokens = part.tokens if whole is None else whole.tokens
        if spec.resolved_penalty == "target_l0":
            term = _target_l0(coder, part, tokens, None if whole is None or whole.l0 is None else whole.l0[source])
        else:
            term = PENALTIES[spec.resolved_penalty or "l1"](coder, source, part) / tokens
        term = spec.sparsity * term
        if spec.preact > 0:
            term = term + spec.preact * preactivation_loss(coder, source, xs[source]) / tokens
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
