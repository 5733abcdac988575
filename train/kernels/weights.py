"""Terms of a loss that depend on a weight itself: norms of its rows, and the bias that a pre-bias makes of it.

Autograd would build a tensor of the weight's size for each of their gradients. A norm's is a multiple of the row, which
a sink only notes; the bias's has rank 1 and is added where the weight's other terms are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.train.kernels.gradients import Sink


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, sink: Sink | None) -> Tensor:
        norms_F = torch.linalg.vector_norm(weight.flatten(1), dim=1)
        ctx.save_for_backward(weight, norms_F)
        ctx.sink = sink
        return norms_F

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_F: Tensor) -> tuple[Tensor | None, ...]:
        weight, norms_F = ctx.saved_tensors
        multiples_F = (g_F / norms_F).masked_fill_(norms_F == 0, 0.0)  # as vector_norm: no gradient at 0
        if ctx.sink is None:
            return (weight.flatten(1) * multiples_F[:, None]).view_as(weight), None
        ctx.sink.add_along(multiples_F)
        return None, None


def row_norms(weight: Tensor, sink: Sink | None) -> Tensor:
    """[F]: norms of a weight's rows, with gradient: a multiple of the row itself, which a sink only notes."""
    out: Tensor = _RowNorms.apply(weight, sink)
    return out


class _FoldedBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b_enc: Tensor, W_enc: Tensor, b_dec: Tensor, sink: Sink | None) -> Tensor:
        ctx.save_for_backward(W_enc, b_dec)
        ctx.sink = sink
        return torch.addmv(b_enc, W_enc, b_dec, alpha=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_F: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, b_dec = ctx.saved_tensors
        if ctx.sink is None:
            grad_W = torch.outer(g_F, b_dec).neg_()
        else:
            grad_W = None
            opened = ctx.sink.open()
            torch.addr(opened.matrix, g_F, b_dec, beta=0.0 if opened.fresh else 1.0, alpha=-1, out=opened.matrix)
            ctx.sink.close()
        return g_F, grad_W, -(W_enc.T @ g_F), None


def folded_bias(b_enc: Tensor, W_enc: Tensor, b_dec: Tensor, sink: Sink | None) -> Tensor:
    """[F]: b_enc − W_enc b_dec, with all gradients; W_enc's has rank 1 and is added where its other terms are."""
    out: Tensor = _FoldedBias.apply(b_enc, W_enc, b_dec, sink)
    return out
