"""Operands in bfloat16 for the matrix unit of a CPU, made in one pass each.

Library calls would make float32 tensors in between, and cost as much as the products. Here what is rounded is read as
it is, and what a product gives in bfloat16 is read as bfloat16. Rounding is to nearest, ties to even, as `Tensor.to`.

Left out: products of our own from the unit's instructions, with operands laid out in its blocks and these passes
inside. They took 0.85 to 1.05 of the time at 1,024 tokens and 0.95 to 1.1 at 4,096.
"""

import numpy as np
import torch
from torch import Tensor

from thresher.cache.kernels.cpu_pool import over_rows
from thresher.cache.kernels.jit import compiled
from thresher.cache.kernels.lines import inlined
from thresher.cache.kernels.sums import bits_of, wide

_BLOCKS = 32


def patterns(low: Tensor) -> np.ndarray:
    """The bit patterns (uint16) of a bfloat16 tensor, of its shape."""
    return low.view(torch.int16).numpy().view(np.uint16)


def spread(values: Tensor, columns: Tensor, offsets: Tensor, width: int) -> Tensor:
    """[N, width] of float32 codes [A], all finite, at columns [A]; row n's begin at offsets[n] [N + 1]. Else zero."""
    block = torch.empty(offsets.shape[0] - 1, width, dtype=torch.bfloat16)
    entries = (values.numpy(), columns.numpy(), offsets.numpy())
    low = patterns(block)

    def piece(first: int, stop: int) -> None:
        _spread(low, *entries, first, stop)

    over_rows(low.shape[0], piece, 4 * values.shape[0])
    return block


def gather(table_FE: Tensor, rows: Tensor) -> Tensor:
    """[n, E] of some rows of a float32 matrix, all finite."""
    out = torch.empty(rows.shape[0], table_FE.shape[1], dtype=torch.bfloat16)
    table, index, low = table_FE.numpy(), rows.numpy(), patterns(out)

    def piece(first: int, stop: int) -> None:
        _gather(table, index, low, first, stop)

    over_rows(rows.shape[0], piece, out.numel())
    return out


def less(x_ND: Tensor, shift_D: Tensor) -> Tensor:
    """[N, D]: x − shift of float32, all finite."""
    out = torch.empty(x_ND.shape, dtype=torch.bfloat16)
    x, shift, low = x_ND.numpy(), shift_D.numpy(), patterns(out)

    def piece(first: int, stop: int) -> None:
        _less(x, shift, low, first, stop)

    over_rows(low.shape[0], piece, out.numel())
    return out


def difference(low_NE: Tensor, exact_NE: Tensor) -> tuple[Tensor, Tensor]:
    """low − exact, all finite, as [N, E] bfloat16, written over `low_NE`, and its Σ‖·‖² before rounding, a scalar."""
    squares = torch.empty(low_NE.shape[0], dtype=torch.float64)
    low, exact, sums = patterns(low_NE), exact_NE.contiguous().numpy(), squares.numpy()

    def piece(first: int, stop: int) -> None:
        _difference(low, exact, sums, first, stop)

    over_rows(low_NE.shape[0], piece, low_NE.numel())
    return low_NE, squares.sum().to(exact_NE.dtype)


def keep(gradient_Nn: Tensor, z_Nn: Tensor) -> Tensor:
    """Zero where there is no code, in place, both bfloat16; then [n] float32: the sums of the columns."""
    gradient, z = patterns(gradient_Nn), patterns(z_Nn)
    sums = np.zeros((min(_BLOCKS, z.shape[0]), z.shape[1]), np.float32)  # of blocks of rows, whatever the threads

    def piece(first: int, stop: int) -> None:
        _keep(gradient, z, sums, first, stop)

    over_rows(sums.shape[0], piece, z.size // 8)
    return torch.from_numpy(sums.sum(0))


@inlined()
def rounded(value):  # type: ignore[no-untyped-def]
    """The bit pattern of the bfloat16 nearest to a finite float32."""
    bits = bits_of(value)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + half) >> np.uint32(16))


@compiled()
def _spread(block, values, columns, offsets, first, stop):  # type: ignore[no-untyped-def]
    for n in range(first, stop):
        block[n] = 0
        for entry in range(offsets[n], offsets[n + 1]):
            block[n, columns[entry]] = rounded(values[entry])


@compiled()
def _gather(table, rows, out, first, stop):  # type: ignore[no-untyped-def]
    for i in range(first, stop):
        row, low = table[rows[i]], out[i]
        for j in range(row.shape[0]):
            low[j] = rounded(row[j])


@compiled()
def _less(x, shift, out, first, stop):  # type: ignore[no-untyped-def]
    for n in range(first, stop):
        row, low = x[n], out[n]
        for j in range(row.shape[0]):
            low[j] = rounded(row[j] - shift[j])


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _difference(low, exact, squares, first, stop):  # type: ignore[no-untyped-def]
    for n in range(first, stop):
        a, b, total = low[n], exact[n], 0.0
        for j in range(a.shape[0]):
            difference = wide(a[j]) - b[j]
            total += np.float64(difference) * np.float64(difference)
            a[j] = rounded(difference)
        squares[n] = total


@compiled()
def _keep(gradient, z, sums, first, stop):  # type: ignore[no-untyped-def]
    tokens = z.shape[0]
    for block in range(first, stop):
        total = sums[block]
        for n in range(tokens * block // sums.shape[0], tokens * (block + 1) // sums.shape[0]):
            low, code = gradient[n], z[n]
            for i in range(code.shape[0]):
                kept = low[i] if code[i] != 0 else np.uint16(0)
                low[i] = kept
                total[i] += wide(kept)
