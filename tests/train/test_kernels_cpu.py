"""Compiled loops on a CPU equal the plain formulas, in both number formats and with any number of threads."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from thresher.cache.errors import UserError
from thresher.cache.kernels import cpu_pool
from thresher.train.kernels import choice, cpu, firing
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.gradients import Rows, Sink, no_facts
from thresher.train.kernels.sparse import Selection

WIDTHS = [1, 5, 16, 128, 147, 300]  # below a cache line, one tile, tiles with lines and single columns left


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def entries(tokens: int, width: int, seed: int = 0) -> Selection:
    """A selection with empty tokens, empty latents, and one latent that fires nearly always."""
    mask = torch.rand(tokens, width, generator=torch.Generator().manual_seed(seed)) < 0.15
    mask[3] = False
    mask[:, 5] = True
    mask[:, 2] = False
    return firing.compress(mask)


def dense(values: Tensor, selection: Selection) -> Tensor:
    out = values.new_zeros(selection.tokens, selection.width)
    out[selection.rows, selection.latents] = values
    return out


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Numbers of threads; with more than one, even the smallest loop is divided."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(cpu_pool, "_WORTH_A_THREAD", 1)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
def test_decoding_adds_weighted_rows_to_a_view_of_the_output(width: int, dtype: torch.dtype, threads: int) -> None:
    selection = entries(20, 11)
    z, W = rand(selection.latents.shape[0], dtype=dtype), rand(11, width, seed=1, dtype=dtype)
    whole = rand(20, width + 3, seed=2, dtype=dtype)
    expected = whole.clone()
    expected[:, 3:] += dense(z, selection) @ W
    cpu.decode(whole[:, 3:], z, W, selection)
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("fresh", [True, False])
def test_gradients_of_decoder_and_codes_and_their_facts(
    width: int, fresh: bool, dtype: torch.dtype, threads: int
) -> None:
    selection = entries(20, 11)
    z, W = rand(selection.latents.shape[0], dtype=dtype), rand(11, width, seed=1, dtype=dtype)
    g = rand(20, width + 2, seed=2, dtype=dtype)[:, 2:]
    dW = torch.full((11, width), math.nan, dtype=dtype) if fresh else rand(11, width, seed=3, dtype=dtype)
    expected = dense(z, selection).T @ g + (0 if fresh else dW)
    facts = no_facts(11) if fresh else None
    dz = cpu.decoder_gradient(z, g, W, selection, dW, fresh, facts)
    torch.testing.assert_close(dW, expected)
    torch.testing.assert_close(dz, (g @ W.T)[selection.rows, selection.latents])
    if facts is not None:
        for got, wanted in zip(facts, (expected**2, expected * W, W**2), strict=True):
            torch.testing.assert_close(got.to(dtype), wanted.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("fresh", [True, False])
def test_gradients_of_encoder_and_bias(width: int, fresh: bool, dtype: torch.dtype, threads: int) -> None:
    selection = entries(20, 11)
    da, x = rand(selection.latents.shape[0], dtype=dtype), rand(20, width, seed=1, dtype=dtype)
    dW = torch.full((11, width), math.nan, dtype=dtype) if fresh else rand(11, width, seed=3, dtype=dtype)
    expected = dense(da, selection).T @ x + (0 if fresh else dW)
    facts = no_facts(11) if fresh else None
    sums = cpu.encoder_gradient(da, x, selection, dW, fresh, facts)
    torch.testing.assert_close(dW, expected)
    torch.testing.assert_close(sums, dense(da, selection).sum(0))
    if facts is not None:
        torch.testing.assert_close(facts.squares.to(dtype), (expected**2).sum(1), rtol=1e-5, atol=1e-5)


def begun_with(width: int, kind: torch.dtype) -> Rows:
    """Rows of an empty latent, of one that fires nearly always, and of two others."""
    return Rows(torch.tensor([9, 2, 5, 10]), rand(4, width, seed=4).to(kind), 0.37)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_that_begin_with_rows_have_them_added_and_in_their_facts(
    width: int, dtype: torch.dtype, kind: torch.dtype, threads: int
) -> None:
    selection, begun = entries(20, 11), begun_with(width, kind)
    z, W = rand(selection.latents.shape[0], dtype=dtype), rand(11, width, seed=1, dtype=dtype)
    g = rand(20, width, seed=2, dtype=dtype)
    expected = (dense(z, selection).T @ g).index_add(0, begun.rows, begun.values.to(dtype), alpha=begun.factor)
    dW, facts = torch.full((2, 11, width), math.nan, dtype=dtype), (no_facts(11), no_facts(11))
    dz = cpu.decoder_gradient(z, g, W, selection, dW[0], True, facts[0], begun)
    sums = cpu.encoder_gradient(z, g, selection, dW[1], True, facts[1], begun)
    torch.testing.assert_close(dW, expected.expand(2, -1, -1))
    torch.testing.assert_close(dz, (g @ W.T)[selection.rows, selection.latents])
    torch.testing.assert_close(sums, dense(z, selection).sum(0))
    for got, wanted in zip((*facts[0], facts[1].squares), (expected**2, expected * W, W**2, expected**2), strict=True):
        torch.testing.assert_close(got.to(dtype), wanted.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("along", [True, False])
def test_the_update_equals_adam_on_the_whole_gradient(
    unit: bool, along: bool, dtype: torch.dtype, threads: int
) -> None:
    weight, grad = rand(9, 37, dtype=dtype), rand(9, 37, seed=1, dtype=dtype)
    plain = nn.Parameter(weight.clone())
    adam = torch.optim.Adam([plain], lr=0.01, betas=(0.8, 0.95), eps=1e-8)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    multiples = rand(9, seed=2, dtype=dtype) if along else None
    for step in (1, 2, 3):
        plain.grad = 0.5 * (grad if multiples is None else grad + multiples[:, None] * plain.detach())
        adam.step()
        if unit:
            plain.data = torch.nn.functional.normalize(plain.data, dim=1)
        cpu.update(weight, grad, m, v, multiples, 0.5, cpu.adam(dtype, 0.01, (0.8, 0.95), 1e-8, step), unit)
        torch.testing.assert_close(weight, plain.detach())


def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_pool, "_WORTH_A_THREAD", 1)
    selection = entries(200, 70)
    z, g, W = rand(selection.latents.shape[0]).float(), rand(200, 150, seed=1).float(), rand(70, 150, seed=2).float()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y, dW, facts = torch.zeros(200, 150), torch.empty(2, 70, 150), no_facts(70)
        cpu.decode(y, z, W, selection)
        dz = cpu.decoder_gradient(z, g, W, selection, dW[0], True, facts, begun_with(150, torch.bfloat16))
        cpu.encoder_gradient(z, g, selection, dW[1], True, None, begun_with(150, torch.float32))
        results.append((y, dW, dz, *facts))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))


def test_an_error_in_another_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_pool, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def fail(first: int, stop: int) -> None:
        raise ValueError(f"rows {first} to {stop}")

    with pytest.raises(ValueError, match="rows"):
        cpu_pool.over_rows(10, fail, 100)


def test_every_row_is_covered_once(threads: int) -> None:
    seen = np.zeros(101, np.int64)

    def count(first: int, stop: int) -> None:
        seen[first:stop] += 1

    cpu_pool.over_rows(101, count, 1000)
    assert (seen == 1).all()


def sink() -> Sink:
    return Sink(nn.Parameter(rand(4, 3)))


def test_a_sink_keeps_its_memory_and_adds_terms_in_any_order() -> None:
    target = sink()
    rows, values = torch.tensor([2, 0]), rand(2, 3, seed=1)
    target.add_rows(rows, values)  # before the first whole term: waits for it
    assert target.fresh
    grad, fresh, *_ = target.open()
    assert fresh
    grad.copy_(torch.ones(4, 3))
    target.close()
    target.add_rows(rows, values)
    again, fresh, *_ = target.open()
    assert not fresh
    again.add_(1.0)
    target.close()
    (target.parameter.sum() * 3).backward()  # a term that autograd adds
    expected = torch.full((4, 3), 5.0, dtype=torch.float64).index_add(0, rows, 2 * values)
    assert target.parameter.grad is not None
    torch.testing.assert_close(target.parameter.grad, expected)
    memory = grad.data_ptr()
    target.clear()
    assert target.parameter.grad is None
    assert target.open()[0].data_ptr() == memory


def test_rows_alone_make_a_gradient_that_is_zero_elsewhere() -> None:
    target = sink()
    target.add_rows(torch.tensor([1]), torch.ones(1, 3, dtype=torch.float64))
    target.settle()
    assert target.parameter.grad is not None
    assert target.parameter.grad.tolist() == [[0.0] * 3, [1.0] * 3, [0.0] * 3, [0.0] * 3]


def test_multiples_of_the_weight_are_written_only_when_the_whole_gradient_is_wanted() -> None:
    target = sink()
    target.add_along(torch.arange(4.0, dtype=torch.float64))
    target.add_along(torch.ones(4, dtype=torch.float64))
    target.settle()
    assert target.fresh
    target.settle(whole=True)
    assert target.parameter.grad is not None
    expected = target.parameter.detach() * torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    torch.testing.assert_close(target.parameter.grad, expected)


@pytest.mark.parametrize("late", [True, False])
def test_rows_that_are_added_tell_their_facts_anew(late: bool) -> None:
    target, rows = sink(), torch.tensor([2, 0])
    values = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    if late:
        target.add_rows(rows, values)
    grad, _, known, _ = target.open(facts=True)
    weight = target.parameter.detach()
    assert known is not None
    grad.fill_(0.5)
    for fact, wanted in zip(known, (grad**2, grad * weight, weight**2), strict=True):
        fact.copy_(wanted.sum(1))
    target.close()
    if not late:
        target.add_rows(rows, values)
    assert target.facts() is known
    assert grad[0].tolist() == [3.5, 4.5, 5.5]
    for fact, wanted in zip(known, (grad**2, grad * weight, weight**2), strict=True):
        torch.testing.assert_close(fact, wanted.sum(1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("waiting", [0, 1, 2])
def test_a_kernel_takes_the_rows_that_wait_if_they_are_one_term(waiting: int) -> None:
    target, rows = sink(), torch.tensor([2, 0])
    terms = [(rows, rand(2, 3, seed=1), 0.5), (rows, rand(2, 3, seed=2), 1.0)]
    for term in terms[:waiting]:
        target.add_rows(*term)
    matrix, _, facts, begun = target.open(facts=True, begun=True)
    assert (begun is None) == (waiting != 1)
    matrix.fill_(1.0)
    if begun is not None:
        matrix.index_add_(0, begun.rows, begun.values, alpha=begun.factor)
    assert facts is not None
    for fact, wanted in zip(facts, (matrix**2, matrix * target.parameter.detach()), strict=False):
        fact.copy_(wanted.sum(1))
    target.close()
    for term in terms[waiting:]:
        target.add_rows(*term)
    expected = torch.ones_like(matrix)
    for index, values, factor in terms:
        expected.index_add_(0, index, values, alpha=factor)
    torch.testing.assert_close(target.parameter.grad, expected)
    assert target.facts() is facts
    torch.testing.assert_close(facts.squares, (expected**2).sum(1))


@pytest.mark.parametrize("again", [True, False])
def test_rows_begin_no_gradient_that_is_there_or_that_no_kernel_writes(again: bool) -> None:
    target = sink()
    target.add_rows(torch.tensor([1]), torch.ones(1, 3, dtype=torch.float64))
    if again:
        target.parameter.sum().backward()  # autograd was first
    matrix, fresh, _, begun = target.open(begun=again)
    assert fresh != again
    assert begun is None
    matrix.fill_(1.0)
    target.close()
    assert target.parameter.grad is not None
    assert target.parameter.grad.tolist() == [[1.0] * 3, [2.0] * 3, [1.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("spoil", ["open", "autograd"])
def test_facts_hold_until_something_is_added(spoil: str) -> None:
    target = sink()
    grad, _, facts, _ = target.open(facts=True)
    assert facts is not None
    grad.fill_(1.0)
    target.close()
    assert target.facts() is facts
    if spoil == "open":
        target.open(facts=True)
        target.close()
    else:
        target.parameter.sum().backward()
    assert target.facts() is None


def test_forced_kernels_are_plain_or_refused_and_all_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_device, cuda = torch.device("cpu"), torch.device("cuda")
    plain, auto, fast = Kernels("plain"), Kernels(), Kernels("fast")
    assert plain.pick("decode", cpu_device, torch.float32, 1) == "plain"
    assert auto.pick("decode", cpu_device, torch.float32, 1 << 30) == "numba"
    assert auto.pick("update", cpu_device, torch.float64, 1 << 30) == "numba"
    assert auto.pick("decode", cpu_device, torch.bfloat16, 1 << 30) == "torch"
    assert auto.described() == "decode numba/torch, update numba"
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    assert auto.pick("decode", cuda, torch.float32, 1 << 30) == "torch"
    with pytest.raises(UserError, match="triton"):
        fast.pick("decode", cuda, torch.float32, 1 << 30)
