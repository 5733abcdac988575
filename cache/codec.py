"""How activations become bytes and come back: `int8z` (default) and `bf16`.

int8z standardises every dimension by μ and σ of a calibration sample, then stores a row as 8-bit integers under one
16-bit scale of its own. Outlier dimensions cannot erase the others (they are divided by their own σ) and massive rows
cannot either (they have their own scale). Half the bytes of bf16, at an expected share of unexplained variance of
E[m²] / 193548 with m the largest |z| of a row: 5e-5 at m = 3.1.

`encode_plain` and `decode_plain` are the specification, written for clarity and for any float dtype. Encoding
multiplies by reciprocals that were rounded to float32 once: as exact as dividing (the error is far below half a step)
and a fraction of its cost. Two paths give the same bits as `encode_plain` in float32 and gather the sums that `stats`
needs on the way: `encode_int8z` here, for blocks on an accelerator, and kernels/encode.py, for rows on a CPU.

Left out: 8-bit floats (they spend bits on a range that standardised data does not have, for ten times the error) and
scales per row alone (outlier dimensions then swallow the rest).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEVELS = 127
MIN_SCALE = 2.0**-14
"""Smallest normal float16: a row of zeros still divides."""
PER_LEVEL = float(np.float32(1 / LEVELS))
_DECODE_ELEMENTS = 1 << 17


class Calibration(NamedTuple):
    """Standardisation of one site, fixed once per cache."""

    mean: Tensor
    """[d] float32, μ."""
    std: Tensor
    """[d] float32, σ > 0."""

    @property
    def inverse(self) -> Tensor:
        """[d] float32, 1/σ: computed on the CPU, so that every device multiplies by the same."""
        return self.std.cpu().reciprocal().to(self.std.device)

    def to(self, device: torch.device) -> "Calibration":
        return Calibration(self.mean.to(device), self.std.to(device))

    def as_array(self) -> np.ndarray:
        """[2, d] float32."""
        return torch.stack([self.mean, self.std]).cpu().numpy()


class Encoded(NamedTuple):
    """A block of rows in stored form, with what the encoder saw on the way."""

    codes: Tensor
    """[N, D] int8 (int8z) or bfloat16 (bf16)."""
    scale: Tensor | None
    """[N] float16, int8z only."""
    norm: Tensor
    """[N] ‖x‖ of each row, float32: not finite as soon as one element is not."""
    sums: Tensor
    """[3, D] float64: Σx, Σx² and Σe² of each dimension, e being the error of the standardised value (int8z) or of x
    itself (bf16)."""
    peak: Tensor
    """[] float32: largest standardised value, 0 for bf16."""


def calibrate(mean: np.ndarray, variance: np.ndarray) -> Calibration:
    """μ and σ from float64 moments; a dimension that hardly moves gets a thousandth of the median deviation."""
    std = np.sqrt(variance)
    std = np.maximum(std, 1e-3 * np.median(std))
    std[std < np.finfo(np.float32).tiny] = 1.0  # a site that never moves at all
    return Calibration(torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(std.astype(np.float32)))


def encode_plain(x_ND: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """(codes int8 [N, D], scale float16 [N]) of rows, in the dtype of `x_ND`: the specification of int8z."""
    v_ND = (x_ND - calibration.mean.to(x_ND)) * calibration.inverse.to(x_ND)
    scale_N = (v_ND.abs().amax(dim=1) * PER_LEVEL).clamp_min(MIN_SCALE).to(torch.float16)
    per_scale_N1 = scale_N[:, None].to(torch.float32).reciprocal().to(x_ND)
    codes_ND = torch.round(v_ND * per_scale_N1).clamp(-LEVELS, LEVELS)
    return codes_ND.to(torch.int8), scale_N


def decode_plain(codes_ND: Tensor, scale_N: Tensor, calibration: Calibration, dtype: torch.dtype) -> Tensor:
    """x̂ = μ + σ · (s · q), [N, D] in `dtype`: the specification of decoding."""
    v_ND = scale_N[:, None].to(dtype) * codes_ND.to(dtype)
    return calibration.mean.to(dtype) + calibration.std.to(dtype) * v_ND


def encode_int8z(x_ND: Tensor, calibration: Calibration, inverse_D: Tensor) -> Encoded:
    """Encode float32 rows, overwriting `x_ND`; `inverse_D` is `calibration.inverse`.

    The clip of the specification is left out: s ≥ max|v| / 127 · (1 − 2⁻¹¹), so |v / s| < 127.07 rounds to at most 127.
    """
    norm_N, sums_2D = _measured(x_ND)
    v_ND = x_ND.sub_(calibration.mean).mul_(inverse_D)
    work_ND = torch.abs(v_ND)
    top_N = work_ND.amax(dim=1)
    scale_N = (top_N * PER_LEVEL).clamp_min_(MIN_SCALE).to(torch.float16)
    s_N1 = scale_N[:, None].to(torch.float32)
    torch.round(torch.mul(v_ND, s_N1.reciprocal(), out=work_ND), out=work_ND)
    codes_ND = work_ND.to(torch.int8)
    error_ND = v_ND.sub_(work_ND.mul_(s_N1))
    return Encoded(codes_ND, scale_N, norm_N, torch.cat([sums_2D, _squared(error_ND)[None]]), top_N.amax())


def encode_bf16(x_ND: Tensor) -> Encoded:
    """Round float32 rows to bfloat16 (nearest even), overwriting `x_ND`."""
    codes_ND = x_ND.to(torch.bfloat16)
    norm_N, sums_2D = _measured(x_ND)
    error_D = _squared(x_ND.sub_(codes_ND))
    return Encoded(codes_ND, None, norm_N, torch.cat([sums_2D, error_D[None]]), norm_N.new_zeros(()))


def _measured(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(‖x‖ [N] float32; Σx and Σx² of each dimension [2, D] float64) of float32 rows."""
    sum_D = x_ND.sum(dim=0, dtype=torch.float64)
    return torch.linalg.vector_norm(x_ND, dim=1), torch.stack([sum_D, _squared(x_ND)])


def _squared(x_ND: Tensor) -> Tensor:
    """Σx² of each dimension [D], added up in float64; nothing of the size of the block is made in float64."""
    return torch.linalg.vector_norm(x_ND, dim=0, dtype=torch.float64).square_()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch's CPU operators in this thread.

    An operator on a block takes 20 µs. Shared between threads it gains little, and when another process holds a core
    every operator waits for the partner that was put to sleep: 20 to 100 times slower on two busy cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def decode(codes_ND: Tensor, scale_N: Tensor | None, calibration: Calibration | None, dtype: torch.dtype) -> Tensor:
    """Rows [N, D] in `dtype` on the device of the codes; int8z decodes in float32 and then casts."""
    if scale_N is None or calibration is None:
        return codes_ND.to(dtype)
    x_ND, s_N1 = torch.empty_like(codes_ND, dtype=torch.float32), scale_N[:, None].to(torch.float32)
    on_cpu = x_ND.device.type == "cpu"
    rows = max(64, _DECODE_ELEMENTS // x_ND.shape[1]) if on_cpu else len(x_ND)
    with one_thread() if on_cpu else nullcontext():
        for at in range(0, len(x_ND), rows or 1):  # in pieces that stay in a CPU's cache between the passes
            piece = x_ND[at : at + rows]
            piece.copy_(codes_ND[at : at + rows]).mul_(s_N1[at : at + rows])
            piece.mul_(calibration.std).add_(calibration.mean)  # addcmul rounds once less, and not the same everywhere
    return x_ND.to(dtype)
