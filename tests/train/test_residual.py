"""What a reconstruction left, in one compiled pass: equal to the formulas, and the same with any number of threads."""

import pytest
import torch
from torch import Tensor

from thresher.cache.kernels import cpu_pool
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.residual import Left, left


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "width"), [(1, 5), (7, 16), (33, 147), (200, 64)])
def test_one_pass_equals_the_formulas(tokens: int, width: int, dtype: torch.dtype) -> None:
    y, guesses = rand(tokens, width, dtype=dtype) + 3, rand(tokens, 3, width, seed=1, dtype=dtype)
    fast, plain = (left(y, guesses[:, 1], Kernels(forced)) for forced in ("auto", "plain"))  # type: ignore[arg-type]
    assert (fast.known is None, plain.known is None) == (False, True)
    assert torch.equal(fast.residual, y - guesses[:, 1])
    torch.testing.assert_close(fast.squares, plain.squares)
    torch.testing.assert_close(fast.variation(), plain.variation(), rtol=1e-5, atol=1e-9)
    assert fast.squares.dtype == fast.variation().dtype == dtype


@pytest.mark.parametrize("tokens", [1, 50])
def test_a_residual_that_is_the_same_for_all_tokens_has_no_variation(tokens: int) -> None:
    y = rand(tokens, 20, dtype=torch.float32)
    found = left(y, y - y[:1], Kernels())  # y[0], up to rounding
    same = left(torch.full((tokens, 20), 0.1), torch.full((tokens, 20), 0.7), Kernels())
    assert float(found.variation()) < 1e-10
    assert float(same.squares) > 0
    assert float(same.variation()) == 0.0


def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_pool, "_WORTH_A_THREAD", 1)
    y, guess = rand(77, 100).float(), rand(77, 100, seed=1).float()
    before, found = torch.get_num_threads(), list[Left]()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(left(y, guess, Kernels()))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True) if a is not None)
