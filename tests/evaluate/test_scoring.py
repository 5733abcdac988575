"""The loop over rows of logits equals the library's reductions, which say what it means."""

import pytest
import torch

from thresher.cache.kernels import cpu_pool
from thresher.evaluate.scoring import plain_reductions, reductions


def logits(rows: int, width: int, scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("width", [1, 3, 512, 513, 4096, 5000])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 60.0])
def test_reductions_equal_the_plain_ones_in_float64(width: int, scale: float) -> None:
    q, p = logits(9, width, scale), logits(9, width, scale, seed=1).softmax(-1)
    token = torch.arange(9) % width
    got, plain = reductions(q, p, token), plain_reductions(q.double(), p.double(), token)
    assert torch.equal(got.top, plain.top)
    torch.testing.assert_close(got.normaliser, plain.normaliser, rtol=1e-6, atol=5e-7)
    torch.testing.assert_close(got.dots, plain.dots, rtol=1e-6, atol=1e-6 * scale)
    torch.testing.assert_close(got.chosen, plain.chosen, rtol=1e-6, atol=1e-6 * scale)


def test_of_equal_logits_the_first_is_the_top() -> None:
    q = logits(20, 700, 1.0).round()
    q[3] = -0.0
    q[3, 500] = 0.0
    q[4] = -torch.inf
    q[4, 600] = 0.0
    assert torch.equal(reductions(q, q.softmax(-1), torch.zeros(20, dtype=torch.int64)).top, q.argmax(-1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_shows(bad: float) -> None:
    q = logits(4, 600, 1.0)
    q[2, 555] = bad
    found = reductions(q, logits(4, 600, 1.0, seed=1).softmax(-1), torch.zeros(4, dtype=torch.int64))
    assert found.dots.isfinite().tolist() == [True, True, False, True]


def test_rows_are_the_same_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_pool, "_WORTH_A_THREAD", 1)
    q, p, token = logits(101, 900, 2.0), logits(101, 900, 2.0, seed=1).softmax(-1), torch.arange(101)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(reductions(q, p, token))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))
