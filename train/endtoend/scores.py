"""KL and CE of patched logits at the scored positions, with the gradient of one of them.

Both are sums over scored positions divided by their number, in float32 or wider. (`torch.nn.functional.kl_div` with
`batchmean` divides by the first axis alone, which for logits [B, T, V] is sequences: T times too much.)

Logits of a whole batch are the largest tensors of a step. Float copies of them are made for some tokens at a time,
and the gradient, q − p for KL and q − onehot for CE, is written then, in the logits' own format: autograd would keep
several [tokens, V] blocks. `plain_scores` is the specification.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Objective = Literal["kl", "ce"]

_PIECE = 1 << 23  # logits in float at a time


class Scored(NamedTuple):
    """What of the logits of some contexts is scored, and how."""

    places: Tensor
    """[M] positions of the flattened [B, T]."""
    following: Tensor
    """[M] the tokens after them."""
    objective: Objective
    """What has a gradient."""
    total: int
    """Scored positions of the whole step, of which these may be some."""


class Scores(NamedTuple):
    """Of some contexts; scalars. All but `loss` are sums over scored positions, without gradient."""

    loss: Tensor
    """The objective's sum over scored positions, divided by `total`; with gradient to the patched logits."""
    kl: Tensor | None
    """Σ KL(clean ‖ patched), nats; None without clean logits."""
    ce: Tensor
    """Σ −log q(next token), nats."""
    ce_clean: Tensor | None
    """Σ −log p(next token), nats; None without clean logits."""


def scores(logits_BTV: Tensor, clean_BTV: Tensor | None, scored: Scored, plain: bool = False) -> Scores:
    """Score patched logits; `clean_BTV` may be None for CE."""
    assert clean_BTV is not None or scored.objective == "ce"
    if plain:
        return plain_scores(logits_BTV, clean_BTV, scored)
    loss, kl, ce, ce_clean = _Scores.apply(logits_BTV, clean_BTV, scored)
    return Scores(loss, None if clean_BTV is None else kl, ce, None if clean_BTV is None else ce_clean)


def plain_scores(logits_BTV: Tensor, clean_BTV: Tensor | None, scored: Scored) -> Scores:
    """What `scores` must equal, by ordinary autograd."""
    places_M, next_M, objective, total = scored
    log_q = _log_softmax(logits_BTV.flatten(0, 1)[places_M])
    ce = -log_q.gather(1, next_M[:, None]).sum()
    if clean_BTV is None:
        return Scores(ce / total, None, ce.detach(), None)
    log_p = _log_softmax(clean_BTV.detach().flatten(0, 1)[places_M])
    kl = (log_p.exp() * (log_p - log_q)).sum()
    ce_clean = -log_p.gather(1, next_M[:, None]).sum()
    return Scores((kl if objective == "kl" else ce) / total, kl.detach(), ce.detach(), ce_clean)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, clean_BTV: Tensor | None, scored: Scored) -> tuple[Tensor, ...]:
        places_M, next_M, objective, total = scored
        logits, clean = logits_BTV.flatten(0, 1), None if clean_BTV is None else clean_BTV.flatten(0, 1)
        grad = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        kl, ce, ce_clean = torch.zeros(3, dtype=torch.float64, device=logits.device).unbind(0)
        rows = max(1, _PIECE // logits.shape[1])
        for some, following in zip(places_M.split(rows), next_M.split(rows), strict=True):
            log_q = _log_softmax(logits.index_select(0, some))
            ce -= log_q.gather(1, following[:, None]).sum()
            log_p = None if clean is None else _log_softmax(clean.index_select(0, some))
            if log_p is not None:
                ce_clean -= log_p.gather(1, following[:, None]).sum()
                kl += (log_p.exp() * (log_p - log_q)).sum()
            if grad is None:
                continue
            slope = log_q.exp_()
            if objective == "kl":
                assert log_p is not None
                slope -= log_p.exp_()
            else:
                slope.scatter_add_(1, following[:, None], slope.new_full((len(some), 1), -1.0))
            grad.index_copy_(0, some, slope.div_(total).to(grad.dtype))
        ctx.grad, ctx.shape = grad, logits_BTV.shape
        loss = ((kl if objective == "kl" else ce) / total).to(torch.promote_types(logits.dtype, torch.float32))
        ctx.mark_non_differentiable(kl, ce, ce_clean)
        return loss, kl, ce, ce_clean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None  # autograd frees only what was saved with it
        return grad.mul_(g.to(grad.dtype)).view(ctx.shape), None, None


def _log_softmax(logits_MV: Tensor) -> Tensor:
    return F.log_softmax(logits_MV, dim=-1, dtype=torch.promote_types(logits_MV.dtype, torch.float32))
