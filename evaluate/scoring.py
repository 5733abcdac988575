"""Three reductions over every row of logits in one go, on a CPU: what scores of tokens are made of.

Library calls make blocks as large as the logits in between and do part of it on one thread. Here a row is read from
memory once, its largest entry is found, and while it lies in the cache Σ exp and Σ p · logit are summed: in float32
over pieces of a row, in float64 over pieces. `exp` is a polynomial, since compiled loops have no vector form of it.

`plain_reductions` is the specification, and what runs elsewhere.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from thresher.cache.kernels.cpu_pool import over_rows
from thresher.cache.kernels.jit import compiled

_intrinsic: Any = intrinsic  # the type checker does not know that the first argument is not given in calls
_PIECE = 512
_COST = 8  # of an entry, in multiply-adds


class Reductions(NamedTuple):
    """Of N rows of logits less their largest entry, which is the same distribution in numbers whose sums keep more
    digits."""

    top: Tensor
    """[N] the largest entry's index, the lowest among equals."""
    normaliser: Tensor
    """[N] float64: log Σ_v exp."""
    dots: Tensor
    """[N] float64: Σ_v p · logit."""
    chosen: Tensor
    """[N] float64: the logit of a given token."""


def reductions(logits_NV: Tensor, p_NV: Tensor, token_N: Tensor) -> Reductions:
    """The reductions of logits against probabilities `p`, both float32 or both float64."""
    if logits_NV.device.type != "cpu" or logits_NV.dtype != torch.float32:
        return plain_reductions(logits_NV, p_NV, token_N)
    rows = logits_NV.shape[0]
    logits, p, token = logits_NV.contiguous().numpy(), p_NV.contiguous().numpy(), token_N.numpy()
    top, out = np.empty(rows, np.int64), np.empty((3, rows))
    over_rows(
        rows,
        lambda first, stop: _reduce(logits, logits.view(np.int32), p, token, first, stop, top, *out),
        _COST * logits.size,
    )
    return Reductions(torch.from_numpy(top), *torch.from_numpy(out).unbind())


def plain_reductions(logits_NV: Tensor, p_NV: Tensor, token_N: Tensor) -> Reductions:
    """The same by library calls."""
    largest = logits_NV.max(-1)
    below_NV = logits_NV - largest.values[:, None]
    chosen_N, dots_N = below_NV.gather(1, token_N[:, None])[:, 0].double(), torch.linalg.vecdot(p_NV, below_NV).double()
    return Reductions(largest.indices, below_NV.exp_().sum(-1).log_().double(), dots_N, chosen_N)


@_intrinsic
def _as_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 with these bits."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@compiled(forceinline=True, fastmath={"contract", "nsz"})
def _exp(x):  # type: ignore[no-untyped-def]
    """exp(x) for x ≤ 0: 2^n · 2^f with n whole and |f| ≤ ½, the latter by its Taylor series. 0 stays above 2^-127."""
    t = x * np.float32(1.4426950408889634)
    t = t if t > np.float32(-126) else np.float32(-126)
    n = np.floor(t + np.float32(0.5))
    f = t - n
    y = np.float32(1.5403530393381610e-4)  # ln(2)^k / k!, k = 6 … 0
    y = y * f + np.float32(1.3333558146428443e-3)
    y = y * f + np.float32(9.6181291076284772e-3)
    y = y * f + np.float32(5.5504108664821580e-2)
    y = y * f + np.float32(2.4022650695910072e-1)
    y = y * f + np.float32(6.9314718055994531e-1)
    y = y * f + np.float32(1)
    return y * _as_float((np.int32(n) + np.int32(127)) << np.int32(23))


@compiled(forceinline=True)
def _most(bits, most):  # type: ignore[no-untyped-def]
    """The larger of `most` and a piece's entries, all as whole numbers in the order of the floats whose bits they are,
    since only those are compared in vector registers here. What is not a number lies beyond the others."""
    for j in range(bits.shape[0]):
        most = max(most, _ordered(bits[j]))
    return most


@compiled(forceinline=True)
def _ordered(bits):  # type: ignore[no-untyped-def]
    """Bits of a float32 to a whole number in the same order, and back."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@compiled(fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _sums(piece, p, best):  # type: ignore[no-untyped-def]
    """Σ exp and Σ p · logit of a piece."""
    exps = dots = np.float32(0)
    for j in range(piece.shape[0]):
        below = piece[j] - best
        exps += _exp(below)
        dots += p[j] * below
    return exps, dots


@compiled()
def _reduce(logits, bits, p, token, first, stop, top, normaliser, dots, chosen):  # type: ignore[no-untyped-def]
    width = logits.shape[1]
    for n in range(first, stop):
        row, most, holds = logits[n], np.int32(-(2**31)), 0
        for start in range(0, width, _PIECE):
            found = _most(bits[n, start : start + _PIECE], most)
            if found > most:
                most, holds = found, start
        best = _as_float(_ordered(most))
        while holds < width - 1 and row[holds] != best:
            holds += 1
        exps = total = 0.0
        for start in range(0, width, _PIECE):
            some, part = _sums(row[start : start + _PIECE], p[n, start : start + _PIECE], best)
            exps += some
            total += part
        top[n], normaliser[n], dots[n] = holds, np.log(exps), total
        chosen[n] = row[token[n]] - best
