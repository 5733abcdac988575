"""AuxK's fast form equals ordinary autograd in value and all gradients; its choice of codes is exact."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.train.test_losses import LATENTS, RULES, N, auxk_term, batch, make
from thresher.cache.kernels import cpu_pool
from thresher.train import auxk
from thresher.train.kernels import low, silent, slabs
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.gradients import Sink
from thresher.train.kernels.silent import Dead, Silent, SilentBlock, by_latent, choose_silent, plain_silent
from thresher.train.kernels.tiles import joined_silent
from thresher.train.losses import losses

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 10**6), double=st.booleans(), coarse=st.booleans(), shift=st.sampled_from([0.0, 1.0, 5.0]))
def test_the_codes_of_dead_latents_are_the_k_largest_positive_ones(
    seed: int, double: bool, coarse: bool, shift: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(6, 40, generator=rng, dtype=torch.float64 if double else torch.float32)
    a = ((3 * a).round() if coarse else a) - shift  # coarse: many are equal
    count, k = (int(torch.randint(1, 40, (), generator=rng)) for _ in range(2))
    latents = torch.randperm(40, generator=rng)[:count].sort().values
    got = choose_silent(a, Dead(latents), k, Kernels())
    assert isinstance(got, Silent)
    mask = torch.zeros(6, count, dtype=torch.bool)
    mask[got.selection.rows, got.selection.latents] = True
    assert torch.equal(mask, plain_silent(a, latents, k))
    assert torch.equal(got.values, a[:, latents][mask])
    turned = by_latent(got.selection)
    order = torch.argsort(got.selection.latents, stable=True)
    assert torch.equal(turned.order, order)
    assert torch.equal(turned.tokens, got.selection.rows[order])
    assert torch.equal(turned.offsets.diff(), torch.bincount(got.selection.latents, minlength=count))


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 10**6), coarse=st.booleans(), shift=st.sampled_from([0.0, 1.0, 5.0]))
def test_a_block_of_codes_holds_the_same_codes_as_a_list(seed: int, coarse: bool, shift: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(6, 40, generator=rng)
    a = ((3 * a).round() if coarse else a) - shift
    count, k = (int(torch.randint(1, 40, (), generator=rng)) for _ in range(2))
    latents = torch.randperm(40, generator=rng)[:count].sort().values
    listed = choose_silent(a, Dead(latents), k, Kernels())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(silent, "has_tiles", lambda: True)
        patch.setattr(silent, "_BLOCK_WORK", 0)
        got = choose_silent(a, Dead(latents), k, Kernels(), width=1)
    assert isinstance(listed, Silent)
    assert isinstance(got, SilentBlock) == (len(listed.values) > silent._BLOCK_SHARE * 6 * count)
    assert torch.equal(
        _block(got if isinstance(got, Silent) else listed), (a[:, latents] * plain_silent(a, latents, k)).bfloat16()
    )
    if isinstance(got, SilentBlock):
        assert torch.equal(got.codes, _block(listed))
        joined = joined_silent([got, listed])
        assert isinstance(joined, SilentBlock)
        assert torch.equal(joined.codes, torch.cat([got.codes, got.codes]))


def _block(codes: Silent) -> Tensor:
    return low.spread(codes.values, codes.selection.latents, codes.selection.offsets, codes.selection.width)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("width", [5, 128, 200])
def test_sums_by_slabs_equal_plain_ones_with_any_number_of_threads(width: int, kind: type, threads: int) -> None:
    rng = np.random.default_rng(0)
    groups, rows, entries = 40, 50, 20000
    offsets = np.concatenate([[0], np.sort(rng.integers(0, entries, groups - 1)), [entries]])
    index, weights = rng.integers(0, rows, entries), rng.standard_normal(entries).astype(kind)
    table, w, out = (rng.standard_normal((count, width)).astype(kind) for count in (rows, groups, groups))
    plain, alone, both = out.copy(), out.copy(), out.copy()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        slabs.bags(alone, table, offsets, index, weights)
        dots = slabs.bags_and_dots(both, table, w, offsets, index, weights)
    finally:
        torch.set_num_threads(before)
    slabs.plain_bags(plain, table, offsets, index, weights)
    close = {"rtol": 1e-4, "atol": 1e-3} if kind is np.float32 else {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(alone, plain, **close)
    np.testing.assert_array_equal(alone, both)
    np.testing.assert_allclose(dots, slabs.plain_dots(table, w, offsets, index), **close)


def _gradients(out: Tensor, parameters: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out, list(parameters.values()), allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("dense_share", [0.0, 1.0])
@pytest.mark.parametrize("aux_k", [2, 4, 16])
@pytest.mark.parametrize("kind", ["sae", "transcoder", "clt"])
def test_the_fast_term_equals_autograd_with_all_gradients(
    kind: str, aux_k: int, dense_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auxk, "_DENSE_SHARE", dense_share)
    results = []
    for forced in ("auto", "plain"):
        coder = make(kind, pre_bias=kind == "sae", aux_k=aux_k, **{**RULES["topk"]})
        coder.use(Kernels(forced))
        if kind == "clt":
            coder.encoder(1).tokens_since_fired.zero_()  # a source without dead latents
        xs, ys = batch(coder)
        term = auxk_term(coder, xs, ys)
        results.append((term, _gradients(term, dict(coder.named_parameters()))))
    (fast, fast_grads), (plain, plain_grads) = results
    torch.testing.assert_close(fast, plain)
    for got, expected in zip(fast_grads, plain_grads, strict=True):
        torch.testing.assert_close(got, expected)
    assert any(bool(grad.abs().sum() > 0) for grad in fast_grads)


@pytest.mark.parametrize("kind", ["sae", "clt"])
def test_products_in_bfloat16_give_the_term_and_its_gradients_to_half_a_percent(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silent, "has_tiles", lambda: True)
    results = []
    for work in (0, 1 << 60):
        monkeypatch.setattr(silent, "_BLOCK_WORK", work)
        coder = make(kind, pre_bias=kind == "sae", aux_k=4, **RULES["topk"]).float()
        xs, ys = ([tensor.float() for tensor in tensors] for tensors in batch(coder))
        term = auxk_term(coder, xs, ys)
        assert ("auxk in bfloat16" in coder.kernels.used) == (work == 0)
        results.append([term.detach(), *_gradients(term, dict(coder.named_parameters()))])
    for rounded, exact in zip(*results, strict=True):
        assert float((rounded - exact).norm()) <= 5e-3 * float(exact.norm())
        assert torch.equal(rounded == 0, exact == 0)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6))
def test_operands_in_bfloat16_are_rounded_as_torch_does(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(5, 30, generator=rng) * 10.0 ** float(torch.randint(-20, 20, (), generator=rng))
    listed = choose_silent(a, Dead(torch.arange(30)), 7, Kernels())
    assert isinstance(listed, Silent)
    z = _block(listed)
    assert torch.equal(z, (a * plain_silent(a, torch.arange(30), 7)).bfloat16())
    gradient = torch.randn(5, 30, generator=rng).bfloat16()
    expected = gradient * (z != 0)
    sums = low.keep(gradient, z)
    assert torch.equal(gradient, expected)
    torch.testing.assert_close(sums, expected.float().sum(0))
    rows = torch.randperm(5, generator=rng)[:3]
    assert torch.equal(low.gather(a, rows), a[rows].bfloat16())
    assert torch.equal(low.gather(a.view(5, 2, 15)[:, 0], rows), a[rows, :15].bfloat16())  # of a CLT's decoder
    assert torch.equal(low.less(a, a[2]), (a - a[2]).bfloat16())
    guess, exact = torch.randn(5, 30, generator=rng).bfloat16(), torch.randn(5, 30, generator=rng)
    difference = guess.float() - exact
    rounded, total = low.difference(guess, exact)
    assert torch.equal(rounded, difference.bfloat16())
    torch.testing.assert_close(total, difference.double().square().sum().float())


def test_sums_of_masked_columns_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_pool, "_WORTH_A_THREAD", 1)
    rng = torch.Generator().manual_seed(0)
    z, gradient = (torch.randn(77, 50, generator=rng).bfloat16() for _ in range(2))
    before, sums = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        sums.append(low.keep(gradient.clone(), z.relu()))
    torch.set_num_threads(before)
    assert all(torch.equal(sums[0], other) for other in sums[1:])


def test_rows_in_bfloat16_are_added_to_a_gradient_in_one_pass() -> None:
    for factor in (1.0, -0.37):
        weight = torch.nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
        sink, rows = Sink(weight), torch.tensor([4, 1])
        values = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
        sink.add_rows(rows, values, factor)  # waits for the first whole term
        matrix, _, facts, _ = sink.open(facts=True)
        matrix.fill_(1.0)
        assert facts is not None
        sink.close()
        expected = torch.ones(6, 8).index_add_(0, rows, values.float(), alpha=factor)
        torch.testing.assert_close(weight.grad, expected)
        known = sink.facts()
        assert known is not None
        torch.testing.assert_close(known.squares[rows], expected[rows].double().square().sum(1))
        torch.testing.assert_close(known.dots[rows], (expected * weight.detach()).double().sum(1)[rows])


def test_codes_of_a_selection_made_before_are_found_without_its_block() -> None:
    coder = make("sae", **RULES["topk"])
    xs, _ = batch(coder)
    encoder, bias = coder.encoder(0), coder.bias(0)
    whole = encoder.choose(xs[0], bias)
    again = encoder(xs[0], bias, whole._replace(silent=None)).silent
    assert isinstance(whole.silent, Silent)
    assert isinstance(again, Silent)
    torch.testing.assert_close(again.values, whole.silent.values)
    assert torch.equal(again.latents, whole.silent.latents)
    assert torch.equal(again.selection.latents, whole.silent.selection.latents)


def test_a_sink_gets_rows_of_dead_latents_and_autograd_nothing() -> None:
    plain, sunk = (make("clt", **RULES["topk"]) for _ in range(2))
    xs, ys = batch(plain)
    auxk_term(plain, xs, ys).backward()
    sinks = sunk.gather()
    auxk_term(sunk, xs, ys).backward()
    for source in range(len(xs)):
        pairs = [(plain.encoder(source).W_enc, sunk.encoder(source).W_enc), (plain.W_dec[source], sunk.W_dec[source])]
        for expected, weight in pairs:
            assert weight.grad is None
            sinks.of(weight).settle()
            torch.testing.assert_close(weight.grad, expected.grad)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "clt"])
def test_gradients_of_all_terms_that_begin_with_auxk_equal_autograd(kind: str) -> None:
    plain, sunk = (make(kind, pre_bias=kind == "sae", **RULES["topk"]) for _ in range(2))
    plain.use(Kernels("plain"))
    xs, ys = batch(plain)
    sinks = sunk.gather()
    for coder in (plain, sunk):
        losses(coder, coder(xs), xs, ys, [2.0] * len(ys), 1.0).total.backward()
    for weight in sunk.W_dec:
        found, gradient, facts = sinks.of(weight), weight.grad, sinks.of(weight).facts()
        assert not found._late
        assert gradient is not None
        assert facts is not None
        pairs = ((gradient, gradient), (gradient, weight.detach()), (weight.detach(), weight.detach()))
        for fact, (left, right) in zip(facts, pairs, strict=True):
            torch.testing.assert_close(fact, (left * right).flatten(1).sum(1))
    for (name, expected), got in zip(plain.named_parameters(), sunk.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_what_the_backward_pass_used_is_freed_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the parts of a batch (train.micro_rows) would add up, as long as their losses are kept."""
    made, way = list[weakref.ref[Any]](), auxk.way_of

    def watched(*arguments: Any) -> Any:
        def make_products(*given: Any) -> Any:
            products = way(*arguments)(*given)
            made.append(weakref.ref(products))
            return products

        return make_products

    monkeypatch.setattr(auxk, "way_of", watched)
    coder = make("sae", **RULES["topk"])
    xs, ys = batch(coder)
    term = auxk_term(coder, xs, ys)
    assert made[0]() is not None
    term.backward()
    assert made[0]() is None


def test_tokens_and_latents_of_the_tests_leave_codes_on_both_sides_of_k() -> None:
    coder = make("sae", **RULES["topk"])
    xs, _ = batch(coder)
    codes = coder(xs).fired[0].silent
    assert isinstance(codes, Silent)
    counts = codes.selection.offsets.diff()
    assert counts.shape[0] == N
    assert codes.selection.width == LATENTS // 3
    assert bool((counts < 4).any())
    assert bool((counts == 4).any())
