"""The fused loops against their plain reference, bit by bit."""

import numpy as np
import pytest
import torch

from thresher.cache.codec import Calibration, decode
from thresher.cache.kernels.decode import bf16_rows, copy_rows, int8_rows, plain_rows


def places_of(rows: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Distinct places for the rows, a third of them left out."""
    places = rng.permutation(size)[: len(rows)]
    return np.where(rng.random(len(rows)) < 1 / 3, -1, places)


@pytest.mark.parametrize("width", [1, 7, 24, 768])
@pytest.mark.parametrize("permuted", [False, True])
def test_decoding_on_the_way_is_gathering_and_then_decoding(width: int, permuted: bool) -> None:
    rng = np.random.default_rng(width)
    codes = rng.integers(-127, 128, (64, width)).astype(np.int8)
    scale = (rng.random(64) * 3 + 1e-4).astype(np.float16)
    mean, std = rng.normal(size=(2, width)).astype(np.float32)
    calibration = Calibration(torch.from_numpy(mean), torch.from_numpy(np.abs(std) + 1e-3))
    rows = rng.permutation(64)[:40] if permuted else np.arange(3, 63, 2)
    places = places_of(rows, 128, rng)
    got, want = np.full((2, 128, width), np.nan, np.float32)
    int8_rows(codes, scale.astype(np.float32), rows, places, mean, calibration.std.numpy(), got)
    plain_rows(codes, scale, rows, places, calibration, want)
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
    assert np.isnan(got).all(axis=1).sum() == 128 - (places >= 0).sum(), "rows that nobody asked for stay as they were"
    torch_way = decode(torch.from_numpy(codes), torch.from_numpy(scale), calibration, torch.float32)
    assert torch.equal(torch.from_numpy(got[places[places >= 0]]), torch_way[rows[places >= 0]])


@pytest.mark.parametrize("width", [1, 7, 768])
def test_every_bfloat16_becomes_the_float32_of_the_same_value(width: int) -> None:
    rng = np.random.default_rng(0)
    codes = np.arange(1 << 16, dtype=np.uint16)[: (1 << 16) // width * width].reshape(-1, width)
    rows = rng.permutation(len(codes))
    places = places_of(rows, len(codes), rng)
    got, want = np.zeros((2, len(codes), width), np.float32)
    bf16_rows(codes, rows, places, got.view(np.uint32))
    plain_rows(codes, None, rows, places, None, want)
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
    finite = np.isfinite(got)
    exact = torch.from_numpy(codes.view(np.int16)).view(torch.bfloat16).float().numpy()
    taken = places >= 0
    assert np.array_equal(got[places[taken]][finite[places[taken]]], exact[rows[taken]][finite[places[taken]]])


@pytest.mark.parametrize("dtype", [np.int8, np.uint16])
def test_rows_are_copied_to_their_places(dtype: type) -> None:
    rng = np.random.default_rng(1)
    chunk = rng.integers(0, 100, (32, 24)).astype(dtype)
    chunk.flags.writeable = False
    rows = rng.permutation(32)
    places = places_of(rows, 50, rng)
    got, want = np.full((2, 50, 24), 7, dtype)
    copy_rows(chunk, rows, places, got)
    want[places[places >= 0]] = chunk[rows[places >= 0]]
    assert np.array_equal(got, want)
