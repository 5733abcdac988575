"""Every loss term of every kind and rule against a dense reference in float64, and the known faults of others."""

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.train.auxk import auxiliary
from thresher.train.dictionary.coder import Coder, Pass
from thresher.train.dictionary.encoder import Chosen, Fired
from thresher.train.dictionary.rules.base import seen
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build
from thresher.train.kernels import firing
from thresher.train.kernels.residual import variation
from thresher.train.kernels.sparse import Selection, add_decoded
from thresher.train.losses import Whole, losses, residuals

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

N, D, LATENTS, LAYERS = 40, 6, 24, 3

RULES: dict[str, dict[str, Any]] = {
    "relu": {"firing": "relu", "sparsity": 0.03},
    "topk": {"firing": "topk", "k": 3},
    "batchtopk": {"firing": "batchtopk", "k": 2.5},
    "jumprelu l0": {"firing": "jumprelu", "sparsity": 0.02},
    "jumprelu target": {"firing": "jumprelu", "penalty": "target_l0", "k": 3, "sparsity": 0.5},
    "jumprelu tanh": {"firing": "jumprelu", "penalty": "tanh", "sparsity": 0.05, "tanh_scale": 2.0},
    "jumprelu preact": {"firing": "jumprelu", "sparsity": 0.02, "preact": 0.1},
    "jumprelu preact all": {"firing": "jumprelu", "sparsity": 0.02, "preact": 0.1, "preact_on": "all"},
    "groupmax": {"firing": "groupmax", "k": 4},
    "topk norm": {"firing": "topk", "k": 3, "rank_by": "norm"},
    "batchtopk norm": {"firing": "batchtopk", "k": 2.5, "rank_by": "norm"},
    "batchtopk joint": {"firing": "batchtopk", "k": 2.5, "pool": "joint", "rank_by": "norm"},
    "gated": {"firing": "gated", "sparsity": 0.03},
    "global": {"firing": "global", "k": 2.5},
}


def make(kind: str, **settings: Any) -> Coder:
    layers = LAYERS if kind == "clt" else 1
    writes = tuple(f"w{i}" for i in range(layers)) if kind != "sae" else ("r0",)
    base: dict[str, Any] = {
        "kind": kind,
        "reads": tuple(f"r{i}" for i in range(layers)),
        "writes": writes,
        "layers": tuple(range(layers)),
        "d_in": D,
        "d_out": D,
        "n_latents": LATENTS,
        "unit_norm": False,
        "aux_k": 4,
        "dead_after": 100,
    }
    if kind != "clt":
        settings = {key: value for key, value in settings.items() if key != "pool"}
    coder = build(DictionarySpec(**(base | settings))).double()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64) * 0.6)
        for source in range(layers):
            encoder = coder.encoder(source)
            encoder.tokens_since_fired[::3] = 100  # 8 of 24 are dead
            if settings["firing"] == "jumprelu":
                encoder.rule.log_theta.add_(0.4)
                encoder.rule.window.fill_(0.8)
            if settings["firing"] == "global":
                encoder.rule.threshold.fill_(1.3)
                encoder.rule.aux_threshold.fill_(0.6)
                encoder.rule.at(1)
    return coder


def batch(coder: Coder, seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    xs = [torch.randn(N, D, generator=rng, dtype=torch.float64) for _ in coder.reads]
    return xs, xs if coder.spec.kind == "sae" else [x.roll(1, 1) ** 2 for x in xs]


def auxk_term(coder: Coder, xs: list[Tensor], ys: list[Tensor], done: Pass | None = None) -> Tensor:
    """AuxK of a batch."""
    done = coder(xs) if done is None else done
    return auxiliary(coder, done, xs, residuals(coder, done, ys))


def reference(coder: Coder, xs: list[Tensor], ys: list[Tensor], variances: list[float]) -> Tensor:
    """The whole objective, densely, from the formulas alone."""
    spec = coder.spec
    zs, wide, gates, total = [], [], [], torch.zeros((), dtype=torch.float64)
    for source, x in enumerate(xs):
        encoder = coder.encoder(source)
        shifted = x - coder.b_dec[source] if spec.pre_bias else x
        a = shifted @ encoder.W_enc.T + encoder.b_enc
        rows = coder.W_dec[source].flatten(1)
        norm = {"l2": rows.norm(dim=1), "l1": rows.abs().sum(1), "none": torch.ones(())}[spec.penalty_norm]
        term = torch.zeros((), dtype=torch.float64)
        if spec.firing in ("topk", "batchtopk", "groupmax"):
            z = a.clamp_min(0) * reference_mask(coder, xs, source)
        elif spec.firing == "global":
            z = a * (a > encoder.rule.threshold)
        elif spec.firing == "gated":
            slope, gate = encoder.rule.r.exp(), a.clamp_min(0)
            z = (a > 0) * (slope * (a - encoder.b_enc) + encoder.rule.b_mag).clamp_min(0)
            term = spec.sparsity * (gate * norm).sum(1).mean()
            gates.append(gate)
        elif spec.firing == "relu":
            z = a.clamp_min(0)
            term = spec.sparsity * (z * norm).sum(1).mean()
            if spec.penalty == "lp":
                p, factor, delta = coder.anneal.p, coder.anneal.factor, spec.p_offset
                term = spec.sparsity * factor * ((z * norm + delta) ** p - delta**p).sum(1).mean()
        else:
            theta, width = encoder.rule.log_theta.exp(), encoder.rule.window
            window = ((a - theta).abs() < width / 2).double().detach()
            moved = theta - theta.detach()
            z = a * (a > theta) - theta.detach() / width * window * moved
            l0 = ((a > theta).double() - window / width * moved).sum(1).mean()
            if spec.resolved_penalty == "l0":
                term = spec.sparsity * l0
            elif spec.resolved_penalty == "target_l0":
                term = spec.sparsity * (l0 / spec.k - 1) ** 2
            else:
                term = spec.sparsity * torch.tanh(spec.tanh_scale * norm * z).sum(1).mean()
            on = torch.ones(LATENTS) if spec.preact_on == "all" else encoder.dead(spec.dead_after).double()
            below = norm * (theta - a).clamp_min(0) if spec.preact_form == "threshold" else (-a).clamp_min(0)
            term = term + spec.preact * (on * below).sum(1).mean()
        zs.append(z)
        if spec.multi_topk:
            best = a.topk(min(4 * int(spec.k or 0), LATENTS), dim=1).indices
            wide.append(a.clamp_min(0) * torch.zeros_like(a).scatter(1, best, 1.0))
        total = total + term / len(xs)
    for target, y in enumerate(ys):
        unit = {"fvu": variances[target], "mse": D, "sum": 1.0}[spec.loss]
        residual = (y - decoded(coder, zs, target)).detach()
        ends = spec.prefix_ends or (LATENTS,)
        for end, weight in zip(ends, spec.prefix_weights or [1 / len(ends)] * len(ends), strict=True):
            error = ((y - decoded(coder, zs, target, end)) ** 2).sum(1).mean()
            total = total + weight * error / unit / len(ys)
        if wide:
            total = total + spec.multi_topk * ((y - decoded(coder, wide, target)) ** 2).sum(1).mean() / unit / len(ys)
        if gates:
            by_gates = coder.b_dec[target].detach().expand(N, D)
            for source in coder.sources(target):
                W = coder.W_dec[source][:, target - coder.written(source).start].detach()
                by_gates = by_gates + gates[source] @ W
            total = total + ((y - by_gates) ** 2).sum(1).mean() / unit / len(ys)
        encoder = coder.encoder(target)
        dead = encoder.dead(spec.dead_after)
        shifted = xs[target] - coder.b_dec[target].detach() if spec.pre_bias else xs[target]
        a = (shifted @ encoder.W_enc.T + encoder.b_enc).masked_fill(~dead, -torch.inf)
        picked = a.topk(spec.resolved_aux_k, dim=1).indices
        z = a.clamp_min(0) * torch.zeros_like(a).scatter(1, picked, 1.0).masked_fill(~dead, 0)
        z = torch.where(dead, z, 0.0)
        if spec.firing == "global":
            z = torch.where(a > encoder.rule.aux_threshold, a, 0.0)
        around = ((residual - residual.mean(0)) ** 2).sum(1).mean()
        spread = {"residual": around, "target": variances[target], "none": unit}[spec.aux_divisor]
        error = ((z @ coder.W_dec[target][:, 0] - residual) ** 2).sum(1).mean()
        scale = min(int(dead.sum()) / spec.resolved_aux_k, 1.0) if spec.aux_scale else 1.0
        total = total + spec.aux * scale * error / spread / len(ys)
    return total


def decoded(coder: Coder, codes: list[Tensor], target: int, end: int = LATENTS) -> Tensor:
    """What the first `end` latents of every source write to a destination, and its bias."""
    out = coder.b_dec[target].expand(N, D)
    for source in coder.sources(target):
        place = target - coder.written(source).start
        out = out + codes[source][:, :end] @ coder.W_dec[source][:end, place]
    return out


def reference_mask(coder: Coder, xs: list[Tensor], source: int) -> Tensor:
    """[N, F] which entries a rule by count keeps of a source."""
    spec, scores = coder.spec, []
    for index, x in enumerate(xs):
        encoder = coder.encoder(index)
        shifted = x - coder.b_dec[index] if spec.pre_bias else x
        a = (shifted @ encoder.W_enc.T + encoder.b_enc).detach()
        norm = coder.W_dec[index].detach().square().sum((1, 2)).sqrt()
        scores.append(a * norm if spec.rank_by == "norm" else a)
    own, k = scores[source], float(spec.k or 0)
    if spec.firing == "topk":
        return (own >= own.sort(1, descending=True).values[:, int(k) - 1 : int(k)]).double()
    if spec.firing == "groupmax":
        groups = own.view(N, int(k), -1)
        return (groups == groups.max(2, keepdim=True).values).double().view_as(own)
    pool = torch.stack(scores, 1) if spec.pool == "joint" else own
    ranked = pool.flatten().sort(descending=True).values
    return (own >= ranked[int(k * N * (len(scores) if spec.pool == "joint" else 1)) - 1]).double()


@pytest.mark.parametrize("dense_share", [0.0, 1.0])
@pytest.mark.parametrize(("kind", "rule"), itertools.product(["sae", "transcoder", "clt"], RULES))
def test_the_objective_and_all_its_gradients_equal_the_dense_reference(
    kind: str, rule: str, dense_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = functools.partial(firing.select_above, dense_share=dense_share)  # both products for relu and jumprelu
    monkeypatch.setattr(firing, "select_above", chosen)
    coder = make(kind, pre_bias=kind == "sae", **RULES[rule])
    xs, ys = batch(coder)
    variances = [2.0 + i for i in range(len(ys))]
    got = losses(coder, coder(xs), xs, ys, variances, 1.0).total
    expected = reference(coder, xs, ys, variances)
    torch.testing.assert_close(got, expected)
    parameters = dict(coder.named_parameters())
    left = torch.autograd.grad(got, list(parameters.values()), allow_unused=True, materialize_grads=True)
    right = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True, materialize_grads=True)
    for name, fast, plain in zip(parameters, left, right, strict=True):
        torch.testing.assert_close(fast, plain, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["sae", "transcoder", "clt"])
def test_auxk_gives_gradient_to_dead_rows_of_encoder_and_decoder_only(kind: str) -> None:
    coder = make(kind, firing="topk", k=3, pre_bias=kind == "sae")
    xs, ys = batch(coder)
    auxk_term(coder, xs, ys).backward()
    for source in range(len(xs)):
        encoder = coder.encoder(source)
        dead = encoder.dead(100)
        for weight in (encoder.W_enc, encoder.b_enc, coder.W_dec[source]):
            assert weight.grad is not None
            touched = weight.grad.flatten(1).abs().sum(1) if weight.dim() > 1 else weight.grad.abs()
            assert bool((touched[~dead] == 0).all())
            assert bool((touched[dead] > 0).any())
    assert coder.b_dec.grad is None  # no decoder bias in it, and the residual is detached


def test_auxk_is_zero_without_dead_latents_and_finite_for_a_perfect_residual() -> None:
    coder = make("sae", firing="topk", k=3)
    xs, ys = batch(coder)
    out = coder(xs)
    perfect = out.y.detach()[:, 0]
    assert auxk_term(coder, xs, [perfect], out).item() == 0.0
    coder.encoder(0).tokens_since_fired.zero_()
    assert auxk_term(coder, xs, ys).item() == 0.0


def test_auxk_scales_with_the_number_of_dead_latents_below_k_aux() -> None:
    coder = make("transcoder", firing="topk", k=3, aux_k=16)
    xs, ys = batch(coder)
    out = coder(xs)
    encoder = coder.encoder(0)
    dead = torch.nonzero(encoder.dead(100)).view(-1)
    z = F.relu(F.linear(xs[0], encoder.W_enc[dead], encoder.b_enc[dead]))
    residual = ys[0] - out.y[:, 0]
    share = ((z @ coder.W_dec[0][dead, 0] - residual) ** 2).sum() / ((residual - residual.mean(0)) ** 2).sum()
    torch.testing.assert_close(auxk_term(coder, xs, ys, out), share * 8 / 16)


def test_selected_entries_that_are_not_positive_get_no_gradient() -> None:
    coder = make("sae", firing="topk", k=LATENTS, aux=0.0)
    xs, ys = batch(coder)
    out = coder(xs)
    fired = out.fired[0]
    fired.a.retain_grad()
    losses(coder, out, xs, ys, [1.0], 1.0).total.backward()
    assert fired.a.grad is not None
    assert bool((fired.a <= 0).any())
    assert bool((fired.a.grad[fired.a <= 0] == 0).all())


def test_the_reconstruction_term_of_a_batch_is_the_mean_of_its_halves() -> None:
    coder = make("clt", firing="topk", k=3, aux=0.0)
    xs, ys = batch(coder)
    variances = [1.0, 2.0, 3.0]
    whole = losses(coder, coder(xs), xs, ys, variances, 1.0).total
    halves = [
        losses(coder, coder([x[part] for x in xs]), [x[part] for x in xs], [y[part] for y in ys], variances, 1.0).total
        for part in (slice(0, N // 2), slice(N // 2, N))
    ]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize(("kind", "rule"), itertools.product(["sae", "clt"], RULES))
def test_the_parts_of_a_batch_add_up_to_the_whole(kind: str, rule: str) -> None:
    coder = make(kind, pre_bias=kind == "sae", **RULES[rule])
    xs, ys = batch(coder)
    variances = [2.0 + i for i in range(len(ys))]
    done = coder(xs)
    whole = Whole(
        N,
        torch.stack([mean_l0(part) for part in done.fired]),
        torch.stack([variation(y - done.y[:, i].detach()) for i, y in enumerate(ys)]),
    )
    one = losses(coder, done, xs, ys, variances, 1.0)
    parameters = list(coder.parameters())
    expected = torch.autograd.grad(one.total, parameters, allow_unused=True, materialize_grads=True)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    terms = []
    for rows in (slice(0, 7), slice(7, 30), slice(30, N)):
        x, y = [x[rows] for x in xs], [y[rows] for y in ys]
        part = pass_over(coder, x, [rows_of(fired, rows) for fired in done.fired])
        terms.append(losses(coder, part, x, y, variances, 1.0, whole))
        for total, grad in zip(
            sums,
            torch.autograd.grad(terms[-1].total, parameters, allow_unused=True, materialize_grads=True),
            strict=True,
        ):
            total += grad
    for got, wanted in zip(zip(*terms, strict=True), one, strict=True):
        torch.testing.assert_close(sum(got), wanted)
    torch.testing.assert_close(sums, list(expected))


def mean_l0(fired: Fired) -> Tensor:
    return (fired.z if fired.gate is None else fired.gate).detach().gt(0).double().sum() / fired.tokens


def rows_of(fired: Fired, rows: slice) -> Chosen:
    """What was chosen of some rows of a batch."""
    if fired.selection is None:
        return Chosen(None, fired.a.detach()[rows])
    offsets = fired.selection.offsets[rows.start : rows.stop + 1]
    entries = slice(int(offsets[0]), int(offsets[-1]))
    return Chosen(Selection(fired.selection.latents[entries], offsets - offsets[0], LATENTS), fired.a.detach()[entries])


def pass_over(coder: Coder, xs: list[Tensor], chosen: list[Chosen]) -> Pass:
    """A training pass with selections made before."""
    fired = tuple(coder.encoder(i)(x, coder.bias(i), chosen[i]) for i, x in enumerate(xs))
    y_NSE = coder.b_dec.expand(xs[0].shape[0], -1, -1).clone()
    for i, part in enumerate(fired):
        y_NSE = add_decoded(y_NSE, part.z, coder.W_dec[i], part.selection, coder.written(i).start)
    return Pass(fired, y_NSE)


def test_counters_and_thresholds_move_only_when_told_to() -> None:
    coder = make("sae", firing="batchtopk", k=2.0)
    xs, ys = batch(coder)
    before = {name: value.clone() for name, value in coder.named_buffers()}
    losses(coder, coder(xs), xs, ys, [1.0], 1.0)
    coder.encode(0, xs[0])
    for name, value in coder.named_buffers():
        assert torch.equal(value, before[name]) or bool((value != value).all()), name
    out = coder(xs)
    encoder = coder.encoder(0)
    active = encoder.observe(out.fired[0])
    codes = out.fired[0]
    assert codes.selection is not None
    fired = torch.zeros(LATENTS, dtype=torch.bool)
    fired[codes.selection.latents[codes.z > 0]] = True
    assert active.item() == (codes.z > 0).sum().item()
    assert bool((encoder.tokens_since_fired[fired] == 0).all())
    assert torch.equal(encoder.tokens_since_fired[~fired], before["encoders.0.tokens_since_fired"][~fired] + N)


def test_the_running_threshold_starts_at_the_first_value_and_then_follows() -> None:
    coder = make("sae", firing="batchtopk", k=2.0, threshold_decay=0.75)
    rule = coder.encoder(0).rule
    rule.observe(seen(torch.tensor([3.0, 0.0, 2.0], dtype=torch.float64), 1))
    assert rule.threshold.item() == 2.0
    rule.observe(seen(torch.tensor([6.0, 0.0], dtype=torch.float64), 1))
    assert rule.threshold.item() == 0.75 * 2.0 + 0.25 * 6.0
    rule.observe(seen(torch.zeros(4, dtype=torch.float64), 1))  # a batch that kept nothing is skipped
    assert rule.threshold.item() == 3.0
