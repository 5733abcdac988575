"""Closed forms against sampling, baselines against bounds, and the orientation of what is factored."""

import pytest
import torch

from thresher.cache.errors import UserError
from thresher.toy import bounds
from thresher.toy.baselines import half_identity, semi_nmf, svd
from thresher.toy.experiments.base import line
from thresher.toy.inputs import Inputs
from thresher.toy.labels import Labels, mixing_matrix
from thresher.toy.measure import Loss, Target, sampled, single_active
from thresher.toy.model import Weights, initial_weights, linear_map

N, M = 100, 50
CLEAN = Target(torch.zeros(N, N), 0.0)


def mixing(seed: int = 0, **settings: object) -> torch.Tensor:
    return mixing_matrix(Labels(**settings), N, M, seed)  # type: ignore[arg-type]


def loss(weights: Weights, target: Target, inputs: Inputs, samples: int = 200_000) -> float:
    return sampled([(weights, target)], inputs, seed=0, samples=samples)[0].value


def test_the_table_of_closed_forms_is_what_sampling_gives() -> None:
    zero = Weights(torch.zeros(1, N, M), torch.zeros(1, M, N))
    half = Weights(
        torch.cat([torch.eye(N), -torch.eye(N)], 1)[None], torch.cat([torch.eye(N), -torch.eye(N)])[None] / 2
    )
    assert loss(zero, CLEAN, Inputs(p=0.1)) == pytest.approx(bounds.ZERO, abs=8e-4)
    assert loss(half, CLEAN, Inputs(p=0.1)) == pytest.approx(bounds.HALF_LINEAR, abs=8e-4)
    assert loss(half_identity(N, M), CLEAN, Inputs(p=0.1)) == pytest.approx(bounds.naive(N, M), abs=8e-4)
    noisy = Target(mixing(), 0.02)
    assert loss(half_identity(N, M), noisy, Inputs(p=0.1)) == pytest.approx(bounds.naive(N, M, 0.02), abs=2.5e-3)
    assert bounds.naive(N, M, 0.05) == pytest.approx(0.1667, abs=1e-4)


@pytest.mark.parametrize(
    ("p", "b", "least"),
    [(1.0, 0.0194, 0.0531), (0.1, 0.0132, 0.0813), (0.01, 0.0032, 0.08328), (0.001, 0.0004, 0.08333)],
)
def test_the_best_offset_is_the_tables(p: float, b: float, least: float) -> None:
    assert bounds.best_offset(M, p) == pytest.approx(b, abs=6e-5)
    assert bounds.offset(N, M, p) == pytest.approx(least, abs=6e-5)
    if p >= 0.1:
        found = loss(half_identity(N, M, bounds.best_offset(M, p)), CLEAN, Inputs(p=p), 100_000)
        assert found == pytest.approx(bounds.offset(N, M, p), abs=8e-4)


def test_the_exact_single_active_loss_is_what_sampling_gives() -> None:
    weights, target = initial_weights(N, M, 0), Target(mixing(), 0.03)
    exact, found = single_active(weights, target)[0], sampled([(weights, target)], Inputs(mode="single"), seed=0)[0]
    assert exact.rows == exact.error == 0
    assert abs(found.value - exact.value) < 4 * found.error


def test_merged_evaluation_is_the_plain_mean() -> None:
    # the same rows, every one of them computed
    from thresher.toy.inputs import draw_rows, stream
    from thresher.toy.training import loss_of

    inputs, target = Inputs(p=0.02), Target(mixing(), 0.02)
    weights = initial_weights(N, M, 1)
    rows = round(2000 / inputs.filled)
    x = torch.from_numpy(draw_rows(inputs, rows, stream(5, "evaluation")))
    plain = loss_of(weights, x, target.mixing, target.scale)[0].double()
    found = sampled([(weights, target)], inputs, seed=5, samples=2000)[0]
    assert found.value == pytest.approx(float(plain.mean()) / 0.02, rel=1e-4)
    assert found.error == pytest.approx(float(plain.std(correction=0)) / rows**0.5 / 0.02, rel=1e-3)
    assert found.rows == rows


@pytest.mark.parametrize(
    ("symmetric", "expected"),
    [(True, {0.0: 0.0833, 0.01: 0.0717, 0.03: 0.0634}), (False, {0.0: 0.0833, 0.01: 0.0757, 0.03: 0.0753})],
)
def test_the_bound_of_drawn_mixings_is_the_tables(symmetric: bool, expected: dict[float, float]) -> None:
    for scale, value in expected.items():
        draws = [bounds.rank_bound(mixing(seed, symmetric=symmetric), scale, M) for seed in range(4)]
        assert sum(draws) / 4 == pytest.approx(value, abs=5e-4)


def test_the_analytic_bound_is_that_of_large_draws() -> None:
    for scale in (0.0, 0.01, 0.02, 0.03):
        drawn = bounds.rank_bound(mixing(symmetric=True), scale, M)
        assert bounds.symmetric_bound(N, scale) == pytest.approx(drawn, abs=1.2e-3)
    scale, least = bounds.best_symmetric(N)
    assert scale == pytest.approx(0.0283, abs=1e-4)
    assert least == pytest.approx(0.0633, abs=1e-4)


@pytest.mark.parametrize(("sign", "value"), [(1, 0.0630), (-1, 0.0647)])
def test_the_bound_of_the_residual_transpose_depends_on_its_sign(sign: int, value: float) -> None:
    found = bounds.rank_bound(mixing(kind="residual_transpose", scale=1.0, sign=sign), 1.0, M)
    assert found == pytest.approx(value, abs=5e-4)


def test_a_factored_transpose_sits_on_the_bound_and_the_untransposed_one_does_not() -> None:
    m_DD, scale = mixing(), 0.03
    target, bound = Target(m_DD, scale), bounds.rank_bound(m_DD, scale, M)
    correct, wrong = (semi_nmf(m_DD, scale, M, seed=0, orientation=o) for o in ("correct", "untransposed"))  # type: ignore[arg-type]
    found = single_active(correct, target)[0].value
    assert 1 <= found / bound <= 1.01
    assert found == pytest.approx(0.0754, abs=8e-4)
    assert single_active(wrong, target)[0].value == pytest.approx(0.0928, abs=2e-3)
    # it belongs to another M: pass the M that is meant
    assert single_active(correct, Target(mixing(1), scale))[0].value > found + 0.01


def test_an_svd_is_optimal_as_a_linear_map_and_oriented_like_the_model() -> None:
    m_DD, scale = mixing(), 0.02
    weights = svd(m_DD, scale, M, 1.0)
    wanted = torch.eye(N) + scale * m_DD
    left = (linear_map(weights)[0] - wanted).square().sum()
    assert left == pytest.approx(float(torch.linalg.svdvals(wanted)[M:].square().sum()), rel=1e-3)
    largest = weights.w_in[0].abs().argmax(0)
    assert (weights.w_in[0][largest, torch.arange(M)] > 0).all()


def test_modes_do_not_mix() -> None:
    single, sparse = ({"model": "one", **Loss(0.1, 0.0, mode, 0.01, 10).record()} for mode in ("single", "bernoulli"))
    assert line([sparse, sparse], "one") == [(0.01, 0.1)] * 2
    with pytest.raises(UserError, match="one mode"):
        line([single, sparse], "one")


def test_more_neurons_than_features_are_no_baseline() -> None:
    with pytest.raises(UserError, match=r"toy\.neurons is 3"):
        half_identity(2, 3)
