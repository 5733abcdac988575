"""Weight gradients: each latent's weighted sum of its tokens' rows, and on the way the gradient of the codes.

One program owns a latent and a block of columns, walks the latent's entries in the order of their tokens, and so reads
a gathered row once for both dW[f] = Σ z · g[token] and dz = g[token] · W[f]. Products over a whole row are left as one
number per block of columns and added up in the order of the blocks.

Most latents have about N·k/F tokens, some have thousands. A list longer than `CHUNK` is left out of the first launch;
pieces of it are summed by programs of their own and the pieces then added up in order. How many such lists there can be
follows from the number of entries, so nothing is read back.

Specifications: `plain_add_decoded` and `plain_gathered_linear` in kernels/sparse.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.train.kernels.gradients import Facts, Rows
from thresher.train.kernels.sparse import ByLatent, Selection
from thresher.train.kernels.triton.launch import ENTRIES, accumulator, columns, on

CHUNK = 256
"""Entries of one latent that one program sums."""


class _Long(NamedTuple):
    """The latents with more than CHUNK entries, cut into pieces."""

    latents: Tensor
    """[H] int64 ascending; F where there are fewer than H."""
    ends: Tensor
    """[H] int64: where each one's pieces end among all pieces."""
    pieces: int
    """Room for pieces."""


def decoder_gradient(
    z_A: Tensor,
    g_NM: Tensor,
    W_FM: Tensor,
    selection: Selection,
    dW_FM: Tensor | None,
    fresh: bool,
    facts: Facts | None = None,
    begun: Rows | None = None,
) -> Tensor:
    """dz [A] = g[token] · W[latent]; dW[f] = Σ z · g[token], added to what is there unless `fresh`; None: not wanted.

    `facts` (only when fresh) receives ‖dW[f]‖², dW[f] · W[f] and ‖W[f]‖². `begun` is for a CPU alone.
    """
    assert begun is None
    dots = _by_latent(z_A, g_NM, W_FM, selection, dW_FM, fresh, facts)
    assert dots is not None
    return dots


def encoder_gradient(
    da_A: Tensor,
    x_ND: Tensor,
    selection: Selection,
    dW_FD: Tensor | None,
    fresh: bool,
    facts: Facts | None = None,
    begun: Rows | None = None,
) -> Tensor:
    """[F] Σ da; dW[f] = Σ da · x[token] as above; of `facts` only ‖dW[f]‖². `begun` is for a CPU alone."""
    assert begun is None
    if dW_FD is not None:
        _by_latent(da_A, x_ND, None, selection, dW_FD, fresh, facts)
    return latent_sums(da_A, selection)


def latent_sums(values_A: Tensor, selection: Selection) -> Tensor:
    """[F]: the sum of each latent's values, in the order of their tokens."""
    turned = selection.by_latent
    out = values_A.new_empty(selection.width)
    with on(values_A):
        _sums[(selection.width,)](
            out, values_A.contiguous(), turned.order, turned.offsets, BLOCK=CHUNK, SUM=accumulator(values_A)
        )
    return out


def _by_latent(
    weights_A: Tensor,
    rows_NM: Tensor,
    table_FM: Tensor | None,
    selection: Selection,
    out_FM: Tensor | None,
    fresh: bool,
    facts: Facts | None,
) -> Tensor | None:
    assert rows_NM.stride(1) == 1
    assert facts is None or (fresh and out_FM is not None)
    turned = selection.by_latent
    latents, width = selection.width, rows_NM.shape[1]
    block = columns(width)
    blocks = triton.cdiv(width, block)
    dots = parts = None
    if table_FM is not None:
        dots = rows_NM.new_zeros(blocks, weights_A.shape[0])
    if facts is not None:
        parts = torch.zeros(3, blocks, latents, dtype=torch.float64, device=rows_NM.device)
    common = (weights_A.contiguous(), rows_NM, table_FM, dots, turned.order, turned.tokens, turned.offsets)
    sizes = (width, rows_NM.stride(0), 0 if table_FM is None else table_FM.stride(0), weights_A.shape[0])
    target = (out_FM, parts, 0 if out_FM is None else out_FM.stride(0), blocks, latents)
    wide = accumulator(rows_NM)
    flags = {"BLOCK": block, "SUM": wide, "OUT": out_FM is not None}
    finish = {"FRESH": fresh, "FACTS": facts is not None, "TABLE": table_FM is not None}
    with on(rows_NM):
        _short[latents, blocks](
            *common, *sizes, *target, DOTS=dots is not None, CHUNK=CHUNK, ROWS=ENTRIES, **flags, **finish
        )
        long = _long(turned, weights_A.shape[0], latents)
        if long is not None:
            partial = torch.empty(
                (long.pieces, width) if out_FM is not None else (1, 1),
                dtype=torch.float64 if wide == tl.float64 else torch.float32,
                device=rows_NM.device,
            )
            lists = (long.latents, long.ends, long.latents.shape[0])
            _pieces[long.pieces, blocks](
                *common, *sizes, partial, *lists, latents, DOTS=dots is not None, CHUNK=CHUNK, ROWS=ENTRIES, **flags
            )
            if out_FM is not None:
                _join[long.latents.shape[0], blocks](
                    partial, *lists, width, table_FM, sizes[2], *target, **finish, BLOCK=block, SUM=wide
                )
    if facts is not None and parts is not None:
        facts.squares.copy_(parts[0].sum(0))
        if table_FM is not None:
            facts.dots.copy_(parts[1].sum(0))
            facts.weights.copy_(parts[2].sum(0))
    return None if dots is None else dots.sum(0)


def _long(turned: ByLatent, entries: int, latents: int) -> _Long | None:
    """The long lists of a selection, found once for both weights; None when there cannot be any."""
    most = entries // (CHUNK + 1)
    if most == 0:
        return None
    if "long" not in turned.__dict__:
        counts = turned.offsets.diff()
        found = torch.nonzero_static(counts > CHUNK, size=min(most, latents), fill_value=latents).view(-1)
        counts = torch.cat([counts, counts.new_zeros(1)]).index_select(0, found)
        ends = torch.div(counts + CHUNK - 1, CHUNK, rounding_mode="floor").cumsum(0)
        turned.__dict__["long"] = _Long(found, ends, entries // CHUNK + found.shape[0])
    made: _Long = turned.__dict__["long"]
    return made


@triton.jit
def _sums(out, values, order, offsets, BLOCK: tl.constexpr, SUM: tl.constexpr):  # type: ignore[no-untyped-def]
    latent = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + latent)
    end = tl.load(offsets + latent + 1)
    total = tl.zeros([BLOCK], dtype=SUM)
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        entry = tl.load(order + place, mask=place < end, other=0)
        total += tl.load(values + entry, mask=place < end, other=0.0).to(SUM)
    tl.store(out + latent, tl.sum(total, axis=0).to(out.dtype.element_ty))


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    latent, start, end, column, inside, weights, rows, table, dots, order, tokens, rows_stride, table_stride, entries,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr, OUT: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """Σ weight · row over part of a latent's list, for a block of columns, and each row's product with W[latent]."""
    total = tl.zeros([BLOCK], dtype=SUM)
    w = tl.zeros([BLOCK], dtype=SUM)
    if DOTS:
        w += tl.load(table + latent * table_stride + column, mask=inside, other=0.0).to(SUM)
    for first in range(start, end, ROWS):
        place = first + tl.arange(0, ROWS)
        real = place < end
        entry = tl.load(order + place, mask=real, other=0).to(tl.int64)
        token = tl.load(tokens + place, mask=real, other=0).to(tl.int64)
        row = tl.load(
            rows + token[:, None] * rows_stride + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
        ).to(SUM)
        if OUT:
            weight = tl.load(weights + entry, mask=real, other=0.0).to(SUM)
            total += tl.sum(weight[:, None] * row, axis=0)
        if DOTS:
            at = dots + tl.program_id(1).to(tl.int64) * entries + entry
            tl.store(at, tl.sum(row * w[None, :], axis=1).to(dots.dtype.element_ty), mask=real)
    return total


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    latent, total, column, inside, table_stride, out, parts, table, out_stride, blocks, latents, FRESH: tl.constexpr,
    FACTS: tl.constexpr, TABLE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Write or add a block of dW[latent]; note the sums over it that clipping and projection ask for."""
    at = out + latent * out_stride + column
    if FRESH:
        tl.store(at, total.to(out.dtype.element_ty), mask=inside)
    else:
        before = tl.load(at, mask=inside, other=0.0).to(SUM)
        tl.store(at, (before + total).to(out.dtype.element_ty), mask=inside)
    if FACTS:
        g = total.to(tl.float64)
        note = parts + tl.program_id(1).to(tl.int64) * latents + latent
        tl.store(note, tl.sum(g * g, axis=0))
        if TABLE:
            w = tl.load(table + latent * table_stride + column, mask=inside, other=0.0).to(tl.float64)
            next_part = tl.zeros([], dtype=tl.int64) + blocks * latents
            tl.store(note + next_part, tl.sum(g * w, axis=0))
            tl.store(note + 2 * next_part, tl.sum(w * w, axis=0))


@triton.jit
def _short(  # type: ignore[no-untyped-def]
    weights, rows, table, dots, order, tokens, offsets, width, rows_stride, table_stride, entries, out, parts,
    out_stride, blocks, latents, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr,
    OUT: tl.constexpr, DOTS: tl.constexpr, FRESH: tl.constexpr, FACTS: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Latents with at most CHUNK entries, those without any included."""
    latent = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + latent)
    end = tl.load(offsets + latent + 1)
    if end - start <= CHUNK:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        total = _walk(
            latent, start, end, column, inside, weights, rows, table, dots, order, tokens, rows_stride, table_stride,
            entries, ROWS, BLOCK, SUM, OUT, DOTS,
        )  # fmt: skip
        if OUT:
            _finish(
                latent, total, column, inside, table_stride, out, parts, table, out_stride, blocks, latents,
                FRESH, FACTS, TABLE, SUM,
            )  # fmt: skip


@triton.jit
def _pieces(  # type: ignore[no-untyped-def]
    weights, rows, table, dots, order, tokens, offsets, width, rows_stride, table_stride, entries, partial, found,
    ends, n_found, latents, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr,
    OUT: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """One piece of a long list."""
    piece = tl.program_id(0).to(tl.int64)
    low = tl.zeros([], dtype=tl.int64)
    high = low + n_found
    while low < high:  # the list that the piece belongs to: the first whose pieces end after it
        middle = (low + high) // 2
        if tl.load(ends + middle) <= piece:
            low = middle + 1
        else:
            high = middle
    if low < n_found:
        latent = tl.load(found + low)
        first = tl.load(ends + low - 1, mask=low > 0, other=0)
        start = tl.load(offsets + latent) + (piece - first) * CHUNK
        end = tl.minimum(start + CHUNK, tl.load(offsets + latent + 1))
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        total = _walk(
            latent, start, end, column, inside, weights, rows, table, dots, order, tokens, rows_stride, table_stride,
            entries, ROWS, BLOCK, SUM, OUT, DOTS,
        )  # fmt: skip
        if OUT:
            tl.store(partial + piece * width + column, total, mask=inside)


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    partial, found, ends, n_found, width, table, table_stride, out, parts, out_stride, blocks, latents,
    FRESH: tl.constexpr, FACTS: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The pieces of one long list, added up in order."""
    index = tl.program_id(0).to(tl.int64)
    latent = tl.load(found + index)
    if latent < latents:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        total = tl.zeros([BLOCK], dtype=SUM)
        for piece in range(tl.load(ends + index - 1, mask=index > 0, other=0), tl.load(ends + index)):
            total += tl.load(partial + piece * width + column, mask=inside, other=0.0)
        _finish(
            latent, total, column, inside, table_stride, out, parts, table, out_stride, blocks, latents,
            FRESH, FACTS, TABLE, SUM,
        )  # fmt: skip
