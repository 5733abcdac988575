"""One update of a weight's rows: projection, clipping, Adam, unit norm and a bfloat16 copy, each row touched once.

A program owns a row. It reads gradient, weight and both moments block by block, writes them back, and if the row's
norm is to be 1 goes over the new row once more while it is in the cache. Rate, step and clip scale lie in device
memory, and so does the word that this update is left out (a loss or gradient that is not finite, a selection that
overflowed): then nothing at all is written, and the host never knows. Rows without a gradient still run, since their
moments decay.

`step` does this for all parameters, with the norm of the whole gradient from each row's facts (kernels/gradients.py).

Specification: `plain_update` here, and `plain_step` in train/optim.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.train.kernels.gradients import Facts
from thresher.train.kernels.triton.launch import accumulator, on

_BLOCK = 1024


class Numbers(NamedTuple):
    """What an update depends on beside the row."""

    beta1: float
    """Decay of the first moment."""
    beta2: float
    """Decay of the second moment."""
    eps: float
    """Added to the root of the second moment."""
    rate: Tensor
    """Learning rate; scalar on the device, like the next two."""
    step: Tensor
    """Number of this update, counted from 1 and without those left out; [P] for P parameters at once."""
    go: Tensor
    """False: leave everything as it is."""
    decays: Sequence[float] = (0.0,)
    """[P] decoupled weight decay, as a multiple of the learning rate."""


def update(
    weight_FM: Tensor,
    grad_FM: Tensor,
    m_FM: Tensor,
    v_FM: Tensor,
    along_F: Tensor | None,
    scale: Tensor | float,
    adam: Numbers,
    unit: bool,
    shadow_FM: Tensor | None = None,
) -> None:
    """Each row's gradient becomes scale · (grad + along · weight), Adam moves the row; `unit` sets its norm to 1.

    `shadow` receives the new row in its own, shorter format.
    """
    _launch(weight_FM, grad_FM, m_FM, v_FM, along_F, shadow_FM, _numbers(adam, scale)[0], unit)


def _launch(
    weight_FM: Tensor,
    grad_FM: Tensor,
    m_FM: Tensor,
    v_FM: Tensor,
    along_F: Tensor | None,
    shadow_FM: Tensor | None,
    numbers: Tensor,
    unit: bool,
) -> None:
    rows, width = weight_FM.shape
    strides = (weight_FM.stride(0), grad_FM.stride(0), m_FM.stride(0), v_FM.stride(0))
    with on(weight_FM):
        _update[(rows,)](
            weight_FM,
            grad_FM,
            m_FM,
            v_FM,
            along_F,
            shadow_FM,
            numbers,
            width,
            *strides,
            0 if shadow_FM is None else shadow_FM.stride(0),
            ALONG=along_F is not None,
            SHADOW=shadow_FM is not None,
            UNIT=unit,
            BLOCK=min(_BLOCK, max(16, 1 << (width - 1).bit_length())),
            SUM=accumulator(weight_FM),
        )


def _numbers(adam: Numbers, scale: Tensor | float) -> Tensor:
    """[P, 8] float64, P counts of steps: go, scale, rate / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ), β₁, β₂, ε, 1 − rate · decay."""
    step_P = adam.step.reshape(-1).to(torch.float64)
    out = step_P.new_empty(step_P.shape[0], 8)
    out[:, 0] = adam.go
    out[:, 1] = scale
    out[:, 2] = adam.rate / (1 - adam.beta1**step_P)
    out[:, 3] = (1 - adam.beta2**step_P).rsqrt()
    for place, constant in enumerate((adam.beta1, adam.beta2, adam.eps), 4):
        out[:, place].fill_(constant)
    out[:, 7].fill_(1.0)
    for place, decay in enumerate(adam.decays):
        if decay:
            out[place, 7].sub_(adam.rate, alpha=decay)
    return out


@torch.no_grad()
def plain_update(
    weight_FM: Tensor,
    grad_FM: Tensor,
    m_FM: Tensor,
    v_FM: Tensor,
    along_F: Tensor | None,
    scale: Tensor | float,
    adam: Numbers,
    unit: bool,
    shadow_FM: Tensor | None = None,
) -> None:
    """What `update` must equal."""
    if not bool(adam.go):
        return
    g = grad_FM if along_F is None else grad_FM + along_F[:, None] * weight_FM
    g = g * scale
    m_FM.mul_(adam.beta1).add_(g, alpha=1 - adam.beta1)
    v_FM.mul_(adam.beta2).addcmul_(g, g, value=1 - adam.beta2)
    number = adam.step.double()
    first, second = m_FM / (1 - adam.beta1**number), v_FM / (1 - adam.beta2**number)
    weight_FM *= 1 - adam.rate.double() * adam.decays[0]
    weight_FM -= adam.rate.double() * first / (second.sqrt() + adam.eps)
    if unit:
        weight_FM /= torch.linalg.vector_norm(weight_FM, dim=1, keepdim=True)
    if shadow_FM is not None:
        shadow_FM.copy_(weight_FM)


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    weight, grad, moment1, moment2, along, shadow, numbers, width, weight_stride, grad_stride, stride1, stride2,
    shadow_stride, ALONG: tl.constexpr, SHADOW: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(numbers) != 0:
        scale = tl.load(numbers + 1).to(SUM)
        rate = tl.load(numbers + 2).to(SUM)
        root = tl.load(numbers + 3).to(SUM)
        beta1 = tl.load(numbers + 4)  # 1 − β in double: a β near 1 leaves few digits
        beta2 = tl.load(numbers + 5)
        eps = tl.load(numbers + 6).to(SUM)
        keep = tl.load(numbers + 7).to(SUM)
        rest1 = (1.0 - beta1).to(SUM)
        rest2 = (1.0 - beta2).to(SUM)
        keep1 = beta1.to(SUM)
        keep2 = beta2.to(SUM)
        squares = tl.zeros([BLOCK], dtype=SUM)
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < width
            w = tl.load(weight + row * weight_stride + column, mask=inside, other=0.0).to(SUM)
            g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(SUM)
            if ALONG:
                g += tl.load(along + row).to(SUM) * w
            g *= scale
            m = tl.load(moment1 + row * stride1 + column, mask=inside, other=0.0).to(SUM)
            v = tl.load(moment2 + row * stride2 + column, mask=inside, other=0.0).to(SUM)
            m = keep1 * m + rest1 * g
            v = keep2 * v + rest2 * g * g
            w = keep * w - rate * m / (tl.sqrt(v) * root + eps)
            squares += w * w
            tl.store(moment1 + row * stride1 + column, m.to(moment1.dtype.element_ty), mask=inside)
            tl.store(moment2 + row * stride2 + column, v.to(moment2.dtype.element_ty), mask=inside)
            tl.store(weight + row * weight_stride + column, w.to(weight.dtype.element_ty), mask=inside)
            if SHADOW and not UNIT:
                tl.store(
                    shadow + row * shadow_stride + column, w.to(tl.float32).to(shadow.dtype.element_ty), mask=inside
                )
        if UNIT:
            norm = tl.sqrt(tl.sum(squares, axis=0))
            for first in range(0, width, BLOCK):  # each thread reads back what it wrote itself
                column = first + tl.arange(0, BLOCK)
                inside = column < width
                w = tl.load(weight + row * weight_stride + column, mask=inside, other=0.0).to(SUM) / norm
                tl.store(weight + row * weight_stride + column, w.to(weight.dtype.element_ty), mask=inside)
                if SHADOW:
                    tl.store(
                        shadow + row * shadow_stride + column, w.to(tl.float32).to(shadow.dtype.element_ty), mask=inside
                    )


class Rows(NamedTuple):
    """A parameter by rows, with all that its update needs."""

    weight: Tensor
    """[F, M]."""
    grad: Tensor
    """[F, M], without the multiples in `along`."""
    moment1: Tensor
    """[F, M] mean of gradients."""
    moment2: Tensor
    """[F, M] mean of squared gradients."""
    step: Tensor
    """Updates made so far: a scalar on the device, advanced here."""
    along: Tensor | None
    """[F]: the gradient has this multiple of the weight's row added; None: nothing."""
    facts: Facts | None
    """Of `grad` and `weight`; None: not known."""
    unit: bool
    """Whether rows keep norm 1: the gradient's part along the row is then taken out first."""
    shadow: Tensor | None = None
    """[F, M] copy of the weight in a shorter format, equal to it before; written with it."""
    decay: float = 0.0
    """Decoupled weight decay, as a multiple of the learning rate."""


def step(
    parameters: Sequence[Rows], rate: float, finite: Tensor, clip: float | None, betas: tuple[float, float], eps: float
) -> Tensor:
    """One update of all parameters, or none when `finite` or the gradient's norm is not; nothing is read back.

    Returns the norm before clipping; infinite exactly when the update was left out.
    """
    turns = [_along(rows) for rows in parameters]
    norm = torch.stack([square for _, square in turns]).sum().sqrt()
    norm = torch.where(finite & norm.isfinite(), norm, torch.inf)
    go = norm.isfinite()
    scale = torch.ones_like(norm) if clip is None else (clip / norm).clamp_max(1.0)
    for rows in parameters:
        rows.step.add_(go)
    steps = torch.stack([rows.step for rows in parameters])
    decays = [rows.decay for rows in parameters]
    numbers = _numbers(Numbers(*betas, eps, torch.full_like(norm, rate), steps, go, decays), scale)
    for rows, (along, _), own in zip(parameters, turns, numbers, strict=True):
        _launch(rows.weight, rows.grad, rows.moment1, rows.moment2, along, rows.shadow, own, rows.unit)
    return norm.to(parameters[0].weight.dtype)


def _along(rows: Rows) -> tuple[Tensor | None, Tensor]:
    """Multiples of the rows still to be added, projection included, and the squared norm of what then results."""
    facts = facts_of(rows.weight, rows.grad) if rows.facts is None else rows.facts
    if rows.along is None and not rows.unit:
        return None, facts.squares.sum()
    along = torch.zeros_like(facts.dots) if rows.along is None else rows.along.double()
    if rows.unit:  # (g + along · w) · w, to be taken out
        along = along - (facts.dots + along * facts.weights)
    squares = facts.squares + 2 * along * facts.dots + along.square() * facts.weights
    return along.to(rows.weight.dtype), squares.clamp_min(0.0).sum()


def facts_of(weight_FM: Tensor, grad_FM: Tensor) -> Facts:
    """‖g‖², g · w and ‖w‖² of every row."""
    rows, width = weight_FM.shape
    out = torch.empty(3, rows, dtype=torch.float64, device=weight_FM.device)
    block = min(_BLOCK, max(16, 1 << (width - 1).bit_length()))
    with on(weight_FM):
        _facts[(rows,)](weight_FM, grad_FM, out, rows, width, weight_FM.stride(0), grad_FM.stride(0), BLOCK=block)
    return Facts(*out.unbind(0))


@triton.jit
def _facts(  # type: ignore[no-untyped-def]
    weight, grad, out, rows, width, weight_stride, grad_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    gg = tl.zeros([BLOCK], dtype=tl.float64)
    gw = tl.zeros([BLOCK], dtype=tl.float64)
    ww = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        w = tl.load(weight + row * weight_stride + column, mask=inside, other=0.0).to(tl.float64)
        g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float64)
        gg += g * g
        gw += g * w
        ww += w * w
    tl.store(out + row, tl.sum(gg, axis=0))
    tl.store(out + rows + row, tl.sum(gw, axis=0))
    tl.store(out + 2 * rows + row, tl.sum(ww, axis=0))
