"""Selections of every token alone, by compiled loops on a CPU, equal the plain ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.train.kernels import firing, frozen


def block(seed, coarse, double, tokens=7, width=70):
    rng = torch.Generator().manual_seed(seed)
    a_NF = torch.randn(tokens, width, generator=rng, dtype=torch.float64 if double else torch.float32)
    return (3 * a_NF).round() if coarse else a_NF


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6), coarse=st.booleans(), double=st.booleans(), cut=st.floats(-4, 4))
def test_above_takes_what_exceeds_each_latents_floor(seed, coarse, double, cut):
    a_NF = block(seed, coarse, double)
    floor_F = block(seed + 1, coarse, double, tokens=1)[0] + cut
    got, values = frozen.above(a_NF, floor_F)
    plain = firing.compress(a_NF > floor_F)
    assert torch.equal(got.latents, plain.latents)
    assert torch.equal(got.offsets, plain.offsets)
    assert torch.equal(values, plain.take(a_NF))
    one, _ = frozen.above(a_NF, torch.tensor(cut, dtype=a_NF.dtype))
    assert torch.equal(one.latents, firing.compress(a_NF > cut).latents)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6), coarse=st.booleans(), double=st.booleans(), k=st.integers(1, 70))
def test_largest_takes_the_positive_ones_of_the_k_largest_ties_to_the_lower_latent(seed, coarse, double, k):
    a_NF = block(seed, coarse, double)
    before = a_NF.clone()
    found = frozen.largest(a_NF, k)
    assert found is not None
    got, values = found
    best = torch.sort(a_NF, dim=1, descending=True, stable=True).indices[:, :k]
    plain = firing.compress(torch.zeros_like(a_NF, dtype=torch.bool).scatter_(1, best, True) & (a_NF > 0))
    assert torch.equal(got.latents, plain.latents)
    assert torch.equal(got.offsets, plain.offsets)
    assert torch.equal(values, plain.take(a_NF))
    assert torch.equal(a_NF, before)


def test_rows_of_any_size_are_chosen_from_alike():
    sizes = torch.tensor([1.0, 1e-30, 1e30, 0.0, 1e-3, 1.0, 1e3])[:, None]
    a_NF = block(3, False, False, tokens=7, width=300) * sizes
    a_NF[6] = -a_NF[6].abs()
    found = frozen.largest(a_NF, 20)
    assert found is not None
    best = torch.sort(a_NF, dim=1, descending=True, stable=True).indices[:, :20]
    plain = firing.compress(torch.zeros_like(a_NF, dtype=torch.bool).scatter_(1, best, True) & (a_NF > 0))
    assert torch.equal(found[0].latents, plain.latents)
    assert torch.equal(found[1], plain.take(a_NF))


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_the_same_for_any_number_of_threads(threads):
    a_NF = block(0, False, False, tokens=3000, width=800)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [frozen.above(a_NF, torch.tensor(1.5)), frozen.largest(a_NF, 9)]
    finally:
        torch.set_num_threads(before)
    for (selection, values), plain in zip(
        (pair for pair in found if pair), (firing.compress(a_NF > 1.5), firing.select_topk(a_NF, 9)), strict=True
    ):
        assert torch.equal(selection.latents, plain.latents)
        assert torch.equal(values, plain.take(a_NF))


def test_what_is_not_a_number_fires():
    a_NF = block(0, False, False)
    assert frozen.largest(a_NF, 3) is not None
    a_NF[2, 5] = torch.inf
    assert frozen.largest(a_NF, 3) is None
    a_NF[2] = torch.nan
    assert frozen.largest(a_NF, 3) is None
    got, _ = frozen.above(a_NF, torch.tensor(0.5))
    assert int(got.offsets.diff()[2]) == 70
    assert torch.equal(got.latents, firing.compress(~(a_NF <= 0.5)).latents)


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "relu"])
def test_a_weight_that_is_not_a_number_shows_in_the_reconstruction(rule):
    from tests.train.test_losses import RULES, batch, make
    from thresher.train.dictionary.fold import deploy
    from thresher.train.normalise import Affine

    coder = make("sae", **RULES[rule])
    width = coder.spec.d_in
    unit = Affine(torch.zeros(width).double(), torch.ones(width).double(), torch.zeros(width).double(), width)
    served = deploy(coder, [unit], [unit])
    xs, _ = batch(coder)
    with torch.no_grad():
        served.encoder(0).W_enc[3, 1] = torch.nan
    x_ND = xs[0].to(served.b_dec.dtype)
    assert bool(served.decode(0, [served.encode(0, x_ND)]).isnan().any())


def test_no_rows_no_entries():
    empty = torch.zeros(0, 5)
    for found in (frozen.above(empty, torch.tensor(0.0)), frozen.largest(empty, 2)):
        assert found is not None
        selection, _ = found
        assert selection.tokens == 0
        assert selection.latents.shape == (0,)
