"""Stored rows to the rows of a batch on a CPU: decoded, or as they are, straight to their places.

A batch takes a few rows of each of many chunks. Gathering them in stored form and decoding afterwards writes the batch
twice and reads it twice; here each row is read once, where it lies in its chunk, and written once, and one call does it
for all chunks of a group. The specification is `plain_rows`; the bits are the same.

All kernels go over positions u = first, first + step, … below stop of a group of r chunks: u has row
within[u % r, u // r] of chunk u % r, and the i-th of them goes to row places[i] of `out` [B, D], or nowhere if that is
-1. Chunks [C, D] are given by the addresses of their first bytes, which the caller keeps alive; one from which no row
is taken may be 0. `whole_lines` says of `out` what the function of that name in `lines` does.
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
from thresher.cache.kernels.lines import put

_intrinsic: Any = intrinsic  # the type checker does not know that the first argument is not given in calls


def plain_rows(
    chunks: Sequence[np.ndarray],
    scale_RC: np.ndarray | None,
    within_RC: np.ndarray,
    first: int,
    stop: int,
    step: int,
    places: np.ndarray,
    calibration: Calibration | None,
    out: np.ndarray,
) -> None:
    """Rows in float32, one by one: what `int8_rows` and `bf16_rows` have to do."""
    for place, u in zip(places, range(first, stop, step), strict=True):
        turn, chunk = divmod(u, len(chunks))
        row = within_RC[chunk, turn]
        if place >= 0 and (calibration is None or scale_RC is None):
            out[place] = (chunks[chunk][row].astype(np.uint32) << 16).view(np.float32)
        elif place >= 0 and calibration is not None and scale_RC is not None:
            codes, scale = torch.from_numpy(chunks[chunk][[row]]), torch.from_numpy(scale_RC[chunk, [row]])
            out[place] = decode_plain(codes, scale, calibration, torch.float32)[0].numpy()


@_intrinsic
def _pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """An address as a pointer."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.uint64), generate


@compiled()
def int8_rows(
    addresses: np.ndarray,
    scale_RC: np.ndarray,
    within_RC: np.ndarray,
    first: int,
    stop: int,
    step: int,
    places: np.ndarray,
    mean_D: np.ndarray,
    std_D: np.ndarray,
    out_BD: np.ndarray,
    whole_lines: bool,
) -> None:
    """μ + σ · (s · q) of int8 rows in float32; scales are float32 here."""
    r, shape = addresses.shape[0], (within_RC.shape[1], out_BD.shape[1])
    row_D = np.empty(shape[1], np.float32)
    for i, u in enumerate(range(first, stop, step)):
        place, turn, j = places[i], u // r, u % r
        if place >= 0:
            row = within_RC[j, turn]
            codes_D, scale = carray(_pointer(addresses[j]), shape, np.int8)[row], scale_RC[j, row]
            for d in range(shape[1]):
                row_D[d] = mean_D[d] + std_D[d] * (scale * np.float32(codes_D[d]))
            put(out_BD, place, row_D, whole_lines)


@compiled()
def bf16_rows(
    addresses: np.ndarray,
    within_RC: np.ndarray,
    first: int,
    stop: int,
    step: int,
    places: np.ndarray,
    out_BD: np.ndarray,
    whole_lines: bool,
) -> None:
    """Bit patterns of bfloat16 to those of float32 (`out_BD` is uint32)."""
    r, shape = addresses.shape[0], (within_RC.shape[1], out_BD.shape[1])
    row_D = np.empty(shape[1], np.uint32)
    for i, u in enumerate(range(first, stop, step)):
        place, turn, j = places[i], u // r, u % r
        if place >= 0:
            codes_D = carray(_pointer(addresses[j]), shape, np.uint16)[within_RC[j, turn]]
            for d in range(shape[1]):
                row_D[d] = np.uint32(codes_D[d]) << np.uint32(16)
            put(out_BD, place, row_D, whole_lines)


@compiled()
def copy_rows(
    addresses: np.ndarray,
    within_RC: np.ndarray,
    first: int,
    stop: int,
    step: int,
    places: np.ndarray,
    out_BD: np.ndarray,
    whole_lines: bool,
) -> None:
    """Rows as they are stored."""
    r, shape = addresses.shape[0], (within_RC.shape[1], out_BD.shape[1])
    for i, u in enumerate(range(first, stop, step)):
        place, turn, j = places[i], u // r, u % r
        if place >= 0:
            codes_CD = carray(_pointer(addresses[j]), shape, out_BD.dtype)
            put(out_BD, place, codes_CD[within_RC[j, turn]], whole_lines)
