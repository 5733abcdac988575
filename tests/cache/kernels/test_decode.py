"""The fused loops against their plain reference, bit by bit."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from thresher.cache.codec import Calibration, decode
from thresher.cache.kernels.decode import AHEAD, bf16_rows, copy_rows, int8_rows, plain_rows
from thresher.cache.kernels.lines import whole_lines

R, C = 5, 16
COUNTS = [0, 1, AHEAD, 61]


class Case(NamedTuple):
    """Which rows are taken."""

    chunks: np.ndarray
    rows: np.ndarray


def case(rng: np.random.Generator, count: int) -> Case:
    """Any rows but those of the last chunk, which this rank does not have."""
    return Case(*(rng.integers(0, size, count).astype(np.int32) for size in (R - 1, C)))


def addresses(chunks: list[np.ndarray]) -> np.ndarray:
    return np.array([*(chunk.ctypes.data for chunk in chunks[:-1]), 0], np.uint64)


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Memory that begins at a cache line, as PyTorch's does."""
    return torch.empty(shape).numpy()


@pytest.mark.parametrize("width", [1, 7, 768])
@pytest.mark.parametrize("count", COUNTS)
def test_decoding_on_the_way_is_gathering_and_then_decoding(width: int, count: int) -> None:
    rng = np.random.default_rng(width)
    chunks = [rng.integers(-127, 128, (C, width)).astype(np.int8) for _ in range(R)]
    scale = (rng.random(count) * 3 + 1e-4).astype(np.float16)
    mean, std = rng.normal(size=(2, width)).astype(np.float32)
    calibration = Calibration(torch.from_numpy(mean), torch.from_numpy(np.abs(std) + 1e-3))
    where = case(rng, count)
    got, want = (aligned((count + 1, width)) for _ in range(2))
    got[:] = want[:] = np.nan
    assert whole_lines(got) == (width == 768), "both ways of writing are tried"
    scale_N, std_D = scale.astype(np.float32), calibration.std.numpy()
    int8_rows(addresses(chunks), *where, scale_N, mean, std_D, got[:count], whole_lines(got))
    plain_rows(chunks, *where, scale, calibration, want[:count])
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32)), "and what lies behind stays as it was"


@pytest.mark.parametrize("count", COUNTS)
def test_bfloat16_and_stored_rows_are_those_that_were_asked_for(count: int) -> None:
    rng = np.random.default_rng(1)
    chunks = [rng.integers(0, 1 << 16, (C, 32)).astype(np.uint16) for _ in range(R)]
    for chunk in chunks:
        chunk.flags.writeable = False
    where = case(rng, count)
    got, want = (aligned((count, 32)) for _ in range(2))
    bf16_rows(addresses(chunks), *where, got.view(np.uint32), whole_lines(got))
    plain_rows(chunks, *where, None, None, want)
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
    copied = np.zeros((count, 32), np.uint16)
    copy_rows(addresses(chunks), *where, copied, False)
    assert np.array_equal(copied.astype(np.uint32) << 16, want.view(np.uint32))
    small, copied_small = [chunk.astype(np.int8) for chunk in chunks], np.zeros((count, 32), np.int8)
    copy_rows(addresses(small), *where, copied_small, False)
    assert np.array_equal(copied_small, copied.astype(np.int8))


def test_the_reference_is_the_codec() -> None:
    """Every way of decoding gives the same bits: kernel, torch in blocks, and the specification."""
    rng = np.random.default_rng(2)
    codes = rng.integers(-127, 128, (C, 40)).astype(np.int8)
    scale = rng.random(C).astype(np.float16)
    calibration = Calibration(torch.randn(40), torch.rand(40) + 0.1)
    where = Case(np.zeros(C, np.int32), np.arange(C, dtype=np.int32))
    got = np.empty((C, 40), np.float32)
    mean, std = calibration.mean.numpy(), calibration.std.numpy()
    int8_rows(addresses([codes, codes]), *where, scale.astype(np.float32), mean, std, got, False)
    back = decode(torch.from_numpy(codes), torch.from_numpy(scale), calibration, torch.float32)
    assert torch.equal(torch.from_numpy(got), back)
    patterns = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 64)
    every = Case(np.zeros(1024, np.int32), np.arange(1024, dtype=np.int32))
    wide = np.empty((1024, 64), np.float32)
    bf16_rows(addresses([patterns, patterns]), *every, wide.view(np.uint32), False)
    assert torch.equal(
        torch.from_numpy(wide).nan_to_num(),
        torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16).float().nan_to_num(),
    )
