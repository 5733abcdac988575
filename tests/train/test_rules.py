"""What single firing rules promise: schedules, controllers, pools, exact frozen forms, thresholds found afterwards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.train.conftest import plans_for
from tests.train.test_dictionary import spec, trained
from tests.train.test_losses import LATENTS, RULES, N, batch, make, reference
from thresher.cache.errors import UserError
from thresher.cache.interrupts import StopFlag
from thresher.cache.reader import CacheReader
from thresher.train.calibrate import passes
from thresher.train.dictionary.fold import deploy
from thresher.train.dictionary.rules import BatchTopK, Global, GroupMax, JumpReLU, TopK
from thresher.train.dictionary.rules.base import seen
from thresher.train.dictionary.topologies import build
from thresher.train.files import load_run
from thresher.train.fit import Fit
from thresher.train.kernels import firing, padded
from thresher.train.kernels.choice import Kernels
from thresher.train.losses import losses, residuals
from thresher.train.run import train
from thresher.train.state import load_checkpoint
from thresher.train.views import Inputs, Views

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def fit(cache: CacheReader, **settings: Any) -> tuple[Fit, Inputs]:
    """A dictionary at its start and a batch for it."""
    (plan, *_) = plans_for(cache, "r", **settings)
    made = Fit(plan, cache, torch.device("cpu"))
    made.start(cache)
    rows = np.arange(256)
    acts = {site: cache.gather("train", site, rows) for site in (*plan.spec.reads, *plan.spec.writes)}
    return made, made.inputs(Views(acts))


def normal(spread: float, count: int = 200_001) -> Tensor:
    """Quantiles of a normal distribution in place of a sample, so that means are integrals."""
    ranks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return spread * 2**0.5 * torch.erfinv(2 * ranks - 1)


# JumpReLU.


@pytest.mark.parametrize("unit", ["spread", "raw"])
@pytest.mark.parametrize("theta", [0.5, 1.2])
def test_the_gradient_of_the_mean_gate_is_minus_threshold_times_density(theta: float, unit: str) -> None:
    coder = build(spec("transcoder", firing="jumprelu", k=None, sparsity=1.0, theta=theta, bandwidth=0.05,
                       theta_unit=unit)).double()  # fmt: skip
    rule = coder.encoder(0).rule
    assert isinstance(rule, JumpReLU)
    rule.start(3.0)
    scale = 3.0 if unit == "spread" else 1.0
    a = normal(3.0)[:, None].expand(-1, rule.width)
    _, gate = rule.fire(a, None, coder.encoder(0).b_enc)
    assert gate is not None
    gate.mean(0).sum().backward()
    threshold = theta * scale
    density = torch.distributions.Normal(0.0, 3.0).log_prob(torch.tensor(threshold)).exp().item()
    assert rule.log_theta.grad is not None
    torch.testing.assert_close(
        rule.log_theta.grad, torch.full_like(rule.log_theta, -threshold * density), rtol=5e-3, atol=0.0
    )
    assert rule.window.item() == pytest.approx(0.05 * scale)


@pytest.mark.parametrize(("weight_z", "weight_gate"), [(1.0, 0.0), (0.0, 1.0)])
def test_gradients_to_log_theta_are_those_of_the_table(weight_z: float, weight_gate: float) -> None:
    a = torch.tensor([[0.2], [0.9], [1.05], [1.4]], dtype=torch.float64, requires_grad=True)
    tau = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    z, gate = firing.jump_relu(a, tau.exp() * 1.0, torch.tensor(0.5, dtype=torch.float64), None)
    (weight_z * z + weight_gate * gate).sum().backward()
    inside = 2  # 0.9 and 1.05 lie within ε/2 of θ = 1
    assert tau.grad is not None
    assert tau.grad.item() == pytest.approx(-inside * (1.0 / 0.5))  # θ²/ε and θ/ε
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)[:, None] * weight_z
    torch.testing.assert_close(a.grad if a.grad is not None else torch.zeros_like(a), expected)


# Counts that come down.


def test_k_comes_down_in_a_straight_line_and_is_a_function_of_the_step_alone(cache: CacheReader) -> None:
    made, given = fit(cache, kind="sae", firing="batchtopk", k=2.0, k_anneal=4, k_start=6.0, aux=0.0)
    seen = []
    for _ in range(6):
        made.step(given, 256)
        seen.append(made.coder(given.xs).fired[0].z.shape[0] / 256)
    assert seen == [6.0, 5.0, 4.0, 3.0, 2.0, 2.0]
    later, _ = fit(cache, kind="sae", firing="batchtopk", k=2.0, k_anneal=4, k_start=6.0, aux=0.0)
    later.coder.at(3)
    assert later.coder.encoder(0).rule.k == 3.0


def test_annealed_counts_suit_each_rule() -> None:
    top = TopK(spec("sae", firing="topk", k=3, k_anneal=10))
    group = GroupMax(spec("sae", firing="groupmax", k=4, k_anneal=10))
    joint = BatchTopK(spec("clt", firing="batchtopk", k=1.5, k_anneal=10, k_start=11.5, pool="joint"))
    counts = []
    for step in (0, 3, 5, 10, 99):
        for rule in (top, group, joint):
            rule.at(step)
        counts.append((top.k, group.k, joint.budget(10)))
    # of 20 latents read from 6 dimensions: from 20 down; groups are as many as divide 20; three layers share
    assert counts == [(20, 20, 345), (15, 20, 255), (12, 20, 195), (3, 4, 45), (3, 4, 45)]


@pytest.mark.parametrize("settings", [{"k_start": 2}, {"k_start": 21}, {"k_anneal": -1}])
def test_a_schedule_that_does_not_come_down_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"k_start|k_anneal"):
        spec("sae", **({"firing": "topk", "k": 3, "k_anneal": 5} | settings))


def test_a_run_that_would_end_before_k_has_come_down_is_refused(cache: CacheReader) -> None:
    settings: dict[str, Any] = {"kind": "sae", "firing": "topk", "k": 2, "k_anneal": 30}
    fit(cache, train_settings={"steps": 30}, **settings)
    with pytest.raises(UserError, match=r"k_anneal is 30, but the run has 29 steps"):
        fit(cache, train_settings={"steps": 29}, **settings)


def test_a_run_that_would_end_before_its_penalty_has_come_up_is_refused(cache: CacheReader) -> None:
    settings: dict[str, Any] = {"kind": "sae", "firing": "relu", "sparsity": 0.1, "penalty_warmup": 3}
    made, given = fit(cache, train_settings={"steps": 3}, **settings)
    ramps = [made.ramp]
    for _ in range(2):
        made.step(given, 256)
        ramps.append(made.ramp)
    assert ramps == [1 / 3, 2 / 3, 1.0]
    with pytest.raises(UserError, match=r"penalty_warmup is 3, but the run has 2 steps"):
        fit(cache, train_settings={"steps": 2}, **settings)
    fit(cache, train_settings={"steps": 2}, **settings | {"penalty_warmup": "run"})


# GroupMax.


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 24])
def test_groupmax_takes_the_largest_of_every_group(groups: int, device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a_NF = torch.randn(9, 24, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    if device:
        monkeypatch.setattr(firing, "fixed_capacity", lambda a, kernels: padded)
    got = firing.select_groupmax(a_NF, groups)
    plain = firing.select_groupmax(a_NF, groups, Kernels("plain"))
    assert torch.equal(got.latents, plain.latents)
    assert torch.equal(got.offsets, plain.offsets)
    assert torch.equal(got.take(a_NF).view(9, groups), a_NF.view(9, groups, -1).amax(2))


# The controller.


def test_the_controller_starts_as_batchtopk_and_then_moves_against_the_excess() -> None:
    rule = Global(spec("sae", firing="global", k=2, aux_k=5))
    a_NF = torch.tensor([[3.0, 1.0, 2.0, -1.0] + [0.0] * 16, [0.5, 4.0, 0.1, -2.0] + [0.0] * 16])
    first = rule.select(a_NF)
    assert first is not None
    kept = first.take(a_NF)
    assert sorted(kept.tolist()) == [1.0, 2.0, 3.0, 4.0]
    rule.observe(seen(kept, 2))
    assert (rule.threshold.item(), rule.aux_threshold.item()) == (1.0, pytest.approx(0.01))
    rule.at(1)
    second = rule.select(a_NF)
    assert second is not None
    z, _ = rule.fire(second.take(a_NF), second, torch.zeros(20))
    assert sorted(z.tolist()) == [2.0, 3.0, 4.0]
    rule.observe(seen(z, 2, torch.tensor(50)))  # L0 1.5 of 2, and 25 of 5
    assert rule.threshold.item() == pytest.approx(1.0 / 1.0005)
    assert rule.aux_threshold.item() == pytest.approx(0.01 * 1.02)
    rule.observe(seen(torch.ones(2000), 2))  # 998 too many: the step is capped, and without dead latents θ_aux stays
    assert rule.threshold.item() == pytest.approx(1.1 / 1.0005)
    assert rule.aux_threshold.item() == pytest.approx(0.01 * 1.02)
    for _ in range(200):
        rule.observe(seen(torch.zeros(2), 2, torch.tensor(0)))
    assert rule.aux_threshold.item() == pytest.approx(0.0102 / 1.005**200)
    rule.aux_threshold.fill_(1e-6)
    rule.observe(seen(torch.zeros(2), 2, torch.tensor(0)))
    assert rule.aux_threshold.item() == 1e-6


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("micro_rows", [None, 100])
def test_a_step_moves_both_thresholds_by_the_counts_of_its_whole_batch(
    cache: CacheReader, micro_rows: int | None, kernels: str
) -> None:
    way = {"micro_rows": micro_rows, "kernels": kernels}
    made, given = fit(cache, train_settings=way, kind="sae", firing="global", k=4, aux_k=3)
    encoder = made.coder.encoder(0)
    rule = encoder.rule
    made.step(given, 256)
    theta, aux = rule.threshold.item(), rule.aux_threshold.item()
    assert aux == pytest.approx(0.01 * theta)
    encoder.tokens_since_fired[::2] = 10**6
    a_NF = encoder.preactivations(given.xs[0], made.coder.bias(0))
    excess, woken = (a_NF > theta).sum().item() / 256 - 4, (a_NF[:, ::2] > aux).sum().item() / 256 - 3
    made.step(given, 256)
    for value, before, over in ((rule.threshold, theta, excess), (rule.aux_threshold, aux, woken)):
        factor = 1 + 1e-3 * abs(over)
        assert abs(over) > 0.001
        assert value.item() == pytest.approx(before * factor if over > 0 else before / factor)


# Gated.


@pytest.mark.parametrize("kind", ["sae", "transcoder", "clt"])
def test_a_gated_dictionary_freezes_exactly_to_constant_thresholds(kind: str) -> None:
    settings = spec(kind, firing="gated", k=None, sparsity=1.0, pre_bias=kind == "sae", normalise="none")
    coder, raw, reads, writes = trained(settings)
    folded = deploy(coder, reads, writes, dtype=torch.float64)
    for source, x_ND in enumerate(raw):
        encoder = coder.encoder(source)
        shifted = x_ND - coder.b_dec[source] if kind == "sae" else x_ND
        pi = shifted @ encoder.W_enc.T
        magnitude = encoder.rule.r.exp() * pi + encoder.rule.b_mag
        expected = (pi + encoder.b_enc > 0) * magnitude.clamp_min(0)
        assert bool(((pi + encoder.b_enc > 0) & (magnitude <= 0)).any())  # a gate may open on nothing
        for codes in (folded.encode(source, x_ND), coder.encode(source, x_ND)):
            torch.testing.assert_close(codes.dense(), expected.detach())
        fired = coder([*raw])
        assert fired.fired[source].z.sum().item() == pytest.approx(expected.sum().item())
        theta = (encoder.rule.b_mag - encoder.rule.r.exp() * encoder.b_enc).clamp_min(0)
        torch.testing.assert_close(folded.encoder(source).rule.thresholds(), theta.detach())


def test_gates_teach_no_decoder_by_their_own_reconstruction() -> None:
    coder = make("clt", **RULES["gated"])
    xs, ys = batch(coder)
    done = coder(xs)
    own = coder.encoder(0).rule.terms(coder, done, residuals(coder, done, ys), [1.0] * 3)
    assert own is not None
    own.backward()
    assert coder.b_dec.grad is None
    assert all(weight.grad is None for weight in coder.W_dec)
    assert coder.encoder(0).rule.r.grad is None
    assert coder.encoder(0).W_enc.grad is not None


def test_magnitudes_start_as_what_gates_see(cache: CacheReader) -> None:
    made, given = fit(cache, kind="transcoder", firing="gated", sparsity=1e-3)
    fired = made.coder(given.xs).fired[0]
    torch.testing.assert_close(fired.z, fired.a.relu())


# Pools and norms.


def test_a_joint_pool_spends_what_it_has_where_it_is_wanted() -> None:
    coder = make("clt", firing="batchtopk", k=2.5, pool="joint")
    with torch.no_grad():
        coder.encoder(1).b_enc.add_(50.0)
    xs, _ = batch(coder)
    counts = [part.z.shape[0] for part in coder(xs).fired]
    assert counts == [0, int(2.5 * N * 3), 0]


def test_ranking_by_norm_leaves_codes_and_makes_scale_meaningless() -> None:
    """A latent whose encoder is halved and whose decoder is doubled says the same, and is chosen as before."""
    coder = make("transcoder", aux=0.0, firing="batchtopk", k=2.5, rank_by="norm")
    xs, _ = batch(coder)
    before = coder(xs)
    with torch.no_grad():
        for tensor, factor in ((coder.encoder(0).W_enc, 0.5), (coder.encoder(0).b_enc, 0.5), (coder.W_dec[0], 2.0)):
            tensor[::2] *= factor
    after = coder(xs)
    assert before.fired[0].selection is not None
    assert after.fired[0].selection is not None
    assert torch.equal(after.fired[0].selection.latents, before.fired[0].selection.latents)
    torch.testing.assert_close(after.y, before.y)


def test_a_latent_without_decoder_is_never_chosen_by_norm() -> None:
    for rule in ("batchtopk norm", "topk norm"):
        coder = make("transcoder", **RULES[rule])
        with torch.no_grad():
            coder.W_dec[0][:3] = 0.0
            coder.encoder(0).b_enc[:3] += 100.0
        xs, _ = batch(coder)
        coder.encoder(0).observe(coder(xs).fired[0])
        codes = coder.encode(0, xs[0])
        assert codes.latents[codes.values > 0].min() >= 3


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "clt", "firing": "batchtopk", "k": 2.5},
        {"kind": "clt", "firing": "batchtopk", "k": 2.5, "pool": "joint", "rank_by": "norm", "normalise": "per_dim"},
        {"kind": "sae", "firing": "batchtopk", "k": 2.5, "rank_by": "norm", "decoder": "free"},
        {"kind": "sae", "firing": "global", "k": 2.5},
    ],
    ids=lambda s: " ".join(str(value) for value in s.values()),
)
def test_calibrated_thresholds_let_k_per_token_through(
    settings: dict[str, Any], cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    (plan, *_) = plans_for(cache, "c", {"steps": 12, "calibrate_rows": 4096}, **settings)
    (run,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
    coder = load_run(run.path).dictionary
    (acts,) = passes(cache, "train", coder.reads, 4096, torch.device("cpu"), StopFlag())
    active = [int((coder.encode(i, acts[site]).values > 0).sum()) for i, site in enumerate(coder.reads)]
    wanted = int(2.5 * 4096) - 1  # the value of that rank is the threshold, and does not exceed itself
    if settings.get("pool") == "joint":
        assert sum(active) == pytest.approx(2 * wanted, abs=3)
        assert max(active) > 1.02 * min(active)
    else:
        assert active == pytest.approx([wanted] * len(active), abs=2)


def test_ranked_count_rules_serve_what_they_trained_and_carry_their_norms(
    cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    for rule in ("topk", "groupmax"):
        (plan, *_) = plans_for(
            cache, rule, {"steps": 5}, kind="transcoder", firing=rule, k=4, rank_by="norm", normalise="per_dim"
        )
        (run,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
        again = load_run(run.path).dictionary
        made = Fit(plan, cache, torch.device("cpu"))
        checkpoint = load_checkpoint(run.path)
        assert checkpoint is not None
        made.load(checkpoint)
        raw = cache.gather("train", plan.spec.reads[0], np.arange(64)).float()
        codes, served = made.coder.encode(0, made.reads[0].apply(raw)), again.encode(0, raw)
        torch.testing.assert_close(served.dense(), codes.dense(), rtol=1e-4, atol=1e-5)
        assert again.encoder(0).norms is not None
        assert not torch.equal(again.encoder(0).norms, torch.ones(64))


# What is refused, and what is said.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"firing": "groupmax", "k": 3}, "do not part into 3 groups"),
        ({"firing": "groupmax", "k": 2.5}, "whole number"),
        ({"firing": "relu", "k": None, "sparsity": 1.0, "pool": "joint"}, "no use for it; expected batchtopk"),
        ({"firing": "jumprelu", "k": None, "sparsity": 1.0, "rank_by": "norm"}, "no use for it"),
        ({"firing": "gated", "k": None, "sparsity": 1.0, "k_anneal": 5}, "no use for it"),
        ({"firing": "gated", "k": None}, "nothing would make its codes sparse"),
        ({"firing": "batchtopk", "k": 2.5, "pool": "joint"}, "one source for each dictionary"),
        ({"firing": "global", "k": 2.5, "theta_unit": "raw"}, "expected jumprelu"),
        ({"firing": "jumprelu", "k": None, "sparsity": 1.0, "theta_unit": "raw"}, "theta is missing"),
    ],
)
def test_settings_that_a_rule_cannot_use_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec("transcoder", **settings)


# Together with other parts of the objective.


@pytest.mark.parametrize("rule", ["groupmax", "batchtopk joint", "gated", "global"])
def test_prefixes_and_conventions_go_with_every_rule(rule: str) -> None:
    coder = make("clt", prefixes=(6, 15, LATENTS), loss="mse", **RULES[rule])
    xs, ys = batch(coder)
    variances = [2.0, 3.0, 4.0]
    got = losses(coder, coder(xs), xs, ys, variances, 1.0).total
    expected = reference(coder, xs, ys, variances)
    torch.testing.assert_close(got, expected)
    parameters = list(coder.parameters())
    pairs = [
        torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True) for total in (got, expected)
    ]
    torch.testing.assert_close(*pairs)


def test_a_second_wider_code_leaves_the_choice_by_norm_alone() -> None:
    plain, multi = (make("sae", firing="topk", k=2, rank_by="norm", multi_topk=share) for share in (0.0, 0.125))
    xs, _ = batch(plain)
    left, right = plain(xs).fired[0], multi(xs).fired[0]
    assert left.selection is not None
    assert right.selection is not None
    assert torch.equal(left.selection.latents, right.selection.latents)
    torch.testing.assert_close(left.z, right.z)
