"""The kernels for rows on a CPU against the plain definitions."""

import numpy as np
import pytest
import torch
from numba.core import caching
from torch import Tensor

from thresher.cache import stats
from thresher.cache.buffers import Buffers
from thresher.cache.codec import Calibration, calibrate, decode_plain, encode_plain
from thresher.cache.contracts import Site
from thresher.cache.host import HostEncoder, host_rows
from thresher.cache.kernels import encode
from thresher.cache.kernels.jit import compiled
from thresher.cache.lane import Lane, Shelf

WIDTHS = [1, 7, 32, 96, 160]
"""Of which int8 rows are whole cache lines at none, bfloat16 rows at 32, 96 and 160."""


def rows(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """Heavy tails, an offset, and every ninth row massive."""
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(n, d, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    x[::9] *= 3000.0
    return (x + torch.linspace(-4, 4, d)).to(dtype)


def refused(site: str, lane: Lane, index: int) -> None:
    raise ValueError(f"{site} {index}")


def stored(
    x: Tensor, codec: str, cuts: list[int], calibration: Calibration | None = None
) -> tuple[np.ndarray, np.ndarray, stats.Sums, Lane]:
    """(codes, scales, sums, lane) of the odd rows of x, given to the encoder in pieces, at random places."""
    picked = np.arange(1, len(x), 2)
    at = np.random.default_rng(0).permutation(len(picked))
    site, buffers = Site("s", 0, "s", x.shape[1]), Buffers()
    shape = (len(picked), x.shape[1])
    shelves = {"s": buffers.take(shape, np.dtype(np.int8 if codec == "int8z" else np.uint16))}
    shelves["s.scale"] = np.zeros(len(picked), np.float16)
    known = {"s": calibration or calibration_of(x)} if codec == "int8z" else {}
    lane = Lane(np.arange(len(picked)), at, [site])
    encoder = HostEncoder(Shelf((site,), shelves, known, x.device, refused))  # type: ignore[arg-type]
    for piece in np.split(picked, cuts):
        encoder.add(lane, {"s": x}, piece)
    return shelves["s"][at], shelves["s.scale"][at], lane.sums["s"], lane


def calibration_of(x: Tensor) -> Calibration:
    moments = stats.of_rows(x[: max(2, len(x) // 2)].float().numpy())
    return calibrate(moments.mean, moments.m2 / moments.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [*WIDTHS, 128])
def test_rows_are_stored_as_the_plain_encoding_has_them(d: int, dtype: torch.dtype) -> None:
    x = rows(203, d, dtype)
    taken = x[1::2].float()
    calibration = calibration_of(x)
    codes, scale = encode_plain(taken, calibration)
    got, got_scale, sums, lane = stored(x, "int8z", [])
    assert np.array_equal(got, codes.numpy())
    assert np.array_equal(got_scale.view(np.uint16), scale.numpy().view(np.uint16))
    assert lane.done == sums.rows == len(taken)
    error = (decode_plain(codes, scale, calibration, torch.float64) - taken.double()) / calibration.std.double()
    np.testing.assert_allclose(sums.values[2], error.square().sum(0).numpy(), rtol=2e-3, atol=1e-9)
    assert sums.peak[0] == ((taken - calibration.mean) * calibration.inverse).abs().max()

    bits, _, raw, _ = stored(x, "bf16", [])
    assert torch.equal(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), taken.to(torch.bfloat16))
    error = (taken.to(torch.bfloat16).double() - taken.double()).square().sum(0)
    np.testing.assert_allclose(raw.values[2], error.numpy(), rtol=1e-9)

    plain = stats.of_rows(taken.numpy())
    for moments in (sums.moments(), raw.moments()):
        np.testing.assert_allclose(moments.mean, plain.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(moments.m2, plain.m2, rtol=1e-10)
        np.testing.assert_allclose([moments.norm, moments.sq_norm], [plain.norm, plain.sq_norm], rtol=1e-6)


@pytest.mark.parametrize("codec", ["int8z", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_bytes_nor_sums_depend_on_how_rows_were_cut(codec: str, dtype: torch.dtype) -> None:
    x = rows(300, 48, dtype)
    whole = stored(x, codec, [])
    for cuts in ([1], [3, 4, 9], list(range(1, 150))):
        parts = stored(x, codec, cuts)
        assert np.array_equal(parts[0], whole[0])
        assert np.array_equal(parts[2].values, whole[2].values)
        assert np.array_equal(parts[2].norms, whole[2].norms)


@pytest.mark.parametrize("codec", ["int8z", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e25])
def test_the_first_row_that_cannot_be_stored_is_found(codec: str, dtype: torch.dtype, value: float) -> None:
    x = rows(120, 20, dtype)
    calm = calibration_of(x)
    x[7, 19] = x[8, 0] = x[41, 3] = value  # row 8 is not picked, row 7 is the fourth that is
    with pytest.raises(ValueError, match=r"^s 3$"):
        stored(x, codec, [2], calm)


def test_a_scale_too_large_for_its_16_bits_is_refused() -> None:
    x = torch.ones(4, 8)
    x[1::2] += torch.tensor([0.0, 1e-3])[:, None]
    x[3, 2] = 1e8
    calm = calibrate(np.ones(8), np.full(8, 1e-2))
    with pytest.raises(ValueError, match=r"^s 1$"):
        stored(x, "int8z", [], calm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_is_the_moments(dtype: torch.dtype) -> None:
    x = rows(101, 33, dtype)
    sums, plain = stats.Sums(33), stats.of_rows(x.float().numpy())
    sums.rows = 101
    assert encode.measure(host_rows(x), sums.values, sums.norms) == -1
    np.testing.assert_allclose(sums.moments().m2, plain.m2, rtol=1e-10)
    x[77, 4] = torch.nan
    assert encode.measure(host_rows(x), sums.values, sums.norms) == 77


def test_other_dtypes_are_taken_as_float32() -> None:
    x = rows(40, 16, torch.float16).clamp(-1e4, 1e4)
    assert np.array_equal(stored(x, "bf16", [])[0], stored(x.float(), "bf16", [])[0])


def test_memory_is_used_again_and_begins_on_a_page() -> None:
    buffers, dtype = Buffers(), np.dtype(np.uint16)
    first = buffers.take((1 << 12, 300), dtype)
    first[:] = 7
    address = first.ctypes.data
    assert address % 4096 == 0
    other = buffers.take((1 << 12, 300), dtype)
    assert other.ctypes.data != address
    buffers.give([first, np.zeros(3)])
    del first
    again = buffers.take((1 << 11, 300), dtype)
    assert again.ctypes.data == address
    buffers.give([again[:5], again, again])  # a second time changes nothing
    assert buffers.take((4,), dtype).ctypes.data == address
    assert buffers.take((4,), dtype).ctypes.data not in (address, other.ctypes.data)


def test_kernels_work_where_nothing_can_be_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert compiled()(lambda x: x + 1)(2) == 3
