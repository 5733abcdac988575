"""Stored rows to the rows of a batch on a CPU: decoded, or as they are, straight to the places where the batch has them.

A batch takes a few rows of each of many chunks. Gathering them in stored form and decoding afterwards writes the batch
twice and reads it twice; here each row is read once, where it lies in the chunk, and written once. The specification is
`plain_rows`; the bits are the same.

All kernels take a chunk [C, W], the rows to take [K] int64, and for each its place in `out` [B, W] int64, or -1 to leave
it out.
"""

from typing import Any

import numpy as np
import torch
from numba import njit

from thresher.cache.codec import Calibration, decode_plain

_JIT: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


def plain_rows(
    chunk: np.ndarray,
    scale_C: np.ndarray | None,
    rows: np.ndarray,
    places: np.ndarray,
    calibration: Calibration | None,
    out: np.ndarray,
) -> None:
    """Decode rows of a chunk to their places in `out` [B, D] float32: what `int8_rows` and `bf16_rows` have to do."""
    taken = places >= 0
    codes_KD = chunk[rows[taken]]
    if calibration is None or scale_C is None:
        out[places[taken]] = (codes_KD.astype(np.uint32) << 16).view(np.float32)
    else:
        scale_K = torch.from_numpy(scale_C[rows[taken]])
        out[places[taken]] = decode_plain(torch.from_numpy(codes_KD), scale_K, calibration, torch.float32).numpy()


@njit(**_JIT)
def int8_rows(
    codes_CD: np.ndarray,
    scale_C: np.ndarray,
    rows: np.ndarray,
    places: np.ndarray,
    mean_D: np.ndarray,
    std_D: np.ndarray,
    out_BD: np.ndarray,
) -> None:
    """μ + σ · (s · q) of int8 rows in float32; `scale_C` is float32 here."""
    width = codes_CD.shape[1]
    for k in range(rows.shape[0]):
        place = places[k]
        if place >= 0:
            row, scale = rows[k], scale_C[rows[k]]
            for j in range(width):
                out_BD[place, j] = mean_D[j] + std_D[j] * (scale * np.float32(codes_CD[row, j]))


@njit(**_JIT)
def bf16_rows(codes_CD: np.ndarray, rows: np.ndarray, places: np.ndarray, out_BD: np.ndarray) -> None:
    """bfloat16 bit patterns (uint16) to those of float32 (`out_BD` uint32)."""
    width = codes_CD.shape[1]
    for k in range(rows.shape[0]):
        place = places[k]
        if place >= 0:
            row = rows[k]
            for j in range(width):
                out_BD[place, j] = np.uint32(codes_CD[row, j]) << np.uint32(16)


@njit(**_JIT)
def copy_rows(chunk_CW: np.ndarray, rows: np.ndarray, places: np.ndarray, out_BW: np.ndarray) -> None:
    """Rows as they are."""
    width = chunk_CW.shape[1]
    for k in range(rows.shape[0]):
        place = places[k]
        if place >= 0:
            row = rows[k]
            for j in range(width):
                out_BW[place, j] = chunk_CW[row, j]
