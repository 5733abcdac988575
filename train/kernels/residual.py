"""What a reconstruction left of its target: e = y − ŷ, Σ‖e‖² and Σ‖e − ē‖², without gradient.

The reconstruction's loss and AuxK both take it. By library calls that is a pass for each number; on a CPU one compiled
loop does all of it, with sums in float64 over blocks of rows that do not depend on the number of threads. Sums for the
variation are of e less its first row, so that a residual which is the same for all tokens has none at all.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.kernels.cpu_pool import over_rows
from thresher.cache.kernels.jit import compiled
from thresher.train.kernels import padded
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.cpu import flat

_BLOCKS = 32


class Left(NamedTuple):
    """The residual of one destination."""

    residual: Tensor
    """e = y − ŷ [N, E]."""
    squares: Tensor
    """Σ‖e‖², a scalar."""
    known: Tensor | None
    """`variation`, where it came with the others."""

    def variation(self) -> Tensor:
        """Σ‖e − ē‖², a scalar."""
        return variation(self.residual) if self.known is None else self.known


def left(y_NE: Tensor, guess_NE: Tensor, kernels: Kernels) -> Left:
    """What a reconstruction leaves of `y_NE`; its rows may lie apart."""
    y_NE, guess_NE = y_NE.detach(), guess_NE.detach()
    on_cpu = not padded.must_not_ask(y_NE)
    if on_cpu and kernels.pick("residual", y_NE.device, y_NE.dtype, y_NE.numel()) == "numba":
        return _compiled(y_NE, guess_NE)
    residual_NE = y_NE - guess_NE
    return Left(residual_NE, torch.dot(residual_NE.view(-1), residual_NE.view(-1)), None)


def variation(residual_NE: Tensor) -> Tensor:
    """Σ‖e − ē‖², a scalar: the specification."""
    tokens = residual_NE.shape[0]
    mean_1E = residual_NE.new_full((1, tokens), 1 / tokens) @ residual_NE  # several times as fast as a sum of columns
    centred = (residual_NE - mean_1E).view(-1)
    return torch.dot(centred, centred)


def _compiled(y_NE: Tensor, guess_NE: Tensor) -> Left:
    residual_NE = torch.empty(y_NE.shape, dtype=y_NE.dtype)
    tokens, width = y_NE.shape
    blocks = min(_BLOCKS, tokens)
    rows = (*flat(y_NE.contiguous()), *flat(guess_NE), residual_NE.numpy())
    first_E, columns, sums = np.empty(width), np.zeros((blocks, width)), np.empty((blocks, 2))
    np.subtract(rows[0][:width], rows[2][:width], out=first_E, dtype=rows[0].dtype)

    def piece(start: int, stop: int) -> None:
        _leave(start, stop, *rows, first_E, columns, sums)

    over_rows(blocks, piece, 2 * y_NE.numel())
    (squares, spread), column_E = sums.sum(0), columns.sum(0)
    about_mean = max(spread - column_E @ column_E / tokens, 0.0)
    scalars = residual_NE.new_tensor([float(squares), float(about_mean)])
    return Left(residual_NE, *scalars.unbind(0))


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _leave(start, stop, y, y_apart, guess, guess_apart, residual, first, columns, sums):  # type: ignore[no-untyped-def]
    """e in blocks start to stop; each adds Σ(e − first) to its `columns`; its `sums` are Σ‖e‖² and Σ‖e − first‖²."""
    tokens, width = residual.shape
    for block in range(start, stop):
        column, squares, spread = columns[block], 0.0, 0.0
        for n in range(tokens * block // sums.shape[0], tokens * (block + 1) // sums.shape[0]):
            a, b = y[n * y_apart : n * y_apart + width], guess[n * guess_apart : n * guess_apart + width]
            e = residual[n]
            for j in range(width):
                left = a[j] - b[j]
                e[j] = left
                value = np.float64(left)
                away = value - first[j]
                column[j] += away
                squares += value * value
                spread += away * away
        sums[block, 0], sums[block, 1] = squares, spread
