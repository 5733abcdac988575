"""The fused loops against their plain reference, bit by bit."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from thresher.cache.codec import Calibration, decode
from thresher.cache.kernels.decode import bf16_rows, copy_rows, int8_rows, plain_rows
from thresher.cache.kernels.lines import whole_lines

R, C, B = 5, 16, 100


class Case(NamedTuple):
    """Which rows go where."""

    within: np.ndarray
    first: int
    stop: int
    step: int
    places: np.ndarray


def case(rng: np.random.Generator, permuted: bool, first: int, stop: int, step: int) -> Case:
    """Distinct places, a third of the rows left out."""
    within = np.stack([rng.permutation(C) if permuted else np.arange(C) for _ in range(R)]).astype(np.int32)
    count = len(range(first, stop, step))
    places = np.where(rng.random(count) < 1 / 3, -1, rng.permutation(B)[:count])
    return Case(within, first, stop, step, places)


def addresses(chunks: list[np.ndarray]) -> np.ndarray:
    return np.array([chunk.ctypes.data for chunk in chunks], np.uint64)


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Memory that begins at a cache line, as PyTorch's does."""
    return torch.empty(shape).numpy()


SPANS = [(0, R * C, 1), (7, 61, 1), (3, 80, 2), (4, 79, 5), (9, 70, 16), (12, 13, 1)]


@pytest.mark.parametrize("width", [1, 7, 768])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("span", SPANS)
def test_decoding_on_the_way_is_gathering_and_then_decoding(
    width: int, permuted: bool, span: tuple[int, int, int]
) -> None:
    rng = np.random.default_rng(width)
    chunks = [rng.integers(-127, 128, (C, width)).astype(np.int8) for _ in range(R)]
    scale = (rng.random((R, C)) * 3 + 1e-4).astype(np.float16)
    mean, std = rng.normal(size=(2, width)).astype(np.float32)
    calibration = Calibration(torch.from_numpy(mean), torch.from_numpy(np.abs(std) + 1e-3))
    where = case(rng, permuted, *span)
    got, want = (aligned((B, width)) for _ in range(2))
    got[:] = want[:] = np.nan
    assert whole_lines(got) == (width == 768), "both ways of writing are tried"
    int8_rows(addresses(chunks), scale.astype(np.float32), *where, mean, calibration.std.numpy(), got, whole_lines(got))
    plain_rows(chunks, scale, *where, calibration, want)
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
    assert np.isnan(got).all(axis=1).sum() == B - (where.places >= 0).sum(), "rows not asked for stay as they were"


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("span", SPANS)
def test_bfloat16_and_stored_rows_go_to_the_same_places(permuted: bool, span: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    chunks = [rng.integers(0, 1 << 16, (C, 32)).astype(np.uint16) for _ in range(R)]
    for chunk in chunks:
        chunk.flags.writeable = False
    where = case(rng, permuted, *span)
    got, want = (aligned((B, 32)) for _ in range(2))
    got[:] = want[:] = 0.5
    bf16_rows(addresses(chunks), *where, got.view(np.uint32), whole_lines(got))
    plain_rows(chunks, None, *where, None, want)
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
    copied = np.full((B, 32), 0x3F00, np.uint16)  # 0.5
    copy_rows(addresses(chunks), *where, copied, whole_lines(copied))
    assert np.array_equal(copied.astype(np.uint32) << 16, want.view(np.uint32))
    small = [(chunk & 0x7F).astype(np.int8) for chunk in chunks]
    copied_small = np.full((B, 32), -1, np.int8)
    copy_rows(addresses(small), *where, copied_small, False)
    taken = (copied_small >= 0).all(axis=1)
    assert np.array_equal(copied_small[taken], (copied[taken] & 0x7F).astype(np.int8))


def test_the_reference_is_the_codec() -> None:
    """Every way of decoding gives the same bits: kernel, torch in blocks, and the specification."""
    rng = np.random.default_rng(2)
    codes = rng.integers(-127, 128, (C, 40)).astype(np.int8)
    scale = rng.random(C).astype(np.float16)
    calibration = Calibration(torch.randn(40), torch.rand(40) + 0.1)
    where = Case(np.arange(C, dtype=np.int32)[None], 0, C, 1, np.arange(C))
    got = np.empty((C, 40), np.float32)
    mean, std = calibration.mean.numpy(), calibration.std.numpy()
    int8_rows(addresses([codes]), scale.astype(np.float32)[None], *where, mean, std, got, False)
    back = decode(torch.from_numpy(codes), torch.from_numpy(scale), calibration, torch.float32)
    assert torch.equal(torch.from_numpy(got), back)
    patterns = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 64)
    every = Case(np.arange(1024, dtype=np.int32)[None], 0, 1024, 1, np.arange(1032))
    wide = np.empty((1024, 64), np.float32)
    bf16_rows(addresses([patterns]), *every, wide.view(np.uint32), False)
    assert torch.equal(
        torch.from_numpy(wide).nan_to_num(),
        torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16).float().nan_to_num(),
    )
