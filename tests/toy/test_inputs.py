"""Input rows: what they are, who draws them, and that merging them changes nothing."""

import numpy as np
import pytest
import torch

from thresher.cache.errors import UserError
from thresher.toy.inputs import STREAMS, Active, Inputs, batches, draw_active, draw_rows, merged, stream
from thresher.toy.labels import Labels
from thresher.toy.model import Weights, initial_weights
from thresher.toy.training import Fit, Task, autograd_gradients, gradients, mixed_rows, train


@pytest.mark.parametrize("inputs", [Inputs(p=0.02), Inputs(p=0.4), Inputs(p=1.0), Inputs(mode="single")])
def test_features_are_active_at_their_rate_and_uniform(inputs: Inputs) -> None:
    x = draw_rows(inputs, 20_000, stream(0, "evaluation"))
    active = x != 0
    assert active.mean() == pytest.approx(inputs.rate, rel=0.03)
    assert active.any(axis=1).mean() == pytest.approx(inputs.filled, abs=0.01)
    assert np.abs(x).max() <= 1
    assert (x[active] ** 2).mean() == pytest.approx(1 / 3, rel=0.03)
    assert x[active].mean() == pytest.approx(0, abs=0.02)


def test_rows_without_a_feature_are_kept() -> None:
    x = draw_rows(Inputs(p=0.01), 20_000, stream(0, "evaluation"))
    assert (x == 0).all(axis=1).mean() == pytest.approx(0.99**100, abs=0.01)


def test_equal_seeds_give_equal_bits_and_streams_differ() -> None:
    inputs = Inputs(p=0.1)
    first, again = (draw_active(inputs, 100, stream(3, "training")) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    draws = [stream(3, name).integers(1 << 60) for name in STREAMS]
    assert len({*draws, stream(4, "training").integers(1 << 60)}) == len(STREAMS) + 1


def test_no_global_generator_is_touched() -> None:
    numbers, tensors = np.random.get_state()[1].copy(), torch.get_rng_state()
    train([Fit(inputs=Inputs(p=0.1, features=6), labels=Labels(scale=0.1), neurons=3, steps=3, batch=8)])
    np.testing.assert_array_equal(np.random.get_state()[1], numbers)
    assert torch.equal(torch.get_rng_state(), tensors)


@pytest.mark.parametrize("p", [None, 0.05, 0.3])
def test_merged_rows_have_the_loss_and_the_gradient_of_all_rows(p: float | None) -> None:
    features, rows = 12, 400
    inputs = Inputs(mode="single", features=features) if p is None else Inputs(p=p, features=features)
    active = draw_active(inputs, rows, stream(1, "training"))
    plain = np.zeros((rows, features), np.float32)
    plain[active.row, active.column] = active.value
    x, few = torch.from_numpy(plain).double(), torch.from_numpy(merged(active, 1, rows, features)[0]).double()
    task = Task(
        torch.randn(1, features, features, generator=torch.Generator().manual_seed(0)).double(),
        (0,),
        torch.tensor([0.1]).double(),
    )
    weights = Weights(*(part.double() for part in initial_weights(features, 5, 0)))
    for found, wanted in zip(
        gradients(weights, few, rows, task, mixed_rows(task, few)),
        gradients(weights, x, rows, task, mixed_rows(task, x)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_batches_that_are_merged_together_stay_apart() -> None:
    active = Active(
        np.array([0, 1, 2, 2, 5]), np.array([1, 1, 0, 2, 1]), np.array([0.5, -0.5, 1, -1, 0.25], np.float32)
    )
    first, second = merged(active, 2, 3, 3)
    assert first.shape == (7, 3)  # a row for either sign of three features, and the one with two active
    np.testing.assert_allclose(first[[1, 4, 6]], [[0, 0.5, 0], [0, -0.5, 0], [1, 0, -1]])
    np.testing.assert_allclose(second[second.any(axis=1)], [[0, 0.25, 0]])


def test_merged_and_plain_batches_train_alike() -> None:
    # not the same draws, so the same distribution: the mean square of a batch
    inputs = Inputs(p=0.05, features=20)
    means = []
    for merge in (True, False):
        drawn = batches(inputs, 500, stream(2, "training"), merge=merge)
        sums = [float(batch.x.square().sum()) / batch.rows for _, batch in zip(range(40), drawn, strict=False)]
        means.append(np.mean(sums))
    assert means[0] == pytest.approx(means[1], rel=0.05)
    assert means[0] == pytest.approx(20 * 0.05 / 3, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"p": 0.0}, "inputs.p is 0.0"),  # no truth test: 0 is a value, and refused as one
        ({"p": None}, "inputs.p is None"),
        ({"p": 1.5}, "inputs.p is 1.5"),
        ({"mode": "single", "p": 0.1}, "expected none"),
        ({"p": 0.1, "features": 0}, "inputs.features is 0"),
    ],
)
def test_inputs_that_mean_nothing_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Inputs(**settings)  # type: ignore[arg-type]


def test_the_written_gradient_is_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = Weights(*(torch.randn(shape, generator=generator).double() for shape in ((4, 7, 3), (4, 3, 7))))
    mixing = torch.randn(2, 7, 7, generator=generator).double()
    task = Task(mixing, (0, 0, 1, 1), torch.tensor([0.3, -0.2, 0.1, 0.0]).double())
    x = torch.randn(9, 7, generator=generator).double()
    for found, wanted in zip(
        gradients(weights, x, 11, task, mixed_rows(task, x)), autograd_gradients(weights, x, 11, task), strict=True
    ):
        torch.testing.assert_close(found, wanted)
