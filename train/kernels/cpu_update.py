"""Adam on a CPU, one touch per row: projection, clipping, the step and the new norm while the row is in the cache.

Library calls pass over the weight and its gradient again for each of those. Rows whose gradient is 0 move too, since
Adam's moments decay.
"""

from typing import Any, NamedTuple

import numpy as np

from thresher.cache.kernels.jit import compiled
from thresher.cache.kernels.sums import wide


@compiled(fastmath={"contract", "reassoc", "nsz"})
def facts(first, stop, width, weight, grad, squares, dots, weights):  # type: ignore[no-untyped-def]
    """Of rows first to stop: ‖g‖², g · w and ‖w‖², in float64."""
    for row in range(first, stop):
        g, w = grad[row * width : (row + 1) * width], weight[row * width : (row + 1) * width]
        gg = gw = ww = 0.0
        for j in range(width):
            a, b = np.float64(g[j]), np.float64(w[j])
            gg += a * a
            gw += a * b
            ww += b * b
        squares[row], dots[row], weights[row] = gg, gw, ww


@compiled(fastmath={"contract", "reassoc", "nsz"})
def add_rows(first, stop, width, rows, values, factor, weight, grad, squares, dots):  # type: ignore[no-untyped-def]
    """Add factor · values first to stop to rows of the gradient, with ‖g‖² and g · w of what they become.

    Values are numbers, or bit patterns of bfloat16 (uint16). Without room for the two they are not told.
    """
    told = squares.shape[0] > 0
    for i in range(first, stop):
        row = rows[i]
        g, w = grad[row * width : (row + 1) * width], weight[row * width : (row + 1) * width]
        v = values[i * width : (i + 1) * width]
        for j in range(width):
            g[j] += factor * wide(v[j])
        if told:
            gg = gw = 0.0
            for j in range(width):
                a = np.float64(g[j])
                gg += a * a
                gw += a * np.float64(w[j])
            squares[row], dots[row] = gg, gw


class Adam(NamedTuple):
    """The numbers of one step, as the update uses them."""

    keep_m: Any
    """β₁."""
    keep_v: Any
    """β₂."""
    rate: Any
    """Learning rate / (1 − β₁ᵗ)."""
    spread: Any
    """1 / √(1 − β₂ᵗ)."""
    eps: Any
    """ε."""


@compiled(fastmath={"contract", "nsz"})
def update(first, stop, width, weight, grad, m, v, along, scale, adam, unit):  # type: ignore[no-untyped-def]
    """Rows first to stop: g ← scale · (grad + along · w), Adam, and with `unit` norm 1; `along` may be empty."""
    keep_m, keep_v, rate, spread, eps = adam
    one = weight.dtype.type(1)
    add_m, add_v = one - keep_m, one - keep_v
    for row in range(first, stop):
        part = slice(row * width, (row + 1) * width)
        w, g, mean, square = weight[part], grad[part], m[part], v[part]
        if along.shape[0]:
            share = along[row]
            for j in range(width):
                x = scale * (g[j] + share * w[j])
                mean[j] += add_m * (x - mean[j])
                square[j] = keep_v * square[j] + add_v * x * x
                w[j] -= rate * mean[j] / (np.sqrt(square[j]) * spread + eps)
        else:
            for j in range(width):
                x = scale * g[j]
                mean[j] += add_m * (x - mean[j])
                square[j] = keep_v * square[j] + add_v * x * x
                w[j] -= rate * mean[j] / (np.sqrt(square[j]) * spread + eps)
        if unit:
            total = 0.0
            for j in range(width):
                total += np.float64(w[j]) * np.float64(w[j])
            shrink = weight.dtype.type(1 / np.sqrt(total))
            for j in range(width):
                w[j] *= shrink
