"""Stored rows to the rows of a batch on a CPU: decoded, or as they are, one after another.

A batch takes a few rows of each of many chunks. Gathering them in stored form and decoding afterwards writes the batch
twice and reads it twice; here each row is read once, where it lies in its chunk, and written once, and one call does it
for all chunks of a group. The specification is `plain_rows`; the bits are the same.

All kernels give `out` [N, D] row row_N[i] of chunk chunk_N[i] as row i. Chunks [C, D] are given by the addresses of
their first bytes, which the caller keeps alive; one from which no row is taken may be 0. Rows lie at random places, so
each is asked for some rows ahead. `whole_lines` says of `out` what the function of that name in `lines` does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from thresher.cache.codec import Calibration, decode_plain
from thresher.cache.kernels.jit import compiled
from thresher.cache.kernels.lines import fetch, inlined, put

AHEAD = 8
"""Rows between asking for one and reading it."""

_intrinsic: Any = intrinsic  # the type checker does not know that the first argument is not given in calls


def plain_rows(
    chunks: Sequence[np.ndarray],
    chunk_N: np.ndarray,
    row_N: np.ndarray,
    scale_N: np.ndarray | None,
    calibration: Calibration | None,
    out_ND: np.ndarray,
) -> None:
    """Rows in float32, one by one: what `int8_rows` and `bf16_rows` have to do."""
    for i, (chunk, row) in enumerate(zip(chunk_N, row_N, strict=True)):
        stored_D = chunks[chunk][row]
        if calibration is None or scale_N is None:
            out_ND[i] = (stored_D.astype(np.uint32) << 16).view(np.float32)
        else:
            codes, scale = torch.from_numpy(stored_D[None]), torch.from_numpy(scale_N[[i]])
            out_ND[i] = decode_plain(codes, scale, calibration, torch.float32)[0].numpy()


@_intrinsic
def _pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """An address as a pointer."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.uint64), generate


@inlined()
def _stored(addresses, chunk_N, row_N, i, width, dtype, row_bytes):  # type: ignore[no-untyped-def]
    """Row i [width] where it lies; asks for the one that comes AHEAD rows later."""
    later = min(i + AHEAD, chunk_N.shape[0] - 1)
    fetch(addresses[chunk_N[later]] + np.uint64(row_N[later]) * np.uint64(row_bytes), row_bytes)
    here = addresses[chunk_N[i]] + np.uint64(row_N[i]) * np.uint64(row_bytes)
    return carray(_pointer(here), (width,), dtype)


@compiled()
def int8_rows(addresses, chunk_N, row_N, scale_N, mean_D, std_D, out_ND, whole_lines):  # type: ignore[no-untyped-def]
    """μ + σ · (s · q) of int8 rows in float32; scales are float32 here."""
    width = out_ND.shape[1]
    row_D = np.empty(width, np.float32)
    for i in range(chunk_N.shape[0]):
        codes_D, scale = _stored(addresses, chunk_N, row_N, i, width, np.int8, width), scale_N[i]
        for d in range(width):
            row_D[d] = mean_D[d] + std_D[d] * (scale * np.float32(codes_D[d]))
        put(out_ND, i, row_D, whole_lines)


@compiled()
def bf16_rows(addresses, chunk_N, row_N, out_ND, whole_lines):  # type: ignore[no-untyped-def]
    """Bit patterns of bfloat16 to those of float32 (`out_ND` is uint32)."""
    width = out_ND.shape[1]
    row_D = np.empty(width, np.uint32)
    for i in range(chunk_N.shape[0]):
        codes_D = _stored(addresses, chunk_N, row_N, i, width, np.uint16, 2 * width)
        for d in range(width):
            row_D[d] = np.uint32(codes_D[d]) << np.uint32(16)
        put(out_ND, i, row_D, whole_lines)


@compiled()
def copy_rows(addresses, chunk_N, row_N, out_ND, whole_lines):  # type: ignore[no-untyped-def]
    """Rows as they are stored."""
    width, row_bytes = out_ND.shape[1], out_ND.shape[1] * out_ND.itemsize
    for i in range(chunk_N.shape[0]):
        put(out_ND, i, _stored(addresses, chunk_N, row_N, i, width, out_ND.dtype, row_bytes), whole_lines)
