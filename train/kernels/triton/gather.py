"""Decoding: each token's weighted sum of decoder rows.

One program owns a token and a block of columns. It walks the token's entries a few rows at a time; what it gathers is
used at once and never stored. Specification: `plain_add_decoded` in kernels/sparse.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from thresher.train.kernels.sparse import Selection
from thresher.train.kernels.triton.launch import ENTRIES, accumulator, columns, on


def decode(out_NM: Tensor, z_A: Tensor, W_FM: Tensor, selection: Selection) -> None:
    """out[n] += Σ z · W[latent] over token n's entries."""
    assert out_NM.stride(1) == W_FM.stride(1) == 1
    tokens, width = out_NM.shape
    if z_A.shape[0] == 0 or tokens == 0:
        return
    block = columns(width)
    with on(out_NM):
        _decode[tokens, triton.cdiv(width, block)](
            out_NM,
            z_A.contiguous(),
            W_FM,
            selection.latents,
            selection.offsets,
            width,
            out_NM.stride(0),
            W_FM.stride(0),
            BLOCK=block,
            ROWS=ENTRIES,
            SUM=accumulator(out_NM),
        )


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    out, z, W, latents, offsets, width, out_stride, W_stride, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    start = tl.load(offsets + token)
    end = tl.load(offsets + token + 1)
    total = tl.zeros([BLOCK], dtype=SUM)
    for first in range(start, end, ROWS):
        entry = first + tl.arange(0, ROWS)
        real = entry < end
        weight = tl.load(z + entry, mask=real, other=0.0).to(SUM)
        latent = tl.load(latents + entry, mask=real, other=0).to(tl.int64)
        rows = tl.load(
            W + latent[:, None] * W_stride + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(weight[:, None] * rows.to(SUM), axis=0)
    at = out + token * out_stride + column
    before = tl.load(at, mask=inside, other=0.0)
    tl.store(at, (before.to(SUM) + total).to(before.dtype), mask=inside)
