"""AuxK of ranks that share latents: each lets its own dead latents reconstruct, the sum of all explains what is left.

Which codes are woken is settled with the pass (dictionary/offers.py), and the reconstructions are added up with it
(`own_guesses`), before there is a residual. The error of the sum then is the same on all ranks (`explained_by_all`),
and its gradient to the sum the one to each rank's part.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.train.auxk import plain_guess, to_rows, way_of
from thresher.train.auxk_joint import joint_error, joint_guess, joint_share
from thresher.train.dictionary.coder import Coder, Pass
from thresher.train.dictionary.encoder import Fired
from thresher.train.kernels.residual import Left
from thresher.train.kernels.silent import Dead, Silent


class _Guess(torch.autograd.Function):
    """ê [N, E] of some of the dead latents, with gradients to their rows; else as `_Error`."""

    @staticmethod
    def forward(ctx: Any, like_NE: Tensor, *given: Any) -> Tensor:
        W_enc, b_enc, W_dec_FTE, latents, x_ND, b_dec_D, way, sinks = given
        products = way(W_dec_FTE.flatten(1)[:, : like_NE.shape[1]])
        products.error(like_NE)  # zeros, less which ê is the error itself
        ctx.products, ctx.latents, ctx.sinks = products, latents, sinks
        ctx.save_for_backward(W_enc, b_enc, W_dec_FTE, x_ND, b_dec_D)
        guess_NE: Tensor = products.error_NE
        products.error_NE = like_NE
        return guess_NE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NE: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, b_enc, W_dec_FTE, x_ND, b_dec_D = ctx.saved_tensors
        products, ctx.products = ctx.products, None
        products.error_NE = g_NE.contiguous()
        found = products.gradients(x_ND, b_dec_D, torch.ones_like(g_NE[0, 0]))
        return None, *to_rows(W_enc, b_enc, W_dec_FTE, ctx.latents, found, ctx.sinks), *[None] * 5


def own_guesses(coder: Coder, fired: Sequence[Fired], xs: Sequence[Tensor]) -> Tensor | None:
    """[N, S, E] what the dead latents of this rank reconstruct of what is left; None: no rank has any.

    Codes that no other rank's exceed come with the pass (dictionary/offers.py). xs: [N, D] by source.
    """
    sources = [source for source in range(len(xs)) if coder.dead_of(source)]
    if not sources:
        return None
    xs = [x_ND.detach() for x_ND in xs]
    zero_NSE = xs[0].new_zeros(xs[0].shape[0], *coder.b_dec.shape)
    if coder.spec.aux_scope == "all":
        return joint_guess(coder, fired, xs, [_asleep(coder, i, part) for i, part in enumerate(fired)], zero_NSE)
    parts = []
    for source, (x_ND, part) in enumerate(zip(xs, fired, strict=True)):
        span = coder.explained(source)
        like_NE = zero_NSE[:, span.start : span.stop].flatten(1).contiguous()
        dead = _asleep(coder, source, part)
        parts.append(
            (like_NE if dead is None else _guess(coder, source, dead, part, x_ND, like_NE)).unflatten(
                1, (len(span), -1)
            )
        )
    return torch.cat(parts, 1)


def _asleep(coder: Coder, source: int, part: Fired) -> Dead | None:
    """Dead latents of this rank."""
    return coder.encoder(source).asleep(part.tokens)


def _guess(coder: Coder, source: int, dead: Dead, part: Fired, x_ND: Tensor, like_NE: Tensor) -> Tensor:
    """One source's; `like_NE`: zeros."""
    encoder, silent = coder.encoder(source), part.silent
    if not isinstance(silent, Silent) or coder.kernels.forced == "plain":
        coder.kernels.pick("auxk", x_ND.device, x_ND.dtype, 0)
        return plain_guess(coder, source, dead, x_ND, silent if isinstance(silent, Silent) else None)
    b_dec_D = coder.b_dec[source].detach() if coder.spec.pre_bias else None
    weights = (encoder.W_enc, encoder.b_enc, coder.W_dec[source])
    ways = (way_of(coder, encoder, silent), (encoder.sink, coder.decoder_sink(source)))
    out: Tensor = _Guess.apply(like_NE, *weights, silent.latents, x_ND, b_dec_D, *ways)
    return out


def explained_by_all(coder: Coder, done: Pass, lefts: Sequence[Left], divisor_S: Tensor | None) -> Tensor:
    """`auxiliary` from the reconstruction that dead latents of all ranks have made together."""
    guess_NSE = None if done.sums is None else done.sums.aux
    if guess_NSE is None:
        return done.y.new_zeros(())
    sources, enough = range(len(coder.inputs)), coder.spec.resolved_aux_k if coder.spec.aux_scale else 1
    if coder.spec.aux_scope == "all":
        number = sum(coder.dead_of(source) for source in sources)
        return joint_error(coder, guess_NSE, lefts, divisor_S) * joint_share(coder, number, guess_NSE)
    terms = []
    for source in sources:
        if number := coder.dead_of(source):
            span = coder.explained(source)
            residual_NTE = torch.stack([lefts[destination].residual for destination in span], 1)
            apart = [lefts[j].variation() if divisor_S is None else divisor_S[j] for j in span]
            total = torch.stack(apart).sum()
            error = (guess_NSE[:, span.start : span.stop] - residual_NTE).square().sum()
            terms.append(min(number / enough, 1.0) / total.where(total > 0, torch.inf) * error)
    return torch.stack(terms).mean()
