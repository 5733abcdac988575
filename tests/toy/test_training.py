"""Training reaches what theory allows (toy.md §9): n = 20, m = 10, single-active inputs, three models in one call."""

import pytest
import torch

from thresher.toy.bounds import rank_bound
from thresher.toy.inputs import Inputs
from thresher.toy.labels import Labels
from thresher.toy.measure import Target, single_active
from thresher.toy.training import Fit, train


def test_trained_models_reach_the_bound_and_no_model_beats_naive_on_clean_labels() -> None:
    inputs = Inputs(mode="single", features=20)
    kinds = [Labels(kind="clean"), Labels(scale=0.063, symmetric=True), Labels(scale=0.045)]
    fits = [Fit(inputs=inputs, labels=each, neurons=10, steps=3000, batch=1024) for each in kinds]
    clean, symmetric, asymmetric = train(fits)
    losses = [
        single_active(one.weights, Target(one.fit.matrix, one.scale))[0].value for one in (clean, symmetric, asymmetric)
    ]
    assert losses[0] == pytest.approx(1 / 12, abs=3e-4)
    for one, loss in zip((symmetric, asymmetric), losses[1:], strict=True):
        assert 0.98 <= loss / rank_bound(one.fit.matrix, one.scale, 10) <= 1.05


def test_everything_lies_on_the_device_of_the_rows() -> None:
    fit = Fit(inputs=Inputs(p=0.1, features=6), labels=Labels(scale=0.1), neurons=3, steps=2, batch=8)
    one = train([fit])[0]
    assert {tensor.device for tensor in (*one.weights, one.losses, fit.matrix)} == {torch.device("cpu")}
    with torch.device("meta"):  # a default device elsewhere moves nothing
        assert fit.matrix.device == torch.device("cpu")
