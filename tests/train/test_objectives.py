"""What a dictionary may minimise, against the dense reference in float64.

Conventions, AuxK's options, norms and forms of penalties; and that the three conventions are one objective in three
units.
"""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.test_device import as_on_device
from tests.train.test_losses import LATENTS, RULES, D, N, batch, make, reference
from tests.train.test_padded import ReadingBack
from thresher.cache.errors import UserError
from thresher.train.dictionary.coder import Coder, Pass
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.kernels import firing, padded
from thresher.train.kernels.choice import Kernels
from thresher.train.losses import losses, regularisation, residuals
from thresher.train.penalties import weighed

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

CHOICES: dict[str, dict[str, Any]] = {
    "mse": {"loss": "mse"},
    "sum": {"loss": "sum"},
    "aux over target": {"aux_divisor": "target"},
    "aux over nothing": {"loss": "mse", "aux_divisor": "none"},
    "aux unscaled": {"aux_k": 16, "aux_scale": False},
}
PENALTIES: dict[str, dict[str, Any]] = {
    "relu l1 norm": {"firing": "relu", "sparsity": 0.03, "penalty_norm": "l1"},
    "relu no norm": {"firing": "relu", "sparsity": 0.03, "penalty_norm": "none"},
    "tanh l1 norm": {"firing": "jumprelu", "penalty": "tanh", "sparsity": 0.05, "penalty_norm": "l1"},
    "tanh no norm": {"firing": "jumprelu", "penalty": "tanh", "sparsity": 0.05, "penalty_norm": "none"},
    "below zero, all": {
        "firing": "jumprelu",
        "sparsity": 0.02,
        "preact": 0.1,
        "preact_on": "all",
        "preact_form": "zero",
    },
    "below zero, dead": {"firing": "jumprelu", "sparsity": 0.02, "preact": 0.1, "preact_form": "zero"},
    "below θ, no norm": {"firing": "jumprelu", "sparsity": 0.02, "preact": 0.1, "penalty_norm": "none"},
}


def auxk_term(coder: Coder, xs: list[Tensor], ys: list[Tensor], done: Pass, variances: list[float]) -> Tensor:
    """AuxK with gradient."""
    return regularisation(coder, done, xs, residuals(coder, done, ys), variances, 1.0).aux


def gradients(out: Tensor, coder: Coder) -> dict[str, Tensor]:
    named = dict(coder.named_parameters())
    found = torch.autograd.grad(out, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def assert_equals_reference(coder: Coder, kernels: Any = "auto") -> None:
    """Value and all gradients of the objective are those of the formulas."""
    coder.use(Kernels(kernels))
    xs, ys = batch(coder)
    variances = [2.0 + i for i in range(len(ys))]
    got = losses(coder, coder(xs), xs, ys, variances, 1.0)
    expected = reference(coder, xs, ys, variances)
    torch.testing.assert_close(got.total, expected)
    right = gradients(expected, coder)
    for name, fast in gradients(got.total, coder).items():
        torch.testing.assert_close(fast, right[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rule", ["relu", "topk", "batchtopk", "jumprelu target"])
@pytest.mark.parametrize(("kind", "choice"), itertools.product(["sae", "clt"], CHOICES))
def test_every_choice_of_losses_equals_the_dense_reference(kind: str, choice: str, rule: str) -> None:
    assert_equals_reference(make(kind, **(RULES[rule] | CHOICES[choice])))


@pytest.mark.parametrize(("kind", "penalty"), itertools.product(["transcoder", "clt"], PENALTIES))
def test_every_form_of_penalty_equals_the_dense_reference(kind: str, penalty: str) -> None:
    assert_equals_reference(make(kind, **PENALTIES[penalty]))


@pytest.mark.parametrize("rule", RULES)
def test_the_three_conventions_with_equivalent_coefficients_have_proportional_gradients(rule: str) -> None:
    variance, found = 3.7, {}
    for loss, unit in (("sum", 1.0), ("mse", float(D)), ("fvu", variance)):
        settings = {key: RULES[rule][key] / unit for key in ("sparsity", "preact") if key in RULES[rule]}
        coder = make("clt", **(RULES[rule] | settings | {"loss": loss, "aux_divisor": "none"}))
        xs, ys = batch(coder)
        terms = losses(coder, coder(xs), xs, ys, [variance] * 3, 1.0)
        found[loss] = {name: grad * unit for name, grad in gradients(terms.total, coder).items()}, terms.fvu
    for loss in ("mse", "fvu"):
        for name, grad in found["sum"][0].items():
            torch.testing.assert_close(found[loss][0][name], grad)
        torch.testing.assert_close(found[loss][1], found["sum"][1])  # what is logged is the FVU in any case


def test_only_the_sparsity_penalty_warms_up() -> None:
    coder = make("sae", firing="jumprelu", sparsity=0.02, preact=0.1)
    xs, ys = batch(coder)
    none, half, full = (losses(coder, coder(xs), xs, ys, [1.0], ramp).penalty for ramp in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half - none, full - half)
    sparse = make("sae", firing="jumprelu", sparsity=0.02)
    torch.testing.assert_close(full - none, losses(sparse, sparse(xs), xs, ys, [1.0], 1.0).penalty)


def test_the_tanh_penalty_teaches_codes_thresholds_and_norms() -> None:
    coder = make("transcoder", firing="jumprelu", penalty="tanh", sparsity=1.0, aux=0.0)
    xs, ys = batch(coder)
    done = coder(xs)
    penalty = losses(coder, done, xs, [done.y.detach()[:, 0] for _ in ys], [1.0], 1.0).total  # nothing left to explain
    for name, grad in gradients(penalty, coder).items():
        assert bool((grad != 0).any()) == (name != "b_dec"), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefixes": (8, 4, 16)}, "prefixes is .8, 4, 16.; expected ascending"),
        ({"prefixes": (0.5, 8.5)}, "shares of F end with 1"),
        ({"prefixes": (4, 8)}, "expected different ends from 1 on, the last one 16"),
        ({"prefixes": (0.01, 1.0)}, "ends prefixes at .0, 16. of 16"),
        ({"prefixes": (4, 16), "prefix_weights": (1.0,)}, "prefix_weights is .1.0. for 2 prefixes"),
        ({"prefix_weights": (1.0,)}, "without prefixes"),
        ({"multi_topk": 0.125, "firing": "batchtopk"}, "only 'topk' counts"),
        ({"aux_scope": "all"}, "aux_scope is 'all' for kind = 'sae'"),
        ({"resample": 1}, "expected 0 .never. or 2"),
        ({"resample": 100}, "with firing = 'topk'"),
        ({"p_end": 0.0}, "at 0 nothing is penalised"),
        ({"penalty": "lp"}, "no penalty, since k fixes"),
    ],
)
def test_losses_that_make_no_sense_are_refused_with_the_reason(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("sae", **({"firing": "topk", "k": 3, "n_latents": 16} | settings))


def test_prefixes_may_be_numbers_or_shares() -> None:
    numbers = make("sae", firing="topk", k=3, prefixes=(6, 12, 24)).spec
    assert (
        numbers.prefix_ends == make("sae", firing="topk", k=3, prefixes=(0.25, 0.5, 1)).spec.prefix_ends == (6, 12, 24)
    )
    assert DictionaryConfig(n_latents=8, k=2, prefixes=(0.5, 1)).prefixes == (0.5, 1)


@pytest.mark.parametrize("kernels", ["auto", "plain", "as on a device"])
@pytest.mark.parametrize("settings", [{}, {"aux_k": 16}, {"aux_scale": False, "aux_k": 16, "aux_divisor": "target"}])
def test_auxk_of_all_layers_together_equals_its_formula(
    settings: dict[str, Any], kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    coder = make("clt", firing="topk", k=3, aux_scope="all", **settings)
    xs, ys = batch(coder)
    if kernels == "as on a device":
        monkeypatch.setattr(padded, "must_not_ask", lambda tensor: True)
        for source in range(3):
            coder.encoder(source).forecast.recount(coder.encoder(source).tokens_since_fired)
    else:
        coder.use(Kernels(kernels))
    done = coder(xs)
    variances = [2.0, 3.0, 4.0]
    got = losses(coder, done, xs, ys, variances, 1.0).aux
    guess, k = torch.zeros(3, N, D, dtype=torch.float64), coder.spec.resolved_aux_k
    for source, x_ND in enumerate(xs):
        encoder = coder.encoder(source)
        a_NF = (x_ND @ encoder.W_enc.T + encoder.b_enc).masked_fill(~encoder.dead(100), -1.0)
        best = a_NF.topk(k, dim=1)
        z_NF = torch.zeros_like(a_NF).scatter(1, best.indices, best.values.clamp_min(0))
        for j in coder.written(source):
            guess[j] = guess[j] + z_NF @ coder.W_dec[source][:, j - source]
    terms = []
    for y, fit, told, variance in zip(ys, done.y.detach().unbind(1), guess, variances, strict=True):
        e = y - fit
        divisor = variance if coder.spec.aux_divisor == "target" else (e - e.mean(0)).square().sum(1).mean()
        terms.append((told - e).square().sum(1).mean() / divisor)
    scale = min(24 / (3 * k), 1.0) if coder.spec.aux_scale else 1.0
    expected = scale * torch.stack(terms).mean()
    torch.testing.assert_close(got, expected.detach())
    right = gradients(expected, coder)
    for name, fast in gradients(auxk_term(coder, xs, ys, done, variances), coder).items():
        torch.testing.assert_close(fast, right[name], msg=lambda text, name=name: f"{name}: {text}")
    assert not right["b_dec"].any()
    assert right["W_dec.0"][:, 2].any()  # a dead latent learns what all layers lack


PREFIXED = {name: RULES[name] for name in ("relu", "topk", "batchtopk", "jumprelu l0", "jumprelu tanh")}


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize(("kind", "rule"), itertools.product(["sae", "transcoder", "clt"], PREFIXED))
def test_prefixes_over_any_rule_equal_the_dense_reference(kind: str, rule: str, kernels: str) -> None:
    ends = (
        {"prefixes": (3, 10, LATENTS), "prefix_weights": (1.0, 0.25, 2.0)} if kind == "clt" else {"prefixes": (0.5, 1)}
    )
    assert_equals_reference(make(kind, pre_bias=kind == "sae", **(PREFIXED[rule] | ends)), kernels)


@pytest.mark.parametrize("dense_share", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["relu", "jumprelu l0"])
def test_prefixes_of_dense_and_of_sparse_codes_are_the_same(
    rule: str, dense_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firing, "select_above", functools.partial(firing.select_above, dense_share=dense_share))
    assert_equals_reference(make("clt", prefixes=(3, 10, LATENTS), **RULES[rule]))


@pytest.mark.parametrize("rule", ["topk", "batchtopk"])
def test_prefixes_of_selections_of_fixed_capacity_are_the_same(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firing, "fixed_capacity", lambda a, kernels: padded)  # as on a device
    assert_equals_reference(make("clt", prefixes=(3, 10, LATENTS), **RULES[rule]))


def test_every_prefix_has_the_decoders_bias_and_the_last_is_the_reconstruction() -> None:
    coder = make("clt", firing="topk", k=3, prefixes=(1, 10, LATENTS))
    plain = make("clt", firing="topk", k=3)
    xs, _ = batch(coder)
    with torch.no_grad():
        for encoder in (coder.encoder(source) for source in range(3)):
            encoder.b_enc[:10] = -100.0  # nothing in the first two prefixes ever fires
        plain.load_state_dict(coder.state_dict())
    done = coder(xs)
    assert len(done.prefixes) == 2
    for y_NSE in done.prefixes:
        assert torch.equal(y_NSE, coder.b_dec.expand_as(y_NSE))
    torch.testing.assert_close(done.y, plain(xs).y)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize(("kind", "k"), itertools.product(["sae", "transcoder", "clt"], [3, 8]))
def test_multi_topk_equals_the_dense_reference(kind: str, k: int, kernels: str) -> None:
    coder = make(kind, pre_bias=kind == "sae", firing="topk", k=k, multi_topk=1 / 8)  # 4 · 8 is more than there are
    assert_equals_reference(coder, kernels)


def test_multi_topk_goes_with_prefixes_and_selections_of_fixed_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"firing": "topk", "k": 3, "multi_topk": 1 / 8}
    assert_equals_reference(make("clt", **settings, prefixes=(5, LATENTS)))
    monkeypatch.setattr(firing, "fixed_capacity", lambda a, kernels: padded)
    assert_equals_reference(make("clt", **settings))


ON_DEVICE: dict[str, dict[str, Any]] = {
    "prefixes of topk": {"firing": "topk", "k": 3, "prefixes": (5, LATENTS), "loss": "mse", "aux_divisor": "target"},
    "prefixes of batchtopk": {"firing": "batchtopk", "k": 2.5, "prefixes": (5, LATENTS)},
    "prefixes of jumprelu": {"firing": "jumprelu", "sparsity": 0.1, "prefixes": (5, LATENTS), "penalty_norm": "l1"},
    "multi": {"firing": "topk", "k": 3, "multi_topk": 1 / 8, "aux_scope": "all"},
    "lp": {"firing": "relu", "sparsity": 0.1, "penalty": "lp"},
}


@pytest.mark.parametrize("objective", ON_DEVICE)
def test_no_objective_reads_back_from_a_device(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded, "must_not_ask", lambda tensor: True)
    monkeypatch.setattr(firing, "fixed_capacity", lambda a_NF, kernels: padded)
    coder = as_on_device(make("clt", **ON_DEVICE[objective]))
    coder.gather()
    xs, ys = batch(coder)
    with ReadingBack():
        done = coder(xs)
        losses(coder, done, xs, ys, [2.0, 3.0, 4.0], 1.0).total.backward()
        if coder.anneal is not None:
            coder.anneal.hear([weighed(coder, source, part) for source, part in enumerate(done.fired)], N)
            coder.anneal.advance(14_999, 20_000, torch.zeros((), dtype=torch.bool))
    if coder.anneal is not None:
        assert coder.anneal.p.item() == pytest.approx(0.92)
