import ml_dtypes
import numpy as np
import pytest
import torch

from thresher.cache import stats
from thresher.cache.codec import (
    Calibration,
    calibrate,
    decode,
    decode_plain,
    encode_bf16,
    encode_int8z,
    encode_plain,
)


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed rows with an offset, three outlier dimensions and one that never moves."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    x[:, :3] *= 300.0
    x[:, 5] = 0.25
    return x + torch.linspace(-4, 4, d)


def calibration_of(x: torch.Tensor) -> Calibration:
    moments = stats.of_rows(x.numpy())
    return calibrate(moments.mean, moments.m2 / moments.rows)


@pytest.mark.parametrize("n", [1, 64, 1000])
def test_fast_encoding_equals_the_plain_one_bit_for_bit(n: int) -> None:
    x = rows(n, 96)
    calibration = calibration_of(rows(500, 96, seed=1))
    codes, scale = encode_plain(x, calibration)
    fast = encode_int8z(x.clone(), calibration, calibration.inverse)
    assert fast.scale is not None
    assert torch.equal(fast.codes, codes)
    assert torch.equal(fast.scale, scale)
    assert codes.abs().max() <= 127


def test_decoding_equals_the_plain_one_up_to_float32_rounding() -> None:
    x = rows(300, 96)
    calibration = calibration_of(x)
    codes, scale = encode_plain(x, calibration)
    plain = decode_plain(codes, scale, calibration, torch.float64)
    fast = decode(codes, scale, calibration, torch.float32).double()
    size = calibration.mean.abs() + calibration.std * (codes.abs() * scale[:, None].double()).amax(dim=0)
    assert ((fast - plain).abs() <= 3 * 2.0**-24 * size + 1e-30).all()


def test_error_is_at_most_half_a_step_of_the_rows_own_scale() -> None:
    x = rows(300, 96).double()
    calibration = calibration_of(x)
    codes, scale = encode_plain(x, calibration)
    error = (decode_plain(codes, scale, calibration, torch.float64) - x).abs()
    half_step = 0.5 * scale.double()[:, None] * calibration.std.double()
    clipped = 127 * 2.0**-11  # the scale is rounded to 11 bits, so the largest code may fall short by this much
    assert (error <= half_step * (1 + 2 * clipped / 127) + 1e-12).all()


def test_expected_error_follows_the_largest_z_of_a_row() -> None:
    x = torch.randn(4000, 256, generator=torch.Generator().manual_seed(2))
    calibration = calibration_of(x)
    codes, scale = encode_plain(x, calibration)
    error = (decode_plain(codes, scale, calibration, torch.float64) - x).square().sum()
    fvu = float(error / (x.double() - x.double().mean(0)).square().sum())
    m2 = ((x - calibration.mean) / calibration.std).abs().amax(1).double().square().mean()
    assert fvu == pytest.approx(float(m2) / 193548, rel=0.07)


def test_a_row_of_zeros_and_a_constant_site_survive() -> None:
    x = torch.zeros(4, 8)
    calibration = calibration_of(x)
    assert torch.equal(calibration.std, torch.ones(8))
    codes, scale = encode_plain(x, calibration)
    assert torch.equal(decode(codes, scale, calibration, torch.float32), x)


def test_a_massive_row_does_not_coarsen_the_others() -> None:
    x = rows(200, 96)
    calibration = calibration_of(x)
    loud = torch.cat([x, 1000 * x[:1]])
    assert torch.equal(encode_plain(loud, calibration)[0][:200], encode_plain(x, calibration)[0])


def test_bf16_rounds_to_nearest_even() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    ties = ((bits & 0xFFFF0000) | 0x8000).view(np.float32)
    for x in (values, ties):
        x = x[np.isfinite(x)].reshape(1, -1)
        codes = encode_bf16(torch.from_numpy(x.copy())).codes
        assert codes.view(torch.int16).numpy().tobytes() == x.astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("codec", ["int8z", "bf16"])
def test_sums_of_a_block_equal_float64_moments(codec: str) -> None:
    x = rows(1024, 96)
    calibration = calibration_of(rows(500, 96, seed=1))
    unit = calibration.std.double().numpy() if codec == "int8z" else np.ones(96)
    if codec == "int8z":
        encoded = encode_int8z(x.clone(), calibration, calibration.inverse)
        restored = decode_plain(encoded.codes, encoded.scale, calibration, torch.float64)  # type: ignore[arg-type]
        assert encoded.peak == ((x - calibration.mean) * calibration.inverse).abs().max()
    else:
        encoded = encode_bf16(x.clone())
        restored = encoded.codes.double()
    sums = stats.Sums(96)
    sums.rows, sums.values[:] = 1024, encoded.sums.numpy()
    fast, plain = sums.moments(), stats.of_rows(x.numpy())
    np.testing.assert_allclose(fast.mean, plain.mean, rtol=1e-12)
    np.testing.assert_allclose(fast.m2, plain.m2, rtol=1e-10, atol=1e-9)  # dimension 5 never moves
    np.testing.assert_allclose(encoded.norm.numpy(), x.double().norm(dim=1).numpy(), rtol=1e-6)
    error = (restored - x.double()).square().sum(0).numpy()
    moving = np.arange(96) != 5
    np.testing.assert_allclose((sums.values[2] * unit**2)[moving], error[moving], rtol=1e-3)
