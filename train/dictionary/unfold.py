"""From raw activations to training space: the inverse of dictionary/fold.py, for training that goes on from a run.

With x̃ = (x − μ)/σ read, ỹ = (y − ν)/τ written and c the code's factor (`fold.code_factor`):

    W_enc ← W_enc diag(σ) / c     b_enc ← (b_enc + W_enc μ) / c (the raw W_enc; a pre-bias is taken out last)
    W_dec ← W_dec diag(1/τ) c     b_dec ← (b_dec − ν) ⊘ τ           θ ← θ / c

The normalisation is the new recipe's: the saved weights do not know another. Where rows are to have norm 1 and have
n_f, W_dec ← W_dec / n, W_enc ← W_enc n, b_enc ← b_enc n, θ ← θ n: the same reconstruction wherever a latent decides by
its own threshold; TopK and BatchTopK choose by a, so their choice changes with n. All sums are float64.

A skip connection's and a MoLT's own follow `fold.py` backwards: W_skip ← diag(1/τ) W_skip diag(σ), with W_skip μ added
to b_dec before; V ← V diag(σ), U ← diag(1/τ) U, c ← (c − μ)/σ. Rows that are to have norm 1 for every target apart are
set to it, whatever that changes.

Every parameter is one function of `PARAMETERS`; what a topology has beside those is its own `unfold` (coder.py). What a
rule makes of the thresholds is its own `adopt`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.train.counting import entries
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.fold import code_factor
from thresher.train.dictionary.holding import Holding
from thresher.train.dictionary.initial import deviation
from thresher.train.dictionary.rules.counted import TopK
from thresher.train.normalise import Affine


class Spaces(NamedTuple):
    """What unfolding a dictionary depends on beside its weights."""

    saved: Coder
    """Deployed: acts on raw activations."""
    reads: Sequence[Affine]
    """By source."""
    writes: Sequence[Affine]
    """By destination."""
    factors: Sequence[float]
    """By source: code in raw units / code in training units."""
    norms: Sequence[Tensor]
    """[F] by source: what rows of the unfolded decoder are divided by."""


@torch.no_grad()
def unfold(
    saved: Coder, coder: Coder, reads: Sequence[Affine], writes: Sequence[Affine], samples: Sequence[Tensor] = ()
) -> None:
    """Set a training module, initialised before, to a deployed one of the same kind, sites and sizes.

    `samples`: rows [n, D] of every source in training space, for a JumpReLU that is to begin from a TopK, which has no
    threshold: it then takes the one that keeps as many of their entries.
    Decoder rows that are 0 and are to have norm 1 stay as they were initialised.
    """
    factors = [code_factor(coder.spec, site) for site in reads]
    given = Spaces(saved, reads, writes, factors, [torch.ones(coder.n_latents)] * len(reads))
    if coder.spec.unit_norm:
        given = given._replace(norms=[_decoder(given, source).flatten(1).norm(dim=1) for source in range(len(reads))])
    for parameter in PARAMETERS:
        parameter(given, coder)
    for source, factor in enumerate(factors):
        old, new = saved.encoder(source), coder.encoder(source)
        new.tokens_since_fired.copy_(old.tokens_since_fired)
        a_nF = new.preactivations(samples[source], coder.bias(source)) if samples else None
        if a_nF is not None:
            new.rule.start(deviation(coder, a_nF), new.b_enc)
        theta = old.rule.thresholds()
        if theta is None and isinstance(old.rule, TopK) and a_nF is not None:
            theta_F = _of_rank(a_nF, old.rule.k, coder.holding).double().expand(coder.n_latents)
        elif theta is None:
            continue
        else:
            theta_F = theta.double().cpu() / factor * _safe(given.norms[source])
        if coder.holding is not None and new.rule.follows:  # it has one threshold for all, whoever holds them
            theta_F = coder.holding.whole(theta_F)
        new.rule.adopt(theta_F, new.b_enc)


def _encoders(given: Spaces, coder: Coder) -> None:
    """W_enc and b_enc, before a pre-bias."""
    for source, (site, factor) in enumerate(zip(given.reads, given.factors, strict=True)):
        old, new, norms = given.saved.encoder(source), coder.encoder(source), _safe(given.norms[source])
        W_enc = old.W_enc.double().cpu()
        new.W_enc.copy_(W_enc * site.scale * (norms / factor)[:, None])
        new.b_enc.copy_((old.b_enc.double().cpu() + W_enc @ site.shift) * norms / factor)


def _decoders(given: Spaces, coder: Coder) -> None:
    """W_dec, rows that have no norm left out."""
    for source, norms in enumerate(given.norms if coder.by_rows else ()):
        rows = _decoder(given, source) / _safe(norms)[:, None, None]
        fresh = coder.W_dec[source].double().cpu()
        coder.W_dec[source].copy_(torch.where((norms > 0)[:, None, None], rows, fresh))
        if coder.spec.unit_per_target:
            coder.constrain(source)


def _biases(given: Spaces, coder: Coder) -> None:
    """b_dec, and what a pre-bias took from b_enc."""
    for destination, site in enumerate(given.writes):
        b_dec = given.saved.b_dec[destination].double().cpu()
        if given.saved.W_skip is not None:
            b_dec = b_dec + given.saved.W_skip[destination].double().cpu() @ given.reads[destination].shift
        coder.b_dec[destination] = ((b_dec - site.shift) / site.scale).to(coder.b_dec)
    if coder.spec.pre_bias:
        for source in range(len(given.reads)):
            new = coder.encoder(source)
            new.b_enc.add_((new.W_enc.double() @ coder.b_dec[source].double()).to(new.b_enc))


def _own(given: Spaces, coder: Coder) -> None:
    """What the topology has beside these."""
    coder.unfold(given.saved, given.reads, given.writes)


PARAMETERS: tuple[Callable[[Spaces, Coder], None], ...] = (_encoders, _decoders, _biases, _own)
"""In this order."""


def _decoder(given: Spaces, source: int) -> Tensor:
    """[F, T, E] float64 decoder rows in training space, norms as they come."""
    scales_TE = torch.stack([given.writes[destination].scale for destination in given.saved.written(source)])
    return given.saved.W_dec[source].double().cpu() * given.factors[source] / scales_TE


def _safe(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms, 1.0).double()


def _of_rank(a_nF: Tensor, k: float, holding: Holding | None) -> Tensor:
    """The value that k pre-activations per token reach, on average over some tokens; of shared latents a collective."""
    values, rank = torch.relu(a_nF).flatten(), max(1, entries(k, a_nF.shape[0]))
    if holding is not None:
        offered = values.new_zeros(rank)
        own = values.topk(min(rank, values.shape[0])).values
        offered[: own.shape[0]] = own
        values = holding.group.gather(offered).flatten()
    return values.topk(rank).values[-1]
