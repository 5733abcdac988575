"""The mixing matrix: options keep rank, symmetry and root mean square; the seed alone decides it."""

import pytest
import torch

from thresher.cache.errors import UserError
from thresher.toy.inputs import Inputs
from thresher.toy.labels import Labels, effective_rank, label_rows, mixing_matrix
from thresher.toy.measure import Target, sampled
from thresher.toy.model import initial_weights
from thresher.toy.training import Fit, train

N, M = 100, 50


def matrix(seed: int = 0, **settings: object) -> torch.Tensor:
    return mixing_matrix(Labels(**settings), N, M, seed)  # type: ignore[arg-type]


def rank(mixing: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(mixing.double(), rtol=1e-5))


OPTIONS = [
    {},
    {"symmetric": True},
    {"zero_diagonal": True},
    {"rank": 10},
    {"rank": 10, "flat_spectrum": True},
    {"rank": 10, "normalise_rows": True},
    {"rank": 10, "align_to_neurons": True},
    {"rank": 10, "align_to_neurons": True, "normalise_rows": True},
    {"rank": 10, "symmetric": True},
    {"rank": 10, "symmetric": True, "flat_spectrum": True},
    {"rank": 10, "tied_factors": True, "zero_diagonal": True},
]


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_options_keep_rank_symmetry_and_root_mean_square(settings: dict[str, object]) -> None:
    mixing = matrix(**settings)
    rms = torch.stack([matrix(seed, **settings).square().mean() for seed in range(5)]).mean().sqrt()
    assert rms == pytest.approx(1, abs=0.06)
    assert torch.equal(mixing, mixing.T) == bool(settings.get("symmetric") or settings.get("tied_factors"))
    if "rank" in settings and not settings.get("zero_diagonal"):
        assert rank(mixing) == settings["rank"]
    if settings.get("zero_diagonal"):
        assert not mixing.diagonal().any()
    if settings.get("flat_spectrum"):
        values = torch.linalg.svdvals(mixing)[:10]
        torch.testing.assert_close(values, values[:1].expand(10), rtol=1e-4, atol=0)
    if settings.get("align_to_neurons"):
        assert not mixing[M:].any()
        assert not mixing[:, M:].any()


def test_low_ranks_are_normalised_to_the_scale_of_high_ones() -> None:
    # sweeps compared σ across ranks whose entries had a variance of the rank
    plain = matrix(rank=50, normalise="none")
    torch.testing.assert_close(plain, matrix(rank=50) * 50**0.5)
    assert plain.square().mean().sqrt() == pytest.approx(50**0.5, rel=0.1)


def test_copying_a_triangle_would_destroy_the_rank() -> None:
    mixing = matrix(rank=10, flat_spectrum=True)
    copied = torch.triu(mixing) + torch.triu(mixing, 1).T
    assert rank(copied) == 100
    assert effective_rank(copied) == pytest.approx(55, abs=6)
    assert effective_rank(matrix(rank=10, flat_spectrum=True, symmetric=True)) == pytest.approx(10, abs=0.01)


def test_a_zero_diagonal_raises_the_effective_rank() -> None:
    assert effective_rank(matrix(rank=9)) < 10
    assert effective_rank(matrix(rank=9, zero_diagonal=True)) > 15


def test_the_residual_transpose_is_symmetric_without_diagonal_and_takes_a_sign() -> None:
    plus, minus = (matrix(kind="residual_transpose", scale=1.0, sign=sign) for sign in (1, -1))
    torch.testing.assert_close(plus, plus.T)
    assert plus.diagonal().abs().max() < 1e-6
    assert plus[~torch.eye(N, dtype=torch.bool)].std() == pytest.approx(0.0316, abs=0.001)
    assert torch.equal(minus, -plus)
    low, high = torch.linalg.eigvalsh(plus)[[0, -1]].tolist()
    assert low == pytest.approx(-0.52, abs=0.03)
    assert high == pytest.approx(0.70, abs=0.05)


def test_two_constructions_are_equal_and_the_inputs_have_no_say() -> None:
    fits = [
        Fit(inputs=inputs, labels=Labels(scale=0.1), seed=7)
        for inputs in (Inputs(p=0.01), Inputs(p=0.5), Inputs(mode="single"))
    ]
    assert torch.equal(fits[0].matrix, fits[1].matrix)
    assert torch.equal(fits[0].matrix, fits[2].matrix)
    assert not torch.equal(fits[0].matrix, mixing_matrix(Labels(scale=0.1), N, M, 8))


def test_measuring_does_not_move_training() -> None:
    fit = Fit(inputs=Inputs(p=0.1, features=8), labels=Labels(scale=0.1), neurons=4, steps=5, batch=16)
    before = train([fit])[0]
    target = Target(fit.matrix, 0.1)
    first = sampled([(before.weights, target)], fit.inputs, seed=0, samples=500)
    assert first == sampled([(before.weights, target)], fit.inputs, seed=0, samples=500)
    after = train([fit])[0]
    assert torch.equal(before.weights.w_in, after.weights.w_in)


def test_row_i_of_the_mixing_is_output_i() -> None:
    mixing = torch.zeros(3, 3)
    mixing[2, 0] = 5.0
    torch.testing.assert_close(
        label_rows(torch.tensor([[1.0, -1.0, 0.0]]), mixing, 0.1), torch.tensor([[1.0, 0.0, 0.5]])
    )


def test_a_learned_scale_gets_its_gradient_through_the_labels_and_others_stay() -> None:
    inputs = Inputs(p=0.1, features=20)
    kinds = [
        Labels(scale=0.01, learn_scale=True),
        Labels(scale=0.02),
        Labels(kind="residual_transpose", scale=0.5, learn_scale=True),
    ]
    models = train([Fit(inputs=inputs, labels=each, neurons=10, steps=150, batch=128, lr=1e-2) for each in kinds])
    assert models[0].scale > 0.012
    assert models[1].scale == pytest.approx(0.02)
    assert models[2].scale != 0.5


def test_models_trained_together_are_those_trained_alone() -> None:
    inputs = Inputs(p=0.05, features=12)
    kinds = [Labels(scale=0.1), Labels(kind="clean"), Labels(scale=0.1, symmetric=True), Labels(scale=0.3)]
    fits = [Fit(inputs=inputs, labels=each, neurons=5, steps=20, batch=64) for each in kinds]
    together = train(fits)
    for fit, one in zip(fits, together, strict=True):
        alone = train([fit])[0]
        torch.testing.assert_close(one.weights.w_out, alone.weights.w_out, rtol=1e-4, atol=1e-6)
        assert torch.equal(initial_weights(12, 5, 0).w_in, initial_weights(12, 5, fit.seed).w_in)


def test_models_that_share_no_rows_are_not_trained_together() -> None:
    fits = [Fit(inputs=Inputs(p=p), labels=Labels()) for p in (0.1, 0.2)]
    with pytest.raises(UserError, match=r"toy\.inputs"):
        train(fits)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"flat_spectrum": True}, "needs labels.rank"),
        ({"rank": 5, "flat_spectrum": True, "normalise_rows": True}, "excludes"),
        ({"rank": 0}, "labels.rank is 0"),
        ({"kind": "clean", "scale": 0.1}, "no mixing to scale"),
    ],
)
def test_labels_that_contradict_themselves_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Labels(**settings)  # type: ignore[arg-type]


def test_no_more_orthogonal_columns_than_features() -> None:
    with pytest.raises(UserError, match="at most 100"):
        matrix(rank=101, flat_spectrum=True)
