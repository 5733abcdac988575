"""The primitives of a step on a CPU: kernels/choice.py says what they compute, cpu_bags.py and cpu_update.py how."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from thresher.cache.kernels.cpu_pool import over_rows
from thresher.cache.kernels.lines import whole_lines
from thresher.train.kernels import cpu_bags, cpu_update
from thresher.train.kernels.cpu_update import Adam, Signum
from thresher.train.kernels.gradients import Facts, Rows, no_facts, numbers

if TYPE_CHECKING:
    from thresher.train.kernels.sparse import Selection

_NOWHERE = np.empty(0)


def decode(out_NM: Tensor, z_A: Tensor, W_FM: Tensor, selection: "Selection") -> None:
    """out[n] += Σ z · W[latent] over the token's entries."""
    entries = (selection.offsets.numpy(), selection.latents.numpy(), z_A.numpy())
    start = _start(W_FM.shape[0], entries[2].dtype, None)
    _bags(out_NM, W_FM, entries, cpu_bags.ADD, start, _NOWHERE, np.empty(0, entries[2].dtype))


def decoder_gradient(
    z_A: Tensor,
    g_NM: Tensor,
    W_FM: Tensor,
    selection: "Selection",
    dW_FM: Tensor,
    fresh: bool = True,
    facts: Facts | None = None,
    begun: Rows | None = None,
) -> Tensor:
    """dz [A] = g[token] · W[latent]; dW[f] (+)= Σ z · g[token] over the latent's entries.

    Facts and `begun`, what dW begins with, need `fresh`.
    """
    assert fresh or (facts is None and begun is None)
    rows, width = W_FM.shape
    order, offsets, tokens, z = _turned(selection, z_A)
    noted = no_facts(rows) if facts is None else facts
    squares, along, norms = (part.zero_().numpy() for part in noted)
    dots = np.zeros_like(z)
    places = (*flat(dW_FM), *flat(g_NM), *flat(W_FM))
    how, start = _how(dW_FM, fresh), _start(rows, z.dtype, begun)

    def piece(first: int, stop: int) -> None:
        cpu_bags.bags_and_dots(first, stop, width, *places, offsets, tokens, z, how, start, squares, dots, norms, along)

    over_rows(rows, piece, (2 * z_A.shape[0] + rows) * width)
    out = torch.empty_like(z_A)
    out.numpy()[order] = dots
    return out


def encoder_gradient(
    da_A: Tensor,
    x_ND: Tensor,
    selection: "Selection",
    dW_FD: Tensor,
    fresh: bool = True,
    facts: Facts | None = None,
    begun: Rows | None = None,
) -> Tensor:
    """dW[f] (+)= Σ da · x[token] over the latent's entries; [F] Σ da. Of the facts only the squares are set.

    Facts and `begun`, what dW begins with, need `fresh`.
    """
    assert fresh or (facts is None and begun is None)
    _, *entries = _turned(selection, da_A)
    squares = _NOWHERE if facts is None else facts.squares.zero_().numpy()
    sums, start = da_A.new_empty(selection.width), _start(selection.width, entries[2].dtype, begun)
    _bags(dW_FD, x_ND, entries, _how(dW_FD, fresh), start, squares, sums.numpy())
    return sums


def update(
    weight_FM: Tensor,
    grad_FM: Tensor,
    m_FM: Tensor,
    v_FM: Tensor,
    along_F: Tensor | None,
    scale: float,
    numbers: Adam,
    unit: bool,
) -> None:
    """Each row's gradient becomes scale · (grad + along · weight), Adam moves the row, `unit` sets its norm to 1."""
    rows, width = weight_FM.shape
    kind = weight_FM.numpy().dtype.type
    along = np.empty(0, kind) if along_F is None else along_F.numpy()
    flat = [tensor.reshape(-1).numpy() for tensor in (weight_FM, grad_FM, m_FM, v_FM)]

    def piece(first: int, stop: int) -> None:
        cpu_update.update(first, stop, width, *flat, along, kind(scale), numbers, unit)

    over_rows(rows, piece, 4 * weight_FM.numel())


def adam(
    dtype: torch.dtype, rate: float, betas: tuple[float, float], eps: float, step: int, decay: float = 0.0
) -> Adam:
    """The numbers of step `step`, counted from 1, in a number format."""
    kind = torch.empty(0, dtype=dtype).numpy().dtype.type
    first, second = (1 - beta**step for beta in betas)
    return Adam(*(kind(number) for number in (*betas, rate / first, 1 / math.sqrt(second), eps, 1 - rate * decay)))


def signum(
    weight_FM: Tensor,
    grad_FM: Tensor,
    u_FM: Tensor,
    mean_FM: Tensor,
    along_F: Tensor | None,
    rate: float,
    share: float,
    momentum: float,
    unit: bool,
) -> None:
    """Schedule-free signum (train/updates/signum.py) of every row, from the gradient grad + along · weight."""
    rows, width = weight_FM.shape
    kind = weight_FM.numpy().dtype.type
    along = np.empty(0, kind) if along_F is None else along_F.numpy()
    flat = [tensor.reshape(-1).numpy() for tensor in (weight_FM, grad_FM, u_FM, mean_FM)]
    numbers = Signum(kind(rate), kind(share), kind(momentum))

    def piece(first: int, stop: int) -> None:
        cpu_update.signum(first, stop, width, *flat, along, numbers, unit)

    over_rows(rows, piece, 4 * weight_FM.numel())


def facts_of(weight_FM: Tensor, grad_FM: Tensor) -> Facts:
    """Facts of a gradient that came from elsewhere."""
    rows, width = weight_FM.shape
    out = no_facts(rows)
    flat = [tensor.reshape(-1).numpy() for tensor in (weight_FM, grad_FM)]
    places = [part.numpy() for part in out]

    def piece(first: int, stop: int) -> None:
        cpu_update.facts(first, stop, width, *flat, *places)

    over_rows(rows, piece, 2 * weight_FM.numel())
    return out


def _bags(
    out: Tensor,
    table: Tensor,
    entries: Sequence[np.ndarray],
    how: int,
    start: cpu_bags.Start,
    squares: np.ndarray,
    sums: np.ndarray,
) -> None:
    offsets, index, weights = entries
    groups, width = offsets.shape[0] - 1, table.shape[1]
    places = (*flat(out), *flat(table))

    def piece(first: int, stop: int) -> None:
        cpu_bags.bags(first, stop, width, *places, offsets, index, weights, how, start, squares, sums)

    over_rows(groups, piece, (index.shape[0] + groups) * width)


def _turned(selection: "Selection", values_A: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A selection's order by latent; offsets, tokens and values in that order."""
    turned = selection.by_latent
    order = turned.order.numpy()
    return order, turned.offsets.numpy(), turned.tokens.numpy(), values_A.numpy()[order]


def _how(out: Tensor, fresh: bool) -> int:
    """How rows of a weight's gradient are written: it is large, and read again only when all of it is there."""
    if not fresh:
        return cpu_bags.ADD
    return cpu_bags.STREAM if whole_lines(out.numpy()) else cpu_bags.REPLACE


def _start(rows: int, kind: np.dtype[Any], begun: Rows | None) -> cpu_bags.Start:
    """What the rows of a weight's gradient begin with."""
    if begun is None:
        nothing = np.empty(0, np.uint16 if kind == np.float32 else kind)  # as AuxK's rows: one compilation serves both
        return cpu_bags.Start(np.empty(0, np.int32), nothing, kind.type(1))
    place = np.full(rows, -1, np.int32)
    place[begun.rows.numpy()] = np.arange(begun.rows.shape[0])
    return cpu_bags.Start(place, numbers(begun.values), kind.type(begun.factor))


def flat(matrix: Tensor) -> tuple[np.ndarray, int]:
    """A matrix with unit stride along rows as the numbers from its first to its last, and the distance of rows."""
    rows, width = matrix.shape
    assert matrix.stride(1) == 1 or width == 1
    apart = matrix.stride(0) if rows > 1 else width
    size = (rows - 1) * apart + width if rows else 0
    return matrix.detach().as_strided((size,), (1,)).numpy(), apart
