"""Gradients through the model of every firing rule, penalty and topology, in float64, against dense formulas.

The model is that of test_endtoend_gradients.py, whose rules are tried there in every mode; dictionaries are those of
matrix.py.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train import tiny
from tests.train.matrix import Dense
from tests.train.test_endtoend_gradients import BETA, DEAD_AFTER, gradients, joined, reference
from thresher.harvest.target import TransformerTarget
from thresher.train.fit import Fit

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

KINDS: dict[str, dict[str, Any]] = {
    "sae": {"kind": "sae", "pre_bias": True},
    "transcoder": {"kind": "transcoder"},
    "skip transcoder": {"kind": "transcoder", "skip": True},
    "clt": {"kind": "clt"},
    "skip clt": {"kind": "clt", "skip": True},
    "crosscoder": {"kind": "crosscoder"},
    "crosscoder, norms summed": {"kind": "crosscoder", "norm": "sum", "decoder": "free"},
    "molt": {"kind": "molt", "ranks": (2, 1)},
}
RULES: dict[str, dict[str, Any]] = {
    "l1": {"firing": "relu", "sparsity": 0.03},
    "lp": {"firing": "relu", "penalty": "lp", "p_end": 0.5, "p_start": 2, "p_updates": 3, "sparsity": 0.03},
    "topk": {"firing": "topk", "k": 3},
    "topk by norm": {"firing": "topk", "k": 3, "rank_by": "norm"},
    "groupmax": {"firing": "groupmax", "k": 4},
    "batchtopk by norm": {"firing": "batchtopk", "k": 2.5, "rank_by": "norm"},
    "batchtopk, joint": {"firing": "batchtopk", "k": 2.5, "pool": "joint", "rank_by": "norm"},
    "global": {"firing": "global", "k": 2.5},
    "l0": {"firing": "jumprelu", "sparsity": 0.02},
    "tanh": {"firing": "jumprelu", "penalty": "tanh", "sparsity": 0.05, "tanh_scale": 2.0},
    "preact": {"firing": "jumprelu", "sparsity": 0.02, "preact": 0.1},
    "preact of all": {"firing": "jumprelu", "sparsity": 0.02, "preact": 0.1, "preact_on": "all"},
    "gated": {"firing": "gated", "sparsity": 0.03},
}
CASES = [
    *(("clt", rule, "cascade") for rule in RULES if rule != "batchtopk, joint"),
    *(("transcoder", rule, "cascade") for rule in ("lp", "groupmax", "global", "tanh", "preact", "gated")),
    *(("sae", rule, "cascade") for rule in ("l1", "gated", "preact of all")),
    *(("clt", rule, "clean_input") for rule in ("lp", "batchtopk, joint", "gated")),
    *(("transcoder", rule, "single_site") for rule in ("l1", "topk by norm", "global", "gated")),
    *(("skip transcoder", rule, mode) for rule, mode in (("topk", "cascade"), ("gated", "single_site"))),
    *(("skip clt", rule, mode) for rule, mode in (("gated", "cascade"), ("l0", "clean_input"))),
    *(("crosscoder", rule, mode) for rule, mode in (("topk", "clean_input"), ("l1", "single_site"))),
    ("crosscoder", "gated", "clean_input"),
    ("crosscoder, norms summed", "tanh", "single_site"),
    *(("molt", rule, mode) for rule, mode in (("topk", "cascade"), ("tanh", "cascade"), ("l0", "single_site"))),
]


@pytest.fixture(scope="module")
def target() -> TransformerTarget:
    return tiny.gpt2(torch.float64)


def fits(target: TransformerTarget, settings: dict[str, Any], **train: Any) -> list[Fit]:
    """Of two layers, with random weights and thresholds, every fifth latent dead, as in the second step."""
    made, rng = [], torch.Generator().manual_seed(11)
    for plan in tiny.plans_for(target, "g", {"local_weight": BETA} | train, **settings):
        fit = Fit(plan, tiny.Statistics(), torch.device("cpu"))
        fit.coder.double()
        fit.done = 1
        with torch.no_grad():
            for name, parameter in fit.coder.named_parameters():
                parameter.copy_(tiny.randomised(parameter, rng, 0.5))
                if plan.spec.unit_norm and name.startswith("W_dec"):
                    parameter.div_(parameter.flatten(1).norm(dim=1)[:, None, None])
                if name.endswith("log_theta"):
                    parameter.mul_(0.5).sub_(0.5)
            for source in range(len(fit.coder.inputs)):
                encoder = fit.coder.encoder(source)
                encoder.tokens_since_fired[::5] = 2 * DEAD_AFTER
                for buffer, value in {"window": 0.8, "threshold": 0.9, "aux_threshold": 0.2}.items():
                    if hasattr(encoder.rule, buffer):
                        getattr(encoder.rule, buffer).fill_(value)
            if fit.coder.anneal is not None:
                fit.coder.anneal.p.fill_(0.7)
                fit.coder.anneal.factor.fill_(1.3)
        made.append(fit)
    return made


class Replaced:
    """A dictionary of matrix.py with its changes of coordinates."""

    def __init__(self, fit: Fit, settings: Mapping[str, Any]) -> None:
        spec = fit.plan.spec
        self.reads, self.writes, self.layers = fit.reads, fit.writes, list(spec.layers)
        self.sae, self.across = spec.kind in ("sae", "crosscoder"), spec.kind == "crosscoder"
        parameters = {name: p.detach().clone().requires_grad_() for name, p in fit.coder.named_parameters()}
        dead = [fit.coder.encoder(source).dead(DEAD_AFTER) for source in range(len(fit.coder.inputs))]
        tensors = {name: buffer.clone() for name, buffer in fit.coder.named_buffers()} | parameters
        self.dense = Dense(tensors, {"aux_k": 3, **settings}, [space.total_variance for space in fit.writes], dead)
        self.dense.xs, self.dense.ys = [], []
        self.parameters, self.guesses = parameters, dict[int, Tensor]()

    def taken(self, layer: int, us: Mapping[int, Tensor], vs: Mapping[int, Tensor]) -> Tensor:
        """All sources are there at once, and may compete."""
        rows = [(vs if self.sae else us)[each] for each in self.layers]
        rows = [torch.cat(rows, 1)] if self.across else rows
        self.dense.xs = [(x - space.shift) / space.scale for x, space in zip(rows, self.reads, strict=True)]
        return rows[0 if self.across else self.layers.index(layer)]

    def value(self, layer: int, x_ND: Tensor) -> Tensor:
        """Raw reconstruction; earlier layers have been asked before."""
        j = self.layers.index(layer)
        if len(self.dense.xs) < len(self.reads):
            self.dense.xs = [*self.dense.xs, (x_ND - self.reads[j].shift) / self.reads[j].scale]
        self.dense.ys = [*self.dense.ys, torch.zeros(len(x_ND), len(self.writes[j].scale))]
        self.guesses[j] = self.dense.guess(j, [code.z for code in self.dense.codes()])
        return self.guesses[j] * self.writes[j].scale + self.writes[j].shift

    def terms(self, clean: Mapping[int, Tensor]) -> Tensor:
        """β · reconstruction + AuxK + penalties + the gates' own reconstruction."""
        spaces = zip(self.layers, self.writes, strict=True)
        self.dense.ys = [(clean[layer] - space.shift) / space.scale for layer, space in spaces]
        codes = self.dense.codes()
        left = [y - self.guesses[j] for j, y in enumerate(self.dense.ys)]
        return BETA * self.dense.reconstruction(codes) + self.dense.rest(codes, left)


def free(name: str, gradient: Tensor, fit: Fit) -> Tensor:
    """What is left of a gradient by the projection of rows that keep norm 1."""
    if not (fit.plan.spec.unit_norm and name.startswith("W_dec")):
        return gradient
    w = dict(fit.coder.named_parameters())[name].detach()
    return gradient - (gradient * w).sum((1, 2), keepdim=True) * w


@pytest.mark.parametrize(("kind", "rule", "mode"), CASES)
def test_gradients_through_the_model_are_those_of_the_dense_formulas(
    target: TransformerTarget, kind: str, rule: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = KINDS[kind] | RULES[rule]
    text = tiny.contexts(6)
    made = fits(target, {"writes": "mlp_out", "normalise": "per_dim", **settings}, batch_rows=60, mode=mode)
    dense = [Replaced(fit, settings) for fit in made]
    reference(target, dense, text, mode, "kl")
    for fit, (grads, _), want in zip(made, gradients(joined(made, target, text), monkeypatch), dense, strict=True):
        assert grads.keys() == {name for name, p in want.parameters.items() if p.grad is not None}
        for name, grad in grads.items():
            expected = want.parameters[name].grad
            assert expected is not None
            assert float(expected.abs().max()) > 0, name
            torch.testing.assert_close(
                free(name, grad, fit),
                free(name, expected, fit),
                rtol=1e-8,
                atol=1e-11,
                msg=lambda t, n=name: f"{n}: {t}",
            )
