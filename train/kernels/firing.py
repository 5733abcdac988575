"""Firing rules: which pre-activations are selected, and what the selected ones become.

Selecting looks at the dense block a [N, F] without gradient and returns a `Selection` (or None: all entries, see
kernels/sparse.py). Firing maps the selected a to z by ordinary autograd or, for JumpReLU, by the window gradients of
Rajamanoharan et al. 2024 (arXiv:2407.14435): a rectangle of width ε around the threshold stands for the delta.

- TopK takes the k largest a of each token; BatchTopK the ⌊k·N⌋ largest positive a of the whole block, exactly, ties
  to the lower position. An entry with a ≤ 0 that was picked gives z = 0 and no gradient.
- ReLU and JumpReLU take everything above a floor. JumpReLU's floor lies half a window below its threshold, so that
  entries there can pull the threshold down.

BatchTopK does not sort the block. A strided sample suggests a floor that slightly too many entries exceed; those are
compacted, and the exact value of rank ⌊k·N⌋ is found among them. If too few exceed it the floor falls to 0, so a bad
guess costs time and never exactness.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.train.kernels.sparse import DENSE_SHARE, Selection, per_latent

_SAMPLE = 1 << 15


def select_topk(a_NF: Tensor, k: int) -> Selection:
    """The k largest of every row."""
    tokens, width = a_NF.shape
    latents = torch.topk(a_NF, k, dim=1, sorted=False).indices.reshape(-1)
    offsets = torch.arange(0, tokens * k + 1, k, device=a_NF.device)
    return Selection(latents, offsets, width)


def plain_batch_topk(a_NF: Tensor, count: int) -> Tensor:
    """[N, F] bool: the `count` largest positive entries of the block, ties to the lower flat position."""
    flat = a_NF.reshape(-1)
    best = torch.sort(flat, descending=True, stable=True).indices[:count]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[best] = True
    return (mask & (flat > 0)).view_as(a_NF)


def select_batch_topk(a_NF: Tensor, count: int) -> Selection:
    """The `count` largest positive entries of the block (fewer if fewer are positive); equals `plain_batch_topk`."""
    flat = a_NF.reshape(-1)
    floor = _likely_floor(flat, count)
    position = _above(flat, floor)
    if floor > 0 and position.shape[0] < count:
        position = _above(flat, 0.0)
    if position.shape[0] > count:
        position = position[_largest(flat[position], count)]
    return _compressed(position, *a_NF.shape)


def select_above(a_NF: Tensor, floor: Tensor | float, dense_share: float = DENSE_SHARE) -> Selection | None:
    """Every entry above its floor ([F] or a number); None when more than `dense_share` of all entries are."""
    mask = a_NF > floor
    if int(torch.count_nonzero(mask)) > dense_share * a_NF.numel():
        return None
    return _compressed(_positions(mask.view(-1)), *a_NF.shape)


def compress(mask_NF: Tensor) -> Selection:
    """The true entries of a block."""
    return _compressed(_positions(mask_NF.reshape(-1)), *mask_NF.shape)


def _likely_floor(flat: Tensor, count: int) -> float:
    """A value that probably somewhat more than `count` entries exceed; 0 when most positive entries are wanted.

    The sample's stride is odd, so it visits all latents. Its rank is set four standard deviations deep, so the floor
    is too high about once in thirty thousand calls.
    """
    stride = max(1, flat.shape[0] // _SAMPLE) | 1
    sample = flat[::stride]
    wanted = count / stride
    rank = math.ceil(wanted + 4 * math.sqrt(wanted) + 4)
    if rank >= sample.shape[0]:
        return 0.0
    return max(0.0, float(torch.topk(sample, rank).values[-1]))


def _largest(values: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest, ascending; ties to the lower position. 0 < count < len(values)."""
    if values.device.type == "cpu":
        cut = float(np.partition(values.numpy(), values.shape[0] - count)[values.shape[0] - count])
    else:
        cut = torch.topk(values, count, sorted=True).values[-1]  # type: ignore[assignment]
    keep = values > cut
    tied = values == cut
    keep |= tied & (tied.cumsum(0) <= count - keep.sum())
    return _positions(keep)


def _above(flat: Tensor, floor: float) -> Tensor:
    if flat.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flat.numpy() > floor))
    return _positions(flat > floor)


def _positions(mask: Tensor) -> Tensor:
    """Ascending positions of the true entries of a vector; numpy finds them faster than torch on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return torch.nonzero(mask).view(-1)


def _compressed(position: Tensor, tokens: int, width: int) -> Selection:
    """Compressed rows of ascending flat positions in an [N, F] block."""
    rows = torch.div(position, width, rounding_mode="floor")
    offsets = torch.zeros(tokens + 1, dtype=torch.int64, device=position.device)
    torch.cumsum(torch.bincount(rows, minlength=tokens), 0, out=offsets[1:])
    selection = Selection(torch.sub(position, rows, alpha=width), offsets, width)
    selection.__dict__["rows"] = rows  # fills the cached property
    return selection


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, theta_F: Tensor, width: Tensor, selection: Selection | None) -> Tensor:
        theta = theta_F if selection is None else theta_F[selection.latents]
        ctx.save_for_backward(a, theta, width)
        ctx.selection = selection
        return a * (a > theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, theta, width = ctx.saved_tensors
        window = (a - theta).abs() < width / 2
        grad_theta = per_latent(-(theta / width) * g * window, ctx.selection)
        return g * (a > theta), grad_theta, None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, theta_F: Tensor, width: Tensor, selection: Selection | None) -> Tensor:
        theta = theta_F if selection is None else theta_F[selection.latents]
        ctx.save_for_backward(a, theta, width)
        ctx.selection = selection
        return (a > theta).to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, theta, width = ctx.saved_tensors
        window = (a - theta).abs() < width / 2
        return None, per_latent(-g * window / width, ctx.selection), None, None


def jump_relu(a: Tensor, theta_F: Tensor, width: Tensor, selection: Selection | None) -> Tensor:
    """z = a · 1[a > θ] for a [A] (or [N, F]); θ [F] gets −(θ/ε)·1[|a − θ| < ε/2]. Equals `plain_jump_relu`."""
    out: Tensor = _JumpReLU.apply(a, theta_F, width, selection)
    return out


def step(a: Tensor, theta_F: Tensor, width: Tensor, selection: Selection | None) -> Tensor:
    """1[a > θ]; a gets no gradient, θ gets −(1/ε)·1[|a − θ| < ε/2]. Equals `plain_step`."""
    out: Tensor = _Step.apply(a, theta_F, width, selection)
    return out


def plain_jump_relu(a_NF: Tensor, theta_F: Tensor, width: Tensor) -> Tensor:
    """What `jump_relu` must equal on the whole block: the jump's derivative added as a term of value 0."""
    window = ((a_NF - theta_F).abs() < width / 2).to(a_NF.dtype)
    moved = theta_F - theta_F.detach()
    return a_NF * (a_NF > theta_F) - (theta_F.detach() / width * window).detach() * moved


def plain_step(a_NF: Tensor, theta_F: Tensor, width: Tensor) -> Tensor:
    """What `step` must equal on the whole block."""
    window = ((a_NF - theta_F).abs() < width / 2).to(a_NF.dtype)
    return (a_NF > theta_F).to(a_NF.dtype) - (window / width).detach() * (theta_F - theta_F.detach())
