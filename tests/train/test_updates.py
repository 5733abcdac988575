"""The update rules against the equations written out once more, and what signum's average means for a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from rich.console import Console

from tests.train.conftest import RULES, plans_for, stop_at
from tests.train.test_exact import assert_same_end
from tests.train.test_optim import spec
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted, StopFlag
from thresher.cache.reader import CacheReader
from thresher.train.calibrate import held_out
from thresher.train.config import TrainConfig
from thresher.train.crew import Crew
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.topologies import build
from thresher.train.fit import Fit
from thresher.train.kernels.choice import Kernels
from thresher.train.losses import losses
from thresher.train.optim import RULES as UPDATES
from thresher.train.optim import Optimiser, base_rate, rate_factor
from thresher.train.run import train
from thresher.train.state import load_checkpoint

CPU = torch.device("cpu")
OPTIMISERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimiser": "adamw", "weight_decay": 0.3, "beta1": 0.0},
    "signum": {"optimiser": "signum", "momentum": 0.8},
    "muon": {"optimiser": "muon", "weight_decay": 0.3},
}


def _clipped(name: str, norm: float) -> dict[str, Any]:
    """Settings of an optimiser, with clipping where it has a use for it."""
    return OPTIMISERS[name] | ({} if name == "signum" else {"clip": norm})


class Reference:
    """One parameter under methods.md §5 in float64, NumPy alone; `sheets` are its matrices, none for a vector."""

    def __init__(self, weight: np.ndarray, matrix: bool, unit: bool) -> None:
        self.w, self.matrix, self.unit = weight, matrix, unit
        self.u, self.mean = weight.copy(), weight.copy()
        self.m, self.v, self.t = np.zeros_like(weight), np.zeros_like(weight), 0

    def project(self, g: np.ndarray) -> np.ndarray:
        if not self.unit:
            return g
        along = (g * self.w).reshape(len(g), -1).sum(1)
        return g - along.reshape(-1, *[1] * (g.ndim - 1)) * self.w

    def move(self, g: np.ndarray, rate: float, config: TrainConfig) -> None:
        self.t += 1
        if config.optimiser == "signum":
            self.u = self.u - rate * np.sign(g)
            self.mean = (1 - 1 / self.t) * self.mean + self.u / self.t
            self.u, self.mean = self.normed(self.u), self.normed(self.mean)
            self.w = self.normed(0.2 * self.u + 0.8 * self.mean)
        elif config.optimiser == "muon" and self.matrix:
            self.m = 0.95 * self.m + 0.05 * g
            self.w = self.w - rate * 0.3 * self.w - rate * _orthogonal(0.05 * g + 0.95 * self.m)
            self.w = self.normed(self.w)
        else:
            beta = config.beta1
            self.m, self.v = beta * self.m + (1 - beta) * g, 0.999 * self.v + 0.001 * g * g
            first, second = self.m / (1 - beta**self.t), self.v / (1 - 0.999**self.t)
            kept = 1 - rate * 0.3 if self.matrix and config.optimiser == "adamw" else 1
            self.w = self.normed(kept * self.w - rate * first / (np.sqrt(second) + 1e-8))

    def normed(self, w: np.ndarray) -> np.ndarray:
        if not self.unit:
            return w
        return w / np.sqrt((w * w).reshape(len(w), -1).sum(1)).reshape(-1, *[1] * (w.ndim - 1))


def _orthogonal(g: np.ndarray) -> np.ndarray:
    """0.2 √max(rows, columns) times five Newton–Schulz steps; [F, T, E] by destination."""
    if g.ndim == 3:
        return np.stack([_orthogonal(g[:, t]) for t in range(g.shape[1])], 1)
    X = g / np.linalg.norm(g)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
    return 0.2 * max(g.shape) ** 0.5 * X


def _random(coder: Coder, seed: int) -> torch.Generator:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype))
        for weight in coder.W_dec if coder.spec.unit_norm else ():
            weight.div_(weight.flatten(1).norm(dim=1)[:, None, None])
    return rng


@pytest.mark.parametrize("way", ["plain", "rows", "calls"])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_rule_is_its_equation(name: str, unit: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(**_clipped(name, 0.5))
    if way == "calls":  # as on CUDA, where nothing is read back
        monkeypatch.setattr(UPDATES[name], "own", ())
    coder = build(spec("clt", unit_norm=unit, firing="jumprelu", k=None, sparsity=0.1)).double()
    coder.use(Kernels("plain" if way == "plain" else "auto"))
    rng = _random(coder, 0)
    optimiser = Optimiser(coder, config)
    matrices = {p for p in coder.parameters() if p.dim() > 1} - {coder.b_dec}
    held = [
        Reference(p.detach().numpy().copy(), p in matrices, unit and any(p is w for w in coder.W_dec))
        for p in coder.parameters()
    ]
    bound = (
        1e-10 if way == "plain" or (way == "rows" and name != "muon") else 1e-6
    )  # torch's fused kernel takes its factor in float32
    for rate in (0.02, 0.05, 0.01, 0.03):
        for parameter in coder.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        grads = [h.project(p.grad.numpy().copy()) for h, p in zip(held, coder.parameters(), strict=True)]
        norm = np.sqrt(sum((g * g).sum() for g in grads))
        for reference, g in zip(held, grads, strict=True):
            reference.move(g * min(1.0, 0.5 / norm), rate, config)
        assert float(optimiser.step(rate, torch.tensor(True))) == pytest.approx(norm)
        for parameter, reference in zip(coder.parameters(), held, strict=True):
            np.testing.assert_allclose(parameter.detach().numpy(), reference.w, rtol=bound, atol=bound)
    assert ("numba" in coder.kernels.used["update"]) == (way == "rows" and name != "muon")
    with optimiser.averaged():
        for parameter, reference in zip(coder.parameters(), held, strict=True):
            expected = reference.mean if name == "signum" else reference.w
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("way", ["plain", "rows", "calls"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_update_left_out_changes_nothing(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "calls":
        monkeypatch.setattr(UPDATES[name], "own", ())
    coder = build(spec(unit_norm=True))
    coder.use(Kernels("plain" if way == "plain" else "auto"))
    _random(coder, 0)
    optimiser = Optimiser(coder, TrainConfig(**OPTIMISERS[name]))
    for bad in (0.0, float("nan")):
        before = [t.clone() for t in (*coder.parameters(), *optimiser.moments().values())]
        for parameter in coder.parameters():
            parameter.grad = torch.ones_like(parameter)
        coder.encoder(0).b_enc.grad[0] += bad
        norm = optimiser.step(0.1, torch.tensor(True))
    assert norm.isinf()
    assert all(map(torch.equal, (*coder.parameters(), *optimiser.moments().values()), before))


@pytest.mark.parametrize("name", ["signum", "muon"])
def test_on_a_device_too_an_update_left_out_changes_nothing(name: str) -> None:
    # `move` alone, which there runs in every case and is told by the norm.
    coder = build(spec(unit_norm=True)).double()
    _random(coder, 0)
    optimiser = Optimiser(coder, TrainConfig(**OPTIMISERS[name]))
    for norm in (1.0, float("inf")):
        before = [t.clone() for t in (*coder.parameters(), *optimiser.moments().values())]
        for parameter in coder.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 if norm == 1.0 else float("nan"))
        with torch.no_grad():
            optimiser.rule.move(0.1, torch.tensor(norm, dtype=torch.float64))
    assert all(map(torch.equal, (*coder.parameters(), *optimiser.moments().values()), before))


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps_with_kernels_equal_steps_in_plain_formulas(name: str, unit: bool) -> None:
    one = spec("clt", unit_norm=unit, firing="jumprelu", k=None, sparsity=0.5, penalty="tanh")
    ends = []
    for forced in ("plain", "fast"):
        coder = build(one).double()
        coder.use(Kernels(forced))  # type: ignore[arg-type]
        rng = _random(coder, 0)
        optimiser = Optimiser(coder, TrainConfig(**_clipped(name, 0.1)))
        for _ in range(3):
            xs = [torch.randn(9, 4, generator=rng, dtype=torch.float64) for _ in one.reads]
            terms = losses(coder, coder(xs), xs, xs, [1.0] * len(xs), 1.0)
            terms.total.backward()
            optimiser.step(0.01, terms.total.detach().isfinite())
        ends.append(list(coder.parameters()))
    for left, right in zip(*ends, strict=True):
        torch.testing.assert_close(left, right)


def _plans(cache: CacheReader, **train_settings: Any) -> list[Any]:
    return [
        plan
        for name, kind, rule in (("adamw", "clt", "topk"), ("signum", "sae", "batchtopk"), ("muon", "clt", "jumprelu"))
        for plan in plans_for(
            cache, f"{kind}-{name}", {"lr": "auto"} | train_settings | OPTIMISERS[name], kind=kind,
            layers=None if kind == "clt" else (1,), **RULES[rule],
        )
    ]  # fmt: skip


@pytest.mark.parametrize("kernels", ["plain", "fast"])
def test_resume_equals_uninterrupted_bit_for_bit_for_every_optimiser(
    cache: CacheReader, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    plans = _plans(cache, kernels=kernels, steps=12, checkpoint_every=5)
    train(plans, cache, out=tmp_path / "whole", device="cpu", console=console)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted):
            train(plans, cache, out=tmp_path / "parts", device="cpu", console=console)
    train(plans, cache, out=tmp_path / "parts", device="cpu", resume=True, console=console)
    assert_same_end(plans, tmp_path / "whole", tmp_path / "parts")


def test_signum_evaluates_saves_and_calibrates_its_average_and_trains_on_from_where_it_was(
    cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    # Fault 10: an average of unit rows that is saved as it comes has rows shorter than 1.
    settings = {"steps": 30, "optimiser": "signum", "lr": 0.02, "log_every": 5}
    (plan,) = plans_for(cache, "signum", settings, kind="sae", layers=(1,), normalise="none", **RULES["batchtopk"])
    (result,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
    saved = safetensors.torch.load_file(result.path / "weights.safetensors")
    checkpoint = load_checkpoint(result.path)
    assert checkpoint is not None
    index = [name for name, _ in build(plan.spec).named_parameters()].index("W_dec.0")
    mean, u, v = (
        checkpoint.tensors[key] for key in ("model.W_dec.0", f"optimiser.{index}.u", f"optimiser.{index}.mean")
    )
    assert torch.equal(saved["W_dec.0"], mean)
    for rows in (mean, u, v):
        torch.testing.assert_close(rows.flatten(1).norm(dim=1), torch.ones(64))
    assert not torch.allclose(mean, v, atol=1e-3)
    assert not torch.allclose(mean, u, atol=1e-2)

    fit = Fit(plan, cache, CPU)
    fit.load(checkpoint)
    assert torch.equal(fit.coder.W_dec[0].detach(), v)
    deployed = fit.deployed()
    assert torch.equal(deployed.W_dec[0], mean)
    assert torch.equal(fit.coder.W_dec[0].detach(), v)
    deployed.encoder(0).rule.threshold.copy_(saved["threshold.0"])  # type: ignore[union-attr]
    with Crew(CPU) as crew:
        (again,) = held_out([deployed], cache, plan.train.heldout_rows, CPU, crew, StopFlag())
    assert again is not None
    assert again.fvu == result.metrics["held_out"]["fvu"]
    assert again.l0 == result.metrics["held_out"]["l0"] == [pytest.approx(2.5, rel=0.2)]


@pytest.mark.parametrize("name", ["signum", "muon"])
def test_every_optimiser_learns_at_its_own_rate(
    name: str, cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    settings = {"steps": 120, "optimiser": name, "lr": "auto", "warmup": "auto"}
    (plan,) = plans_for(cache, name, settings, kind="sae", layers=(1,), normalise="per_dim", **RULES["topk"])
    (result,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
    assert result.metrics["held_out"]["fvu"][0] < 0.55


@pytest.mark.parametrize("micro_rows", [None, 100])
def test_schedules_count_optimiser_steps_and_not_their_parts(
    micro_rows: int | None, cache: CacheReader, tmp_path: Path, console: Console
) -> None:  # fault 8
    settings = {"steps": 10, "lr": 1.0, "warmup": 4, "decay": "linear", "log_every": 1, "micro_rows": micro_rows}
    (plan,) = plans_for(cache, "rates", settings, kind="sae", layers=(0,), **RULES["topk"])
    (result,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    expected = [min(1.0, (step + 1) / 4) * (1 - step / 10) for step in range(10)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    assert result.metrics["rows"] == 2560


@pytest.mark.parametrize(
    ("name", "n_latents", "rate"),
    [
        ("adam", 4096, 4.0e-4),
        ("adam", 12288, 2.3e-4),
        ("adamw", 24576, 1.6e-4),
        ("signum", 24576, 4.08e-3),
        ("signum", 16384, 5e-3),
        ("muon", 4096, 2e-3),
        ("muon", 24576, 2e-3),
    ],
)
def test_automatic_rates_are_the_published_ones(name: str, n_latents: int, rate: float) -> None:
    config = TrainConfig(optimiser=name)  # type: ignore[arg-type]
    assert base_rate(config, spec(n_latents=n_latents)) == pytest.approx(rate, rel=0.025)
    assert f"{base_rate(config, spec(n_latents=n_latents)):.1e}" == f"{rate:.1e}"


def test_signum_has_no_schedule_unless_asked() -> None:
    assert [rate_factor(TrainConfig(optimiser="signum"), step, 100) for step in (0, 50, 99)] == [1.0] * 3
    asked = TrainConfig(optimiser="signum", warmup=10, decay="step")
    assert [rate_factor(asked, step, 100) for step in (0, 50, 80)] == [0.1, 1.0, 0.1]
    assert rate_factor(TrainConfig(), 0, 1000) == 0.01
    assert rate_factor(TrainConfig(), 900, 1000) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": 0.1}, "train.weight_decay is 0.1 with optimiser = 'adam', which has none.*adamw or muon"),
        ({"momentum": 0.9, "optimiser": "adamw"}, "train.momentum is 0.9.*signum or muon"),
        ({"momentum": 1.0, "optimiser": "muon"}, "train.momentum is 1.0; expected 0 ≤ value < 1"),
        (
            {"beta1": 0.0, "optimiser": "signum"},
            "train.beta1 is 0.0.*'signum'.*signs of gradients alone",
        ),
        ({"clip": 0.5, "optimiser": "signum"}, "train.clip is 0.5 with optimiser = 'signum'"),
        ({"weight_decay": -1.0, "optimiser": "muon"}, "train.weight_decay is -1.0; expected 0 or more"),
    ],
)
def test_settings_that_a_rule_does_not_have_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize("name", ["adam", *OPTIMISERS])
def test_rows_set_anew_forget_their_past(name: str) -> None:
    coder = build(spec(unit_norm=False)).double()
    rng = _random(coder, 0)
    optimiser, weight = Optimiser(coder, TrainConfig(optimiser=name)), coder.encoder(0).W_enc  # type: ignore[arg-type]
    for parameter in coder.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    optimiser.step(0.1, torch.tensor(True))
    with torch.no_grad():
        weight[2] = 7.0
    optimiser.restart(weight, torch.tensor([2]))
    with optimiser.averaged():
        assert (weight[2] == 7.0).all()
        assert not (weight[1] == 7.0).any()
    for key, tensor in optimiser.rule.state[weight].items():
        assert key == "step" or (tensor[2] == (7.0 if name == "signum" else 0.0)).all()
