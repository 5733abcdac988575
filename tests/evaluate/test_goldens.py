"""Hand-worked numbers: each would come out differently under a known mistake, which the comment names."""

import math

import numpy as np
import pytest
import torch

from thresher.cache.layout import Contexts
from thresher.evaluate.compat import COMPAT, batch_truth, compat
from thresher.evaluate.costs import costs
from thresher.evaluate.metrics import (
    CodeSums,
    ReconstructionSums,
    TargetSums,
    clean_scores,
    code_metrics,
    count_quantile,
    density_histogram,
    kl_divergence,
    language_metrics,
    reconstruction_metrics,
    score_tokens,
    score_tokens_plain,
)
from thresher.evaluate.run import Replacement


def fve_centred(y_NE, yhat_NE):
    return float(compat(batch_truth(y_NE), ReconstructionSums().add(y_NE, yhat_NE))[COMPAT.index("fve_centred")])


SQUARE = torch.tensor([[0.0, 0], [2, 0], [0, 2], [2, 2]])


def reconstruction(y, yhat, cut=2):
    target, sums = TargetSums(), ReconstructionSums()
    for part in (slice(0, cut), slice(cut, None)):
        target.add(y[part])
        sums.add(y[part], yhat[part])
    return reconstruction_metrics(target, sums)


def row(tokens, documents=None):
    """One context, first position special."""
    keep = np.ones((1, len(tokens)), dtype=np.uint8)
    keep[0, 0] = 2
    document = np.zeros((1, len(tokens))) if documents is None else np.array([documents])
    return Contexts(np.array([tokens], dtype=np.int32), document.astype(np.int32), keep)


def test_predicting_the_mean():
    found = reconstruction(SQUARE, torch.ones(4, 2))
    assert (found["fvu"], found["fvu_uncentred"], found["gamma"]) == (1, 0.5, 1)
    assert fve_centred(SQUARE, torch.ones(4, 2)) == 0


def test_a_constant_offset_is_error():
    """Centring the residual would give fvu 0."""
    yhat = SQUARE + torch.tensor([1.0, 0])
    found = reconstruction(SQUARE, yhat)
    assert (found["fvu"], found["fvu_uncentred"], found["offset_share"]) == (0.5, 0.25, 0.5)
    assert found["gamma"] == pytest.approx(1.4)
    assert found["fvu_dim_mean"] == 0.5  # 1 and 0
    assert fve_centred(SQUARE, yhat) == 1


def test_shrinkage_by_half():
    found = reconstruction(SQUARE, SQUARE / 2)
    assert (found["fvu"], found["fvu_uncentred"], found["offset_share"], found["gamma"]) == (0.5, 0.25, 0.25, 0.5)
    assert found["cosine"] == pytest.approx(1)  # over the three tokens that are not zero
    assert (found["zero_rows"], found["norm_ratio"]) == (1, 0.5)
    assert fve_centred(SQUARE, SQUARE / 2) == 0.75


def test_fvu_is_a_ratio_of_sums():
    """The mean of the two halves' own ratios would be 0.5, whatever their sizes."""
    y = torch.tensor([[0.0], [2], [10], [14]])
    yhat = torch.tensor([[0.0], [2], [12], [12]])
    assert reconstruction(y, yhat)["fvu"] == pytest.approx(8 / (300 - 26**2 / 4))


def test_adding_a_vector_to_both_keeps_fvu_and_scaling_both_keeps_fvu_and_gamma():
    g = torch.Generator().manual_seed(0)
    y, yhat = (torch.randn(50, 5, generator=g, dtype=torch.float64) for _ in range(2))
    shift = torch.randn(5, generator=g, dtype=torch.float64)
    plain, shifted, scaled = (reconstruction(*p) for p in ((y, yhat), (y + shift, yhat + shift), (7 * y, 7 * yhat)))
    assert shifted["fvu"] == pytest.approx(plain["fvu"])
    assert (scaled["fvu"], scaled["gamma"]) == pytest.approx((plain["fvu"], plain["gamma"]))


def test_moments_do_not_depend_on_the_cut():
    y = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 100
    whole = TargetSums()
    whole.add(y)
    for cut in (1, 7, 39):
        parts = TargetSums()
        parts.add(y[:cut])
        parts.add(y[cut:])
        torch.testing.assert_close(parts.mean, whole.mean)
        torch.testing.assert_close(parts.m2, whole.m2)
    torch.testing.assert_close(whole.m2, (y - y.mean(0)).square().sum(0))


def test_constant_dimensions_are_dropped_and_counted():
    y = torch.tensor([[1.0, 5], [3, 5]])
    found = reconstruction(y, torch.tensor([[2.0, 5], [2, 5]]), cut=1)
    assert (found["fvu_dim_mean"], found["constant_dims"]) == (1, 1)


def test_uniform_logits_over_four(kit, scan):
    target = kit.Readout(torch.zeros(4, 4, dtype=torch.float64))
    results = scan([Replacement("x", (kit.Identity(["logits"], ["logits"], d=4),), {})], target, row([0, 1, 2, 3, 1]))
    found = results.find("clean", "cascade").metrics
    assert found["ce"] == pytest.approx(1.386294, abs=1e-6)
    assert found["ppl"] == pytest.approx(4)


def test_recovered_fractions():
    """CE clean 2, patched 2.5, zero 10, mean 6, over 10 tokens."""
    clean, arm, zero, mean = (np.array([10 * ce, 0, 0, 0.0]) for ce in (2, 2.5, 10, 6))
    found = language_metrics(np.array(10.0), clean, arm, zero, mean)
    assert (found["recovered_zero"], found["recovered_mean"], found["delta"]) == (0.9375, 0.875, 0.5)


def test_recovered_is_undefined_when_the_ablation_does_no_harm():
    clean, arm = np.array([20.0, 0, 0, 0]), np.array([25.0, 0, 0, 0])
    found = language_metrics(np.array(10.0), clean, arm, clean, clean - 1)
    assert np.isnan(found["recovered_zero"])
    assert np.isnan(found["recovered_mean"])


def test_kl_is_of_clean_to_patched(kit, scan):
    """Swapped it would be .130812; summed over positions, three times as much."""
    half, quarter = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.25, 0.75]).double().log()
    assert float(kl_divergence(half[None], quarter[None])) == pytest.approx(0.143841, abs=1e-6)
    assert float(kl_divergence(quarter[None], half[None])) == pytest.approx(0.130812, abs=1e-6)
    target = kit.Readout(half.expand(2, 2))
    results = scan([Replacement("x", (kit.Constant("logits", quarter),), {})], target, row([0, 1, 0, 1, 1]))
    found = results.find("x", "cascade").metrics
    assert found["kl"] == pytest.approx(0.143841, abs=1e-6)
    assert found["ce"] == pytest.approx(-(math.log(0.25) + 2 * math.log(0.75)) / 3)  # next tokens 0, 1, 1


def test_accuracy_is_of_the_next_token(kit, scan):
    """Position 0 is special, so a leading token makes room: tokens 0, 1, 2, 3 predict 1, 2, 0. Unshifted it is 0."""
    table = torch.full((5, 5), -1.0, dtype=torch.float64)
    for token, guess in ((0, 1), (1, 2), (2, 0), (3, 4), (4, 4)):
        table[token, guess] = 3.0
    target = kit.Readout(table)
    sets = [Replacement("x", (kit.Identity(["logits"], ["logits"], d=5),), {})]
    found = scan(sets, target, row([4, 0, 1, 2, 3])).find("x", "cascade").metrics
    assert found["acc"] == pytest.approx(2 / 3)
    assert found["acc_clean"] == pytest.approx(2 / 3)


def test_ties_go_to_the_lowest_index():
    logits = torch.tensor([[1.0, 3, 3, 0], [2, 2, 2, 2]])
    other = torch.tensor([[1.0, 0, 3, 0], [0, 2, 2, 2]])
    for form in (lambda q, p: score_tokens(q, torch.tensor([1, 0]), clean_scores(p)), None):
        found = form(logits, other) if form else score_tokens_plain(logits, torch.tensor([1, 0]), other)
        assert found.correct.tolist() == [1, 1]
        assert found.agree.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)]
)
def test_fast_scores_equal_plain_scores(dtype, tolerance):
    """Also far from 0, where GPT-2's logits are."""
    g = torch.Generator().manual_seed(2)
    clean = (3 * torch.randn(64, 300, generator=g, dtype=torch.float64) - 60).to(dtype)
    logits = (clean + torch.randn(64, 300, generator=g, dtype=torch.float64)).to(dtype)
    target = torch.randint(0, 300, (64,), generator=g)
    plain, fast = score_tokens_plain(logits, target, clean), score_tokens(logits, target, clean_scores(clean))
    torch.testing.assert_close(fast.stacked(), plain.stacked(), atol=tolerance, rtol=0)


def test_equal_logits_have_no_divergence_to_the_last_bit():
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(3)) * 9
    assert score_tokens(logits, torch.zeros(20, dtype=torch.long), clean_scores(logits)).kl.tolist() == [0.0] * 20


def test_scores_are_pooled_over_tokens_not_over_documents(kit, scan):
    """One document of one scored token with nll 0 nearly, one of four with nll ln 4: the mean of means is ln 2."""
    table = torch.zeros(4, 4, dtype=torch.float64)
    table[3, 0] = 50.0
    contexts = row([1, 3, 0, 1, 1, 2, 2, 1], documents=[0, 0, 0, 1, 1, 1, 1, 1])
    sets = [Replacement("x", (kit.Identity(["logits"], ["logits"], d=4),), {})]
    found = scan(sets, kit.Readout(table), contexts)
    assert found.masks["scored_tokens"] == 5
    assert found.find("clean", "cascade").metrics["ce"] == pytest.approx(4 * math.log(4) / 5)


@pytest.mark.parametrize(("clt", "parameters", "per_mlp"), [(False, 98_304, 16), (True, 172_032, 40)])
def test_cost_axes(kit, clt, parameters, per_mlp):
    ins, outs = [f"L{i:02d}.mlp_in" for i in range(4)], [f"L{i:02d}.mlp_out" for i in range(4)]
    pairs = [(ins, outs)] if clt else [([a], [b]) for a, b in zip(ins, outs, strict=True)]
    dictionaries = [kit.Base(*pair, d=768) for pair in pairs]
    used = [[16 * float(d.latent_costs(s)[0]) for s in range(len(d.inputs))] for d in dictionaries]
    found = costs(dictionaries, [[16.0] * 4] if clt else [[16.0]] * 4, used)
    assert found == {"l0": 16, "active_per_mlp": per_mlp, "active_parameters": parameters}


def test_code_statistics_by_hand(kit):
    """Latent 0 fires on 3 of 4 tokens, latent 1 on one, latents 2 and 3 never; L0 = 2, 1, 1, 0."""
    sums = CodeSums()
    for part in (torch.tensor([[5.0, 1, 0, 0], [2, 0, 0, 0]]), torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])):
        sums.add(kit.codes_of(part))
    found = code_metrics(sums)
    assert (found["l0"], found["l0_median"], found["l0_p5"], found["l0_p95"]) == (1, 1, 0, 2)
    assert (found["alive"], found["dead"], found["dense_1"], found["dense_10"]) == (0.5, 0.5, 0.5, 0.5)


def test_slots_with_value_zero_are_not_active(kit):
    codes = kit.codes_of(torch.tensor([[1.0, 2.0]]))._replace(values=torch.tensor([1.0, 0.0]))
    sums = CodeSums()
    assert sums.add(codes).tolist() == [1]
    assert code_metrics(sums)["alive"] == 0.5


def test_quantiles_of_a_count_histogram_are_exact():
    counts = np.random.default_rng(0).integers(0, 40, size=101)
    histogram = np.bincount(counts, minlength=50)
    for q in (0.05, 0.5, 0.95):
        assert count_quantile(histogram, q) == np.sort(counts)[math.ceil(q * 101) - 1]


def test_density_histogram_holds_every_latent():
    firings = np.array([0, 0, 1, 10, 100, 1000])
    found = density_histogram(firings, 1000)
    assert found["dead"] == [2]
    assert sum(found["latents"]) == 4
    assert found["log10_edges"][-1] == 0
