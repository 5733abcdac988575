"""Firing rules: which pre-activations are selected, and what the selected ones become.

Selecting looks at the dense block a [N, F] without gradient and returns a `Selection` (or None: all entries, see
kernels/sparse.py). Firing maps the selected a to z by ordinary autograd or, for JumpReLU, by the window gradients of
Rajamanoharan et al. 2024 (arXiv:2407.14435): a rectangle of width ε around the threshold stands for the delta.

- TopK takes the k largest a of each token; BatchTopK the ⌊k·N⌋ largest positive a of the whole block, exactly, ties
  to the lower position. An entry with a ≤ 0 that was picked gives z = 0 and no gradient.
- GroupMax takes the largest a of each of k groups of neighbours in every token.
- ReLU and JumpReLU take everything above a floor. JumpReLU's floor lies half a window below its threshold, so that
  entries there can pull the threshold down.

BatchTopK does not sort the block. A strided sample suggests a floor that slightly too many entries exceed; those are
compacted, and the exact value of rank ⌊k·N⌋ is found among them. If too few exceed it the floor falls to 0, so a bad
guess costs time and never exactness.

All this counts and branches on what it finds, which on a CPU is free. A device must not be asked in the middle of a
step: there selections have a fixed capacity (kernels/padded.py), made by Triton kernels where there are such. Values
shorter than float32 are compared as float32 with float32 thresholds everywhere.
"""

import importlib
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.train.kernels import frozen, padded
from thresher.train.kernels.choice import Implementation, Kernels
from thresher.train.kernels.padded import Room, wide
from thresher.train.kernels.sparse import DENSE_SHARE, Selection, per_latent

_SAMPLE = 1 << 15
_TOPK_HEAP = 128  # torch.topk on a CPU is faster than numpy while 128 k ≤ F, measured


def _plain(a_NF: Tensor, kernels: Kernels | None) -> bool:
    """Whether dense formulas are asked for; takes note of who selects."""
    return kernels is not None and _pick(a_NF, kernels) == "plain"


def _pick(a_NF: Tensor, kernels: Kernels) -> Implementation:
    return kernels.pick("select", a_NF.device, wide(a_NF.dtype), a_NF.numel())


def fixed_capacity(a_NF: Tensor, kernels: Kernels | None) -> ModuleType | None:
    """The module of `topk`, `batch_topk` and `above` that read nothing back; None where reading back is free, or
    where the products could not deal with padding."""
    if a_NF.device.type == "cpu":
        return None
    if _pick(a_NF, kernels or Kernels()) != "triton":
        return None
    return padded if a_NF.dtype == torch.float64 else importlib.import_module("thresher.train.kernels.triton.select")


def plain_topk(a_NF: Tensor, k: int) -> Tensor:
    """[N, F] bool: the k largest of every row; of equal ones at the edge, any."""
    return torch.zeros_like(a_NF, dtype=torch.bool).scatter_(1, a_NF.topk(k, dim=1).indices, True)


def select_topk(a_NF: Tensor, k: int, kernels: Kernels | None = None) -> Selection:
    """The k largest of every row, latents ascending; which of equal ones at the edge, the row alone decides."""
    if _plain(a_NF, kernels):
        return compress(plain_topk(a_NF, k))
    fixed = fixed_capacity(a_NF, kernels)
    if fixed is not None or a_NF.device.type != "cpu":
        return (fixed or padded).topk(a_NF, k)
    tokens, width = a_NF.shape
    a = a_NF.to(wide(a_NF.dtype)).numpy()
    offsets = torch.arange(0, tokens * k + 1, k)
    if _TOPK_HEAP * k > width:
        # numpy's partition runs on vector instructions; torch's heap only wins where k is a small share of F
        position = np.flatnonzero(_topk_mask(a, k))
        return Selection(torch.from_numpy(position % width), offsets, width)
    latents = torch.topk(a_NF, k, dim=1, sorted=False).indices.numpy()
    latents.sort(axis=1)
    return Selection(torch.from_numpy(latents.reshape(-1)), offsets, width)


def _topk_mask(a: np.ndarray, k: int) -> np.ndarray:
    """Bool mask of the k largest of every row, equal ones at the edge by position."""
    cut = np.partition(a, -k, axis=1)[:, -k, None]
    mask = np.greater_equal(a, cut)
    if np.count_nonzero(mask) != k * a.shape[0]:
        counts = np.count_nonzero(mask, axis=1)
        ties, lost = np.flatnonzero(counts > k), np.flatnonzero(counts < k)
        above, equal = a[ties] > cut[ties], a[ties] == cut[ties]
        mask[ties] = above | (equal & (np.cumsum(equal, axis=1) <= k - above.sum(axis=1, keepdims=True)))
        mask[lost[:, None], np.argsort(-a[lost], axis=1, kind="stable")[:, :k]] = True  # a cut that is not a number
    return mask


def plain_groupmax(a_NF: Tensor, groups: int) -> Tensor:
    """[N, F] bool: the largest of each of `groups` runs of F / groups neighbours; of equal ones the first."""
    best_NK1 = a_NF.unflatten(1, (groups, -1)).argmax(2, keepdim=True)
    return torch.zeros_like(a_NF, dtype=torch.bool).unflatten(1, (groups, -1)).scatter_(2, best_NK1, True).flatten(1)


def select_groupmax(a_NF: Tensor, groups: int, kernels: Kernels | None = None) -> Selection:
    """The largest of each group in every row, latents ascending; equals `plain_groupmax`."""
    if _plain(a_NF, kernels):
        return compress(plain_groupmax(a_NF, groups))
    tokens, width = a_NF.shape
    size = width // groups
    starts = torch.arange(0, width, size, device=a_NF.device)
    if a_NF.device.type == "cpu" and fixed_capacity(a_NF, kernels) is None:
        a = a_NF.to(wide(a_NF.dtype)).numpy()  # numpy looks for the largest with vector instructions
        latents = torch.from_numpy(a.reshape(tokens, groups, size).argmax(2)) + starts
        return Selection(latents.view(-1), torch.arange(0, tokens * groups + 1, groups), width)
    latents = a_NF.view(tokens, groups, size).argmax(2) + starts
    rows = torch.arange(0, tokens * width, width, device=a_NF.device)
    return padded.Padded((latents + rows[:, None]).view(-1), tokens, width)


def plain_batch_topk(a_NF: Tensor, count: int) -> Tensor:
    """[N, F] bool: the `count` largest positive entries of the block, ties to the lower flat position."""
    flat = a_NF.reshape(-1)
    best = torch.sort(flat, descending=True, stable=True).indices[:count]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[best] = True
    return (mask & (flat > 0)).view_as(a_NF)


def select_batch_topk(a_NF: Tensor, count: int, kernels: Kernels | None = None) -> Selection:
    """The `count` largest positive entries of the block (fewer if fewer are positive); equals `plain_batch_topk`."""
    if _plain(a_NF, kernels):
        return compress(plain_batch_topk(a_NF, count))
    fixed = fixed_capacity(a_NF, kernels)
    if fixed is not None:
        return fixed.batch_topk(a_NF, count)
    flat = a_NF.reshape(-1).to(wide(a_NF.dtype))
    if count == 0:
        return _compressed(torch.empty(0, dtype=torch.int64, device=flat.device), *a_NF.shape)
    if flat.device.type != "cpu":
        return compress(padded.best(flat, count).view_as(a_NF))
    floor = _likely_floor(flat, count)
    position = _above(flat, floor)
    if floor > 0 and position.shape[0] < count:
        position = _above(flat, 0.0)
    if position.shape[0] > count:
        position = position.index_select(0, _largest(flat.index_select(0, position), count))
    return _compressed(position, *a_NF.shape)


def select_above(
    a_NF: Tensor,
    floor: Tensor | float,
    room: Room | None = None,
    dense_share: float = DENSE_SHARE,
    kernels: Kernels | None = None,
) -> Selection | None:
    """Every entry above its floor ([F] or a number); None when more than `dense_share` of all entries are.

    With a fixed capacity, `room` decides by what it knows of earlier blocks, and the selection may have `overflowed`.
    """
    if _plain(a_NF, kernels):
        return None
    fixed = fixed_capacity(a_NF, kernels)
    if fixed is None or room is None:
        mask = _exceeds(a_NF, floor)
        if int(torch.count_nonzero(mask)) > dense_share * a_NF.numel():
            return None
        return compress(mask)
    capacity = room.capacity(a_NF.shape[0], a_NF.shape[1], dense_share)
    if capacity is None:
        room.note(torch.count_nonzero(a_NF > floor), a_NF.shape[0])
        return None
    selection: padded.Padded
    selection, count = fixed.above(a_NF, floor, capacity)
    room.note(count, a_NF.shape[0])
    return selection


def select_frozen(a_NF: Tensor, floor: Tensor) -> tuple[Selection, Tensor]:
    """Every entry above its floor [F], however many, or not a number; and their values [A]. Reads back: for inference
    only."""
    if frozen.can_choose(a_NF):
        return frozen.above(a_NF, floor.to(a_NF.dtype))
    selection = compress(~(a_NF <= floor))
    return selection, selection.take(a_NF)


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
    return max(0.0, _ranked(sample, rank))


def _largest(values: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest, ascending; ties to the lower position. 0 < count < len(values)."""
    cut = _ranked(values, count)
    keep = values > cut
    tied = values == cut
    keep |= tied & (tied.cumsum(0) <= count - keep.sum())
    return _positions(keep)


def _ranked(values: Tensor, rank: int) -> float:
    """The value of a rank, the largest having rank 1."""
    at = values.shape[0] - rank
    return float(np.partition(values.numpy(), at)[at])


def _exceeds(a: Tensor, floor: Tensor | float) -> Tensor:
    """Bool mask of a > floor; numpy compares into bool with vector instructions, torch's CPU loop does not."""
    if a.device.type == "cpu" and a.dtype == wide(a.dtype):
        return torch.from_numpy(np.greater(a.numpy(), floor.numpy() if isinstance(floor, Tensor) else floor))
    return a > floor  # a tensor's floor is float32 or wider, and so is then the comparison


def _above(flat: Tensor, floor: float) -> Tensor:
    return _positions(_exceeds(flat, floor))


def _positions(mask: Tensor) -> Tensor:
    """Ascending positions of the true entries of a vector; on a CPU numpy again."""
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
    def forward(
        ctx: Any, a: Tensor, theta_F: Tensor, width: Tensor, selection: Selection | None
    ) -> tuple[Tensor, Tensor]:
        theta = theta_F if selection is None else theta_F.index_select(0, selection.latents)
        ctx.save_for_backward(a, theta, width)
        ctx.selection = selection
        ctx.set_materialize_grads(False)
        gate = torch.gt(a, theta, out=torch.empty_like(a))  # 0 or 1 in a's own dtype, which vectorises
        return gate * a, gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_z: Tensor | None, g_gate: Tensor | None) -> tuple[Tensor | None, ...]:
        a, theta, width = ctx.saved_tensors
        distance = a - theta
        grad_a = torch.gt(distance, 0.0, out=torch.empty_like(a)).mul_(g_z) if g_z is not None else None
        window = distance.abs_().lt_(width / 2)
        pull = torch.zeros_like(a) if g_z is None else g_z * theta
        if g_gate is not None:
            pull = pull + g_gate
        return grad_a, per_latent(window.mul_(pull), ctx.selection).div_(-width), None, None


def jump_relu(a: Tensor, theta_F: Tensor, width: Tensor, selection: Selection | None) -> tuple[Tensor, Tensor]:
    """z = a · 1[a > θ] and the gate 1[a > θ], for a [A] (or [N, F]); θ [F], window ε a scalar.

    z gives a the gradient 1[a > θ] and θ the gradient −(θ/ε)·1[|a − θ| < ε/2]; the gate gives a none and θ
    −(1/ε)·1[|a − θ| < ε/2]. Specification: `plain_jump_relu` and `plain_step`.
    """
    z, gate = _JumpReLU.apply(a, theta_F, width, selection)
    return z, gate


def plain_jump_relu(a_NF: Tensor, theta_F: Tensor, width: Tensor) -> Tensor:
    """What the z of `jump_relu` must equal on the whole block: the jump's derivative added as a term of value 0."""
    window = ((a_NF - theta_F).abs() < width / 2).to(a_NF.dtype)
    moved = theta_F - theta_F.detach()
    return a_NF * (a_NF > theta_F) - (theta_F.detach() / width * window).detach() * moved


def plain_step(a_NF: Tensor, theta_F: Tensor, width: Tensor) -> Tensor:
    """What the gate of `jump_relu` must equal on the whole block."""
    window = ((a_NF - theta_F).abs() < width / 2).to(a_NF.dtype)
    return (a_NF > theta_F).to(a_NF.dtype) - (window / width).detach() * (theta_F - theta_F.detach())
