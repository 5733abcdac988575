"""Selections are exact; fast products equal the plain ones in every output and gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thresher.train.kernels import firing, sparse
from thresher.train.kernels.sparse import Selection

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

N, D, E, F, S = 7, 5, 4, 11, 3


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mask_of(selection: Selection) -> Tensor:
    mask = torch.zeros(selection.tokens, selection.width, dtype=torch.bool)
    mask[selection.rows, selection.latents] = True
    return mask


def grads(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = rand(*out.shape, seed=99)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


@pytest.mark.parametrize("dense", [False, True])
def test_gathered_linear_equals_autograd_with_all_gradients(dense: bool) -> None:
    x, W, b = (t.requires_grad_() for t in (rand(N, D), rand(F, D, seed=1), rand(F, seed=2)))
    a = (x @ W.T + b).detach()
    selection = None if dense else firing.select_topk(a, 3)
    values = a if selection is None else selection.take(a)
    fast = sparse.gathered_linear(x, W, b, values, selection)
    plain = sparse.plain_gathered_linear(x, W, b, selection)
    torch.testing.assert_close(fast, plain)
    for got, expected in zip(grads(fast, [x, W, b]), grads(plain, [x, W, b]), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_decoding_equals_autograd_with_all_gradients(dense: bool, first: int) -> None:
    a = rand(N, F)
    selection = None if dense else firing.select_batch_topk(a, 17)
    z = (a if selection is None else selection.take(a)).requires_grad_()
    W = rand(F, S - first, E, seed=1).requires_grad_()
    base = rand(N, S, E, seed=2).requires_grad_()
    fast = sparse.add_decoded(base.clone(), z, W, selection, first)
    plain = sparse.plain_add_decoded(base, z, W, selection, first)
    torch.testing.assert_close(fast, plain)
    for got, expected in zip(grads(fast, [z, W, base]), grads(plain, [z, W, base]), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_selection_of_nothing_gives_zeros_everywhere() -> None:
    nothing = firing.compress(torch.zeros(N, F, dtype=torch.bool))
    x, W, b = (t.requires_grad_() for t in (rand(N, D), rand(F, D, seed=1), rand(F, seed=2)))
    a = sparse.gathered_linear(x, W, b, rand(0), nothing)
    W_dec = rand(F, 1, E).requires_grad_()
    y = sparse.add_decoded(torch.zeros(N, 1, E, dtype=torch.float64), a, W_dec, nothing, 0)
    assert y.abs().sum() == 0
    for grad in torch.autograd.grad(y.sum(), [x, W, b, W_dec]):
        assert grad.abs().sum() == 0


@pytest.mark.parametrize("width", [300, 1 << 17])
def test_the_inverted_index_is_a_stable_sort(width: int) -> None:
    latents = torch.randint(width, (5000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(sparse.stable_order(latents, width), torch.argsort(latents, stable=True))


@pytest.mark.parametrize(("width", "k"), [(64, 8), (4096, 3)])
def test_topk_takes_the_k_largest_of_every_token(width: int, k: int) -> None:
    a = rand(20, width).float()
    selection = firing.select_topk(a, k)
    expected = torch.zeros(20, width, dtype=torch.bool).scatter_(1, a.topk(k, dim=1).indices, True)
    assert torch.equal(mask_of(selection), expected)


def test_topk_keeps_k_per_token_when_values_tie() -> None:
    selection = firing.select_topk(torch.zeros(6, 32), 5)
    assert selection.offsets.tolist() == [0, 5, 10, 15, 20, 25, 30]
    assert mask_of(selection).sum(1).tolist() == [5] * 6


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 60), st.floats(0, 1), st.integers(1, 50))
def test_batch_topk_equals_the_plain_selection_with_ties(
    seed: int, tokens: int, width: int, share: float, levels: int
) -> None:
    a = rand(tokens, width, seed=seed).float()
    a = (a * levels).round() / levels  # few distinct values: many ties
    count = int(share * tokens * width)
    assert torch.equal(mask_of(firing.select_batch_topk(a, count)), firing.plain_batch_topk(a, count))


def test_batch_topk_is_exact_when_its_sample_misleads() -> None:
    a = torch.full((512, 256), 0.5)
    a[:, 0] = 5.0  # the strided sample sees few of these
    a[3, 7] = 4.0
    selection = firing.select_batch_topk(a, 513)
    assert torch.equal(mask_of(selection), firing.plain_batch_topk(a, 513))
    assert selection.latents.shape[0] == 513


def test_fractional_k_takes_the_floor_of_k_times_tokens() -> None:
    assert firing.select_batch_topk(rand(7, 30).abs(), math.floor(2.5 * 7)).latents.shape[0] == 17


def test_selecting_above_a_floor_turns_dense_when_many_are() -> None:
    a = rand(50, 40).float()
    sparse_one = firing.select_above(a, torch.full((40,), 2.0))
    assert sparse_one is not None
    assert torch.equal(mask_of(sparse_one), a > 2.0)
    assert firing.select_above(a, 0.0) is None


@pytest.mark.parametrize("dense", [False, True])
def test_jumprelu_and_its_gate_equal_the_plain_form_with_window_gradients(dense: bool) -> None:
    a_NF = rand(40, F).requires_grad_()
    theta = rand(F, seed=1).abs().requires_grad_()
    width = torch.tensor(0.7, dtype=torch.float64)
    selection = None if dense else firing.compress(a_NF.detach() > theta.detach() - width / 2)
    a = a_NF if selection is None else a_NF[selection.rows, selection.latents]
    z, gate = firing.jump_relu(a, theta, width, selection)
    plain_z, plain_gate = firing.plain_jump_relu(a_NF, theta, width), firing.plain_step(a_NF, theta, width)
    w_z, w_gate = rand(40, F, seed=5), rand(40, F, seed=6)
    picked = (lambda t: t) if selection is None else (lambda t: t[selection.rows, selection.latents])
    fast = (z * picked(w_z)).sum() + (gate * picked(w_gate)).sum()
    plain = (plain_z * w_z).sum() + (plain_gate * w_gate).sum()
    got = torch.autograd.grad(fast, [a_NF, theta])
    expected = torch.autograd.grad(plain, [a_NF, theta])
    torch.testing.assert_close(fast, plain) if dense else None
    # Entries below the window are not selected; the plain form gives them no gradient either.
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_the_gates_threshold_gradient_estimates_minus_theta_times_density() -> None:
    # a ~ N(0, 1): d/dτ of P(a > θ) with θ = exp(τ) is −θ·φ(θ)
    a = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_theta = torch.tensor([math.log(0.8)], dtype=torch.float64, requires_grad=True)
    _, gate = firing.jump_relu(a, log_theta.exp(), torch.tensor(0.2, dtype=torch.float64), None)
    gate.mean().backward()
    density = math.exp(-0.5 * 0.8**2) / math.sqrt(2 * math.pi)
    assert log_theta.grad is not None
    assert log_theta.grad.item() == pytest.approx(-0.8 * density, rel=0.02)


def test_jumprelu_uses_raw_preactivations_so_that_silent_entries_leave_the_threshold_alone() -> None:
    # θ < ε/2: zeros of relu(a) would all lie in the window; a far below 0 does not
    theta = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    a = torch.full((5, 1), -3.0, dtype=torch.float64)
    z, gate = firing.jump_relu(a, theta, torch.tensor(1.0, dtype=torch.float64), None)
    (z.sum() + gate.sum()).backward()
    assert theta.grad is not None
    assert theta.grad.item() == 0.0
