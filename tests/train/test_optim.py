"""The update: rates, clipping, unit rows, and the guard against what is not finite."""

from typing import Any

import pytest
import torch

from thresher.cache.errors import UserError
from thresher.cache.records import from_dict
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build
from thresher.train.kernels.choice import Kernels
from thresher.train.losses import losses
from thresher.train.optim import Optimiser, base_rate, plain_step, rate_factor


def spec(kind: str = "sae", **settings: object) -> DictionarySpec:
    layers = 2 if kind == "clt" else 1
    base: dict[str, object] = {
        "kind": kind, "reads": ("a", "b")[:layers], "writes": ("a", "b")[:layers], "layers": (0, 1)[:layers],
        "d_in": 4, "d_out": 4, "n_latents": 6, "unit_norm": True, "firing": "topk", "k": 2,
    }  # fmt: skip
    return DictionarySpec(**(base | settings))  # type: ignore[arg-type]


def test_a_recipe_can_turn_clipping_off() -> None:
    assert from_dict(TrainConfig, {"clip": "none"}, "train").resolved_clip is None
    assert from_dict(TrainConfig, {"clip": "none", "optimiser": "signum"}, "train").resolved_clip is None
    assert TrainConfig().resolved_clip == 1.0
    with pytest.raises(UserError, match=r"train\.clip"):
        from_dict(TrainConfig, {"clip": "nothing"}, "train")


@pytest.mark.parametrize("kind", ["sae", "clt"])
@pytest.mark.parametrize("clip", ["none", 0.05, 100.0])
def test_the_step_equals_projection_clipping_adam_renormalisation_in_that_order(kind: str, clip: Any) -> None:
    fast, plain = build(spec(kind)), build(spec(kind))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    plain.load_state_dict(fast.state_dict())
    optimiser = Optimiser(fast, TrainConfig(clip=clip))
    adam = torch.optim.Adam(plain.parameters(), lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(4):
        for left, right in zip(fast.parameters(), plain.parameters(), strict=True):
            left.grad = torch.randn(left.shape, generator=rng)
            right.grad = left.grad.clone()
        optimiser.step(0.01, torch.tensor(True))
        plain_step(list(plain.parameters()), list(plain.W_dec), adam, None if clip == "none" else clip)
        for left, right in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(left, right)
    for weight in fast.W_dec:
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("kind", ["sae", "clt"])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"pre_bias": True},
        {"firing": "relu", "k": None, "sparsity": 0.5},  # its penalty holds the norm of free decoder rows
        {"firing": "jumprelu", "k": None, "sparsity": 0.5, "penalty": "tanh"},
        {"aux": 0.5, "aux_k": 2},
    ],
)
def test_steps_with_kernels_equal_steps_in_plain_formulas(kind: str, unit: bool, settings: dict[str, object]) -> None:
    if kind == "clt":
        settings = {name: value for name, value in settings.items() if name != "pre_bias"}
    one = spec(kind, unit_norm=unit, **settings)
    coders = []
    for forced in ("plain", "fast"):
        coder = build(one).double()
        coder.use(Kernels(forced))  # type: ignore[arg-type]
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in coder.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
        for source in range(len(one.reads)):
            coder.encoder(source).tokens_since_fired[:2] = one.dead_after  # two dead latents
        optimiser = Optimiser(coder, TrainConfig(clip=0.1))
        norms = []
        for _ in range(3):
            xs = [torch.randn(9, 4, generator=rng, dtype=torch.float64) for _ in one.reads]
            terms = losses(coder, coder(xs), xs, xs, [1.0] * len(xs), 1.0)
            terms.total.backward()
            norms.append(optimiser.step(0.01, terms.total.detach().isfinite()))
        coders.append((coder, norms))
    (plain, plain_norms), (fast, fast_norms) = coders
    assert "numba" in fast.kernels.described()
    assert all(names == ["plain"] for names in plain.kernels.used.values())
    torch.testing.assert_close(fast_norms, plain_norms)
    for left, right in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_a_gradient_along_the_row_does_not_move_it() -> None:
    coder = build(spec())
    with torch.no_grad():
        coder.W_dec[0].copy_(torch.nn.functional.normalize(torch.ones(6, 1, 4), dim=2))
    before = coder.W_dec[0].detach().clone()
    coder.W_dec[0].grad = before * 5
    Optimiser(coder, TrainConfig()).step(0.1, torch.tensor(True))
    torch.testing.assert_close(coder.W_dec[0].detach(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(value: float) -> None:
    coder = build(spec(unit_norm=False))
    optimiser = Optimiser(coder, TrainConfig())
    for parameter in coder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step(0.1, torch.tensor(True))
    weights = [parameter.detach().clone() for parameter in coder.parameters()]
    moments = {name: tensor.clone() for name, tensor in optimiser.moments().items()}
    for parameter in coder.parameters():
        parameter.grad = torch.ones_like(parameter)
    coder.encoder(0).b_enc.grad[0] = value
    assert not optimiser.step(0.1, torch.tensor(True)).isfinite()
    for parameter, before in zip(coder.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)
    for name, tensor in optimiser.moments().items():
        assert torch.equal(tensor, moments[name]), name


def test_the_automatic_rate_follows_the_number_of_latents() -> None:
    assert base_rate(TrainConfig(), spec(n_latents=4096)) == pytest.approx(4.0e-4)
    assert base_rate(TrainConfig(), spec(n_latents=24576)) == pytest.approx(1.633e-4, rel=1e-3)
    assert base_rate(TrainConfig(lr=3e-4), spec()) == 3e-4


def test_warm_up_rises_linearly_and_each_decay_ends_where_it_says() -> None:
    config = TrainConfig(warmup=10, decay="tail")
    factors = [rate_factor(config, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10:80] == [1.0] * 70
    assert factors[80:] == pytest.approx([(100 - i) / 20 for i in range(80, 100)])
    assert rate_factor(TrainConfig(warmup=0, decay="step"), 80, 100) == 0.1
    assert rate_factor(TrainConfig(warmup=0, decay="linear"), 25, 100) == 0.75
    assert rate_factor(TrainConfig(warmup=0, decay="none"), 99, 100) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5, "epochs": 1.0}, "one of epochs, rows and steps"),
        ({"lr": 0.0}, "train.lr"),
        ({"batch_rows": 0}, "train.batch_rows"),
        ({"beta2": 1.0}, "train.beta2"),
        ({"warmup": -1}, "train.warmup"),
    ],
)
def test_bad_training_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)  # type: ignore[arg-type]


def test_lengths_in_epochs_rows_and_steps_agree() -> None:
    assert TrainConfig(batch_rows=100).total_steps(950) == 10
    assert TrainConfig(batch_rows=100, epochs=2).total_steps(950) == 19
    assert TrainConfig(batch_rows=100, rows=1001).total_steps(950) == 11
    assert TrainConfig(batch_rows=100, steps=7).total_steps(950) == 7
