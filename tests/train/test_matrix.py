"""Every firing rule × every loss × every topology: values and all gradients in float64, or a refusal with the reason.

The dense formulas are those of matrix.py. Losses that go together are taken in one pass, so that the whole matrix costs
seconds: every loss stands beside every rule of every topology, some in company. What is missing from the matrix is
refused, each for one of the `REASONS`.
"""

import itertools
import re
from typing import Any

import pytest
import torch

from tests.train.matrix import Dense
from thresher.cache.errors import UserError
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build, topology
from thresher.train.losses import losses

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

N, D, F, SITES = 16, 5, 24, 2

TOPOLOGIES: dict[str, dict[str, Any]] = {
    "sae": {"kind": "sae"},
    "transcoder": {"kind": "transcoder"},
    "skip transcoder": {"kind": "transcoder", "skip": True},
    "clt": {"kind": "clt"},
    "skip clt": {"kind": "clt", "skip": True},
    "crosscoder": {"kind": "crosscoder"},
    "crosscoder, norms summed": {"kind": "crosscoder", "norm": "sum"},
    "molt": {"kind": "molt", "transforms": 8, "ranks": (4, 2)},
}
RULES: dict[str, dict[str, Any]] = {
    "relu": {"firing": "relu", "sparsity": 0.03},
    "topk": {"firing": "topk", "k": 3},
    "topk by norm": {"firing": "topk", "k": 3, "rank_by": "norm"},
    "groupmax": {"firing": "groupmax", "k": 4},
    "batchtopk": {"firing": "batchtopk", "k": 2.5},
    "batchtopk, joint": {"firing": "batchtopk", "k": 2.5, "pool": "joint", "rank_by": "norm"},
    "global": {"firing": "global", "k": 2.5},
    "jumprelu": {"firing": "jumprelu", "sparsity": 0.02},
    "jumprelu, target": {"firing": "jumprelu", "penalty": "target_l0", "k": 3, "sparsity": 0.5},
    "jumprelu, tanh": {"firing": "jumprelu", "penalty": "tanh", "sparsity": 0.05, "tanh_scale": 2.0},
    "gated": {"firing": "gated", "sparsity": 0.03},
}
LOSSES: dict[str, dict[str, Any]] = {
    "fvu": {},
    "mse": {"loss": "mse"},
    "sum": {"loss": "sum"},
    "pre-bias": {"pre_bias": True},
    "matryoshka": {"prefixes": (0.25, 0.5, 1.0)},
    "matryoshka, weighted": {"prefixes": (0.125, 1.0), "prefix_weights": (2.0, 0.5)},
    "multi-topk": {"multi_topk": 0.125},
    "auxk over target": {"aux_divisor": "target"},
    "auxk over nothing": {"aux_divisor": "none"},
    "auxk unscaled": {"aux_scale": False, "aux_k": 10},
    "auxk of all": {"aux_scope": "all"},
    "lp": {"penalty": "lp", "p_end": 0.5},
    "l1 norms": {"penalty_norm": "l1"},
    "no norms": {"penalty_norm": "none"},
    "below threshold, dead": {"preact": 0.1},
    "below threshold, all": {"preact": 0.1, "preact_on": "all"},
    "below zero": {"preact": 0.1, "preact_on": "all", "preact_form": "zero"},
}
BUNDLES: list[list[str]] = [
    ["fvu", "pre-bias", "lp", "below threshold, dead"],
    ["mse", "matryoshka", "auxk over target", "l1 norms", "below threshold, all"],
    ["sum", "matryoshka, weighted", "multi-topk", "auxk over nothing", "no norms", "below zero"],
    ["auxk of all", "auxk unscaled", "multi-topk"],
]
"""Losses that are tried together, as far as rule and topology admit each."""


REASONS: dict[str, str] = {
    "pre-bias": "input and output are the same site",
    "matryoshka": "a prefix would be the largest ranks alone",
    "matryoshka, weighted": "a prefix would be the largest ranks alone",
    "multi-topk": "only 'topk' counts",
    "auxk of all": "the residual of one source to explain|a threshold each for their",
    "lp": "expected one of|expected no penalty|sets its sparsity by a penalty",
    "l1 norms": "a norm of decoder rows",
    "below threshold, dead": "no use for it; expected jumprelu",
    "below threshold, all": "no use for it; expected jumprelu",
    "below zero": "no use for it; expected jumprelu",
    "groupmax": "compete across ranks",
    "gated": "a row for each latent",
    "batchtopk, joint": "nothing to share",
}
"""Why a rule or a loss is refused, somewhere."""


def settings(name: str, rule: str, *chosen: str) -> dict[str, Any]:
    out = {"aux_k": 4, **TOPOLOGIES[name], **RULES[rule]}
    for loss in chosen:
        out |= LOSSES[loss]
    return out


def spec_of(given: dict[str, Any], unit: bool = False) -> DictionarySpec:
    cls = topology(given["kind"])
    many = SITES if cls.joint else 1
    reads = tuple(f"r{i}" for i in range(many))
    writes = reads if cls.own_site else tuple(f"w{i}" for i in range(many))
    return DictionarySpec(
        **given, reads=reads, writes=writes, layers=tuple(range(many)), d_in=cls.width(D, many), d_out=D,
        n_latents=F, unit_norm=unit, dead_after=100,
    )  # fmt: skip


def coder_of(given: dict[str, Any], unit: bool = False) -> Coder:
    """In float64, with weights of no special form, but for the norm of `unit` rows; a third of the latents is dead."""
    coder, rng = build(spec_of(given, unit)).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
            if name.endswith("log_theta"):
                parameter.mul_(0.5).sub_(0.5)
            if unit and name.startswith("W_dec"):
                parameter.div_(parameter.flatten(1).norm(dim=1)[:, None, None])
        for source in range(len(coder.inputs)):
            encoder = coder.encoder(source)
            encoder.tokens_since_fired[::3] = 100
            for buffer, value in {"window": 0.8, "threshold": 0.9, "aux_threshold": 0.4}.items():
                if hasattr(encoder.rule, buffer):
                    getattr(encoder.rule, buffer).fill_(value)
            encoder.rule.at(1)
        if coder.anneal is not None:
            coder.anneal.p.fill_(0.7)
            coder.anneal.factor.fill_(1.3)
    return coder


def refusal(name: str, rule: str, loss: str) -> str | None:
    try:
        spec_of(settings(name, rule, loss))
    except UserError as error:
        return str(error)
    return None


def admitted(name: str, rule: str, loss: str) -> bool:
    return refusal(name, rule, loss) is None


CASES = [
    (name, rule, number)
    for name, rule in itertools.product(TOPOLOGIES, RULES)
    for number in range(len(BUNDLES))
    if admitted(name, rule, "fvu")
]


UNIT = [
    *(("sae", rule) for rule in ("relu", "jumprelu, tanh", "gated", "batchtopk")),
    *(("clt", rule) for rule in ("relu", "jumprelu, tanh")),
    ("crosscoder", "relu"),
]
"""Also with rows of norm 1."""


@pytest.mark.parametrize(("name", "rule", "number"), CASES, ids=lambda value: str(value))
def test_value_and_all_gradients_are_those_of_the_dense_formulas(name: str, rule: str, number: int) -> None:
    compare(name, rule, number)


@pytest.mark.parametrize("number", range(len(BUNDLES)))
@pytest.mark.parametrize(("name", "rule"), UNIT)
def test_rows_that_keep_norm_1_give_the_same_but_along_the_row(name: str, rule: str, number: int) -> None:
    """Where norms are known to be 1, penalties need not compute them; the update takes that part out anyway."""
    compare(name, rule, number, unit=True)


def compare(name: str, rule: str, number: int, unit: bool = False) -> None:
    bundle = [loss for loss in BUNDLES[number] if admitted(name, rule, loss)]
    given = settings(name, rule, *bundle)
    coder, rng = coder_of(given, unit), torch.Generator().manual_seed(1)
    xs = [torch.randn(N, coder.spec.d_in, generator=rng, dtype=torch.float64) for _ in coder.inputs]
    ys = [torch.randn(N, D, generator=rng, dtype=torch.float64) for _ in coder.writes]
    variances = [2.0 + j for j in range(len(ys))]
    got = losses(coder, coder(xs), xs, ys, variances, 1.0).total
    parameters = dict(coder.named_parameters())
    left = torch.autograd.grad(got, list(parameters.values()), allow_unused=True, materialize_grads=True)
    p = dict(coder.named_buffers()) | {n: v.detach().clone().requires_grad_() for n, v in parameters.items()}
    dead = [coder.encoder(source).dead(100) for source in range(len(coder.inputs))]
    expected = Dense(p, given, variances, dead)(xs, ys)
    torch.testing.assert_close(got, expected, msg=lambda text: f"{bundle}: {text}")
    right = torch.autograd.grad(expected, [p[n] for n in parameters], allow_unused=True, materialize_grads=True)
    for key, fast, plain in zip(parameters, left, right, strict=True):
        if unit and key.startswith("W_dec"):
            w = p[key].detach()
            fast, plain = (g - (g * w).sum((1, 2), keepdim=True) * w for g in (fast, plain))
        torch.testing.assert_close(
            fast, plain, rtol=1e-8, atol=1e-11, msg=lambda text, key=key: f"{bundle}: {key}: {text}"
        )


def test_every_loss_is_tried_with_every_rule_and_topology_or_refused_with_the_reason() -> None:
    assert {loss for bundle in BUNDLES for loss in bundle} == LOSSES.keys()
    seen = set()
    for name, rule, loss in itertools.product(TOPOLOGIES, RULES, LOSSES):
        said = refusal(name, rule, loss)
        if said is not None:
            why = [key for key in (rule, loss) if key in REASONS and re.search(REASONS[key], said)]
            assert why, f"{name} × {rule} × {loss}: {said}"
            seen.update(why)
    assert seen == REASONS.keys()
