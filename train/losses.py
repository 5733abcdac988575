"""Training losses: reconstruction, AuxK, and the penalties that make ReLU and JumpReLU codes sparse.

All are means over tokens. Where a batch is taken in parts, every term is the part's share of the whole batch's: values
and gradients of the parts add up to those of one pass. What couples the tokens of a batch (their number, the mean L0,
the residual's variance) is then known beforehand and comes in as a `Whole`.

- Reconstruction is ⟨‖y − ŷ‖²⟩ in the unit of the convention `spec.loss`: over V from the cache's statistics (FVU), over
  d_out (mse) or as it is (sum); a CLT's is the mean over its layers. λ beside sum is λ/d_out beside mse and λ/V beside
  fvu (dictionary/objective.py). What is reported is the FVU whatever the convention.
- Matryoshka: Σ_m w_m of that for each prefix of the latents, the last prefix being all of them. Multi-TopK: beside it
  the same for the second code, weighted by `spec.multi_topk`.
- AuxK is in train/auxk.py; it is divided by the residual's own variance, which does depend on the batch, or by V, or by
  the convention's unit.
- Penalties are in train/penalties.py.

`regularisation` is everything but the reconstruction, for those who train on another one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.train.auxk import auxiliary
from thresher.train.auxk_shared import explained_by_all, own_guesses
from thresher.train.dictionary.coder import Coder, Pass
from thresher.train.dictionary.encoder import Fired
from thresher.train.dictionary.holding import Sums
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.kernels.residual import Left, left
from thresher.train.penalties import costs, penalties
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
    """Sparsity and pre-activation terms and the rule's own, as weighted in the total."""


def own_sums(coder: Coder, fired: Sequence[Fired], xs: Sequence[Tensor]) -> Sums:
    """What `losses` sums over latents, of a rank's own ones: to be added up with its reconstructions (`Coder.forward`).

    xs: [N, D] by source.
    """
    zero_NSE = xs[0].new_zeros(xs[0].shape[0], *coder.b_dec.shape)
    sums = costs(coder, fired, xs)._replace(rule=coder.encoder(0).rule.decoded_terms(coder, fired, zero_NSE))
    with stage("auxk"):
        return sums._replace(aux=own_guesses(coder, fired, xs) if coder.spec.aux > 0 else None)


class Reconstruction(NamedTuple):
    """How well a pass reconstructs its destinations."""

    total: Tensor
    """What is minimised, a scalar with gradient."""
    fvu: Tensor
    """[S] per destination, against the fixed V; without gradient."""


class Regularisation(NamedTuple):
    """What is minimised beside the reconstruction, whichever that is; scalars with gradient."""

    total: Tensor
    """α · AuxK, the penalties and the rule's own terms."""
    aux: Tensor
    """AuxK, unweighted; 0 without dead latents."""
    penalty: Tensor
    """Sparsity and pre-activation terms and the rule's own, as weighted in the total."""


def losses(
    coder: Coder,
    done: Pass,
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    variances: Sequence[float],
    ramp: float,
    whole: Whole | None = None,
) -> Losses:
    """All terms of one batch in training space; xs, ys: [N, width] by source and destination; `ramp`: of the
    sparsity penalty.

    `whole`: these rows are a part of a larger batch, and the terms are their shares of it; None: they are all.
    """
    lefts = residuals(coder, done, ys)
    main = reconstruction(coder, done, ys, lefts, variances, whole)
    rest = regularisation(coder, done, xs, lefts, variances, ramp, whole)
    return Losses(main.total + rest.total, main.fvu, rest.aux.detach(), rest.penalty.detach())


def residuals(coder: Coder, done: Pass, ys: Sequence[Tensor]) -> list[Left]:
    """What a pass left of every destination [N, E], without gradient."""
    return _lefts(coder, done.y, ys)


def _lefts(coder: Coder, y_NSE: Tensor, ys: Sequence[Tensor]) -> list[Left]:
    return [left(y, y_NSE[:, destination], coder.kernels) for destination, y in enumerate(ys)]


def units(spec: DictionarySpec, variances: Sequence[float]) -> list[float]:
    """What ⟨‖e‖²⟩ is divided by under the convention, per destination; `variances`: V."""
    return {"fvu": list(variances), "mse": [float(spec.d_out)] * len(variances), "sum": [1.0] * len(variances)}[
        spec.loss
    ]


def reconstruction(
    coder: Coder,
    done: Pass,
    ys: Sequence[Tensor],
    lefts: Sequence[Left],
    variances: Sequence[float],
    whole: Whole | None = None,
) -> Reconstruction:
    """The reconstruction's terms alone, those of Matryoshka's prefixes and of Multi-TopK's second code among them.

    ys: [N, E] by destination; `lefts`: `residuals` of the pass; `variances`: V by destination.
    """
    spec, tokens = coder.spec, done.y.shape[0] if whole is None else whole.tokens
    divisors = [tokens * unit for unit in units(spec, variances)]
    main = _errors(done.y, lefts)
    ends = spec.prefix_ends or (spec.n_latents,)
    weights = spec.prefix_weights or [1 / len(ends)] * len(ends)
    total = weights[-1] * _mean(main, divisors)
    for y_NSE, weight in zip(done.prefixes, weights, strict=False):
        total = total + weight * _mean(_errors(y_NSE, _lefts(coder, y_NSE, ys)), divisors)
    if done.wide is not None:
        total = total + spec.multi_topk * _mean(_errors(done.wide, _lefts(coder, done.wide, ys)), divisors)
    fvu = [error.detach() / (tokens * v) for error, v in zip(main, variances, strict=True)]
    return Reconstruction(total, torch.stack(fvu))


def _mean(errors: Sequence[Tensor], divisors: Sequence[float]) -> Tensor:
    return torch.stack([error / divisor for error, divisor in zip(errors, divisors, strict=True)]).mean()


def _errors(y_NSE: Tensor, lefts: Sequence[Left]) -> list[Tensor]:
    """Σ‖e‖² by destination, with gradient to the reconstruction."""
    outputs = [y_NSE.flatten(1)] if len(lefts) == 1 else y_NSE.unbind(1)
    return [squared_error(*pair) for pair in zip(outputs, lefts, strict=True)]


def regularisation(
    coder: Coder,
    done: Pass,
    xs: Sequence[Tensor],
    lefts: Sequence[Left],
    variances: Sequence[float],
    ramp: float,
    whole: Whole | None = None,
) -> Regularisation:
    """AuxK and penalties of a pass, whatever it is trained to reconstruct: end-to-end training takes these alone.

    `lefts`: `residuals` of the pass, which AuxK explains; not looked at when `spec.aux` is 0 and the firing rule has no
    terms of its own (gated has), and may then be empty.
    xs: [N, D] by source; `variances`: V by destination; `ramp`: factor of the sparsity penalty.
    """
    spec = coder.spec
    total = aux = penalty = done.y.new_zeros(())
    tokens = done.y.shape[0] if whole is None else whole.tokens
    own = coder.encoder(0).rule.terms(coder, done, lefts, [tokens * unit for unit in units(spec, variances)])
    if own is not None:
        total, penalty = total + own, penalty + own
    if spec.aux > 0:
        with stage("auxk"):
            divisor_S = _aux_divisor(spec, done.y, variances, whole)
            if done.sums is None:
                aux = auxiliary(coder, done, xs, lefts, divisor_S)
            else:
                aux = explained_by_all(coder, done, lefts, divisor_S)
        total = total + spec.aux * aux
    if spec.sparsity > 0 or spec.preact > 0:
        weighted = penalties(coder, done.fired, xs, ramp, tokens, None if whole is None else whole.l0, done.sums)
        total, penalty = total + weighted, penalty + weighted
    return Regularisation(total, aux, penalty)


def _aux_divisor(spec: DictionarySpec, y_NSE: Tensor, variances: Sequence[float], whole: Whole | None) -> Tensor | None:
    """[S] what AuxK's sum of squares is divided by; None: by the variation of these rows' residual."""
    if spec.aux_divisor == "residual":
        return None if whole is None else whole.residual
    tokens = y_NSE.shape[0] if whole is None else whole.tokens
    per_token = variances if spec.aux_divisor == "target" else units(spec, variances)
    return torch.stack([y_NSE.new_full((), tokens * value) for value in per_token])


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
