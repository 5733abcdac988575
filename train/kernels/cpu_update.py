"""Updates on a CPU, one touch per row: projection, clipping, the step and the new norm while the row is in the cache.

Library calls pass over the weight and its gradient again for each of those. Adam (AdamW with a decay) and schedule-free
signum (train/updates/). Rows whose gradient is 0 move too, since moments and averages do.
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
    keep_w: Any
    """1 − learning rate · weight decay; 1 in Adam without decay, and then exact."""


@compiled(fastmath={"contract", "nsz"})
def update(first, stop, width, weight, grad, m, v, along, scale, adam, unit):  # type: ignore[no-untyped-def]
    """Rows first to stop: g ← scale · (grad + along · w), Adam, and with `unit` norm 1; `along` may be empty."""
    keep_m, keep_v, rate, spread, eps, keep_w = adam
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
                w[j] = keep_w * w[j] - rate * mean[j] / (np.sqrt(square[j]) * spread + eps)
        else:
            for j in range(width):
                x = scale * g[j]
                mean[j] += add_m * (x - mean[j])
                square[j] = keep_v * square[j] + add_v * x * x
                w[j] = keep_w * w[j] - rate * mean[j] / (np.sqrt(square[j]) * spread + eps)
        if unit:
            total = 0.0
            for j in range(width):
                total += np.float64(w[j]) * np.float64(w[j])
            shrink = weight.dtype.type(1 / np.sqrt(total))
            for j in range(width):
                w[j] *= shrink


class Signum(NamedTuple):
    """The numbers of one step of schedule-free signum."""

    rate: Any
    """η."""
    share: Any
    """c = 1 / t."""
    momentum: Any
    """μ."""


@compiled(fastmath={"contract", "nsz"})
def signum(first, stop, width, weight, grad, u, mean, along, numbers, unit):  # type: ignore[no-untyped-def]
    """Rows first to stop: g ← grad + along · w; u −= η sign(g); x̄ += c (u − x̄); w = (1 − μ) u + μ x̄.

    `unit` sets the norms of u, x̄ and w to 1, in this order; `along` may be empty. The scale of g does not matter.
    """
    rate, share, momentum = numbers
    kind = weight.dtype.type
    rest = kind(1) - momentum
    for row in range(first, stop):
        part = slice(row * width, (row + 1) * width)
        w, g, fast, slow = weight[part], grad[part], u[part], mean[part]
        multiple = along[row] if along.shape[0] else kind(0)
        fasts = slows = 0.0
        for j in range(width):
            x = g[j] + multiple * w[j]
            if x > 0:
                fast[j] -= rate
            elif x < 0:
                fast[j] += rate
            slow[j] += share * (fast[j] - slow[j])
            fasts += np.float64(fast[j]) * np.float64(fast[j])
            slows += np.float64(slow[j]) * np.float64(slow[j])
        if unit:
            shrink, shrink_mean = kind(1 / np.sqrt(fasts)), kind(1 / np.sqrt(slows))
            for j in range(width):
                fast[j] *= shrink
                slow[j] *= shrink_mean
        total = 0.0
        for j in range(width):
            w[j] = rest * fast[j] + momentum * slow[j]
            total += np.float64(w[j]) * np.float64(w[j])
        if unit:
            shrink = kind(1 / np.sqrt(total))
            for j in range(width):
                w[j] *= shrink
