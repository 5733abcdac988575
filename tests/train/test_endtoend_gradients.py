"""Gradients of training end to end, in float64, against a GPT-2 and dictionaries written down densely here.

The model's blocks are called one after the other with a replacement in the place of each MLP's output; no hook, no
sparse code, no kernel of ours. Dictionaries are those of tests/train/dense.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train import tiny
from tests.train.dense import Dense, Rules, named
from thresher.cache.layout import Contexts
from thresher.harvest.target import TransformerTarget
from thresher.train.endtoend.contexts import Text
from thresher.train.endtoend.group import Group, group
from thresher.train.fit import Fit, Gradients
from thresher.train.kernels import firing as kernels_of_firing
from thresher.train.kernels import padded
from thresher.train.plan import RunPlan

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

FIRING: dict[str, dict[str, Any]] = {
    "topk": {"firing": "topk", "k": 3},
    "batchtopk": {"firing": "batchtopk", "k": 2.5},
    "jumprelu": {"firing": "jumprelu", "penalty": "target_l0", "k": 3, "sparsity": 0.5},
}
MODES = ("cascade", "clean_input", "single_site")
ALPHA, BETA, DEAD_AFTER = 1 / 32, 0.3, 2000
Edit = Callable[[int, Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def target() -> TransformerTarget:
    return tiny.gpt2(torch.float64)


def planned(
    target: TransformerTarget, kind: str, firing: str, dictionary: dict[str, Any] | None = None, **train: Any
) -> list[RunPlan]:
    """Dictionaries of two layers; `dictionary`: further settings of them."""
    settings: dict[str, Any] = {"kind": kind, "writes": "mlp_out", "normalise": "per_dim", "pre_bias": kind == "sae"}
    settings |= FIRING[firing] | (dictionary or {})
    return tiny.plans_for(target, "g", {"local_weight": BETA} | train, **settings)


def fits(
    target: TransformerTarget, kind: str, firing: str, dictionary: dict[str, Any] | None = None, **train: Any
) -> list[Fit]:
    """The same with random weights, every fifth latent dead."""
    made, rng = [], torch.Generator().manual_seed(11)
    for plan in planned(target, kind, firing, dictionary, **train):
        fit = Fit(plan, tiny.Statistics(), torch.device("cpu"))
        fit.coder.double()
        with torch.no_grad():
            for parameter in fit.coder.parameters():
                parameter.copy_(tiny.randomised(parameter, rng, 0.5))
            for source in range(len(plan.spec.reads)):
                encoder = fit.coder.encoder(source)
                encoder.tokens_since_fired[::5] = 2 * DEAD_AFTER
                if firing == "jumprelu":
                    encoder.rule.log_theta.fill_(-0.3)
                    encoder.rule.window.fill_(0.8)
        made.append(fit)
    return made


def joined(made: list[Fit], target: TransformerTarget, text: Contexts) -> Group:
    return group(made, target, Text(text, 3, torch.device("cpu")), None)


def gradients(made: Group, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    """Of one step: every parameter's gradient and the numbers to report, by dictionary; nothing is updated."""
    found = []

    def conclude(self: Fit, got: Gradients, finite: Tensor, parts: Any, consumed: int, ratios: Any) -> Tensor:
        assert bool(finite)
        grads = {name: p.grad.clone() for name, p in self.coder.named_parameters() if p.grad is not None}
        found.append((grads, {name: (pair[0] / pair[1]).item() for name, pair in ratios.items()}))
        self.forget_gradients()
        return torch.zeros(())

    monkeypatch.setattr(Fit, "conclude", conclude)
    made.step()
    return found


# The reference.


def run(target: TransformerTarget, tokens: Tensor, edit: Edit) -> Tensor:
    """Logits, with `edit(layer, u, v)` in the place of every MLP's output v of input u."""
    model = target.model
    h = model.transformer.wte(tokens) + model.transformer.wpe(torch.arange(tokens.shape[1]))
    for layer, block in enumerate(model.transformer.h):
        h = h + block.attn(block.ln_1(h))[0]
        u = block.ln_2(h)
        h = h + edit(layer, u, block.mlp(u))
    return model.lm_head(model.transformer.ln_f(h))


class Replacement(Protocol):
    """What `reference` asks of a dictionary."""

    layers: list[int]
    sae: bool

    def taken(self, layer: int, us: Mapping[int, Tensor], vs: Mapping[int, Tensor]) -> Tensor: ...
    def value(self, layer: int, x_ND: Tensor) -> Tensor: ...
    def terms(self, clean: dict[int, Tensor]) -> Tensor: ...


class Dictionary:
    """A dense dictionary with its changes of coordinates; sources and destinations by layer."""

    def __init__(self, fit: Fit, firing: str) -> None:
        spec = fit.plan.spec
        rules = Rules(
            firing=firing, k=spec.k, aux_k=3, dead_after=DEAD_AFTER, pre_bias=spec.pre_bias, sparsity=spec.sparsity
        )  # type: ignore[arg-type]
        self.dense = Dense(rules, named(fit.coder.state_dict()))
        for source, silent in enumerate(self.dense.silent):
            silent.copy_(fit.coder.encoder(source).tokens_since_fired)
        self.reads, self.writes, self.sae = fit.reads, fit.writes, spec.kind == "sae"
        self.layers, self.spec = list(spec.layers), spec
        self.xs: dict[int, Tensor] = {}
        self.codes: dict[int, tuple[Tensor, Tensor]] = {}
        self.guesses: dict[int, Tensor] = {}

    def taken(self, layer: int, us: Mapping[int, Tensor], vs: Mapping[int, Tensor]) -> Tensor:
        """What is read for a layer, of clean inputs and outputs of MLPs."""
        return (vs if self.sae else us)[layer]

    def value(self, layer: int, x_ND: Tensor) -> Tensor:
        """Raw reconstruction of a layer; what its own source reads is `x_ND`, earlier ones have been asked before."""
        j = self.layers.index(layer)
        x_ND = (x_ND - self.reads[j].shift) / self.reads[j].scale
        self.xs[j], self.codes[j] = x_ND, self.dense.fire(j, self.dense.preactivations(j, x_ND))
        guess = self.dense.b_dec[j].expand(len(x_ND), -1)
        for i in range(j + 1):
            guess = guess + self.codes[i][0] @ self.dense.W_dec[i][:, j - i]
        self.guesses[j] = guess
        return guess * self.writes[j].scale + self.writes[j].shift

    def terms(self, clean: dict[int, Tensor]) -> Tensor:
        """β·FVU + AuxK + penalty."""
        order = range(len(self.layers))
        ys = [(clean[self.layers[j]] - self.writes[j].shift) / self.writes[j].scale for j in order]
        errors = [ys[j] - self.guesses[j] for j in order]
        fvu = torch.stack([e.square().sum(1).mean() / self.writes[j].total_variance for j, e in enumerate(errors)])
        aux = self.dense.auxiliary([self.xs[j].detach() for j in order], errors)
        assert float(aux.detach()) > 0
        loss = BETA * fvu.mean() + ALPHA * aux
        if self.spec.sparsity:
            misses = [self.codes[j][1].sum(1).mean() / self.spec.k - 1 for j in order]
            loss = loss + self.spec.sparsity * torch.stack(misses).square().mean()
        return loss

    def named_gradients(self) -> dict[str, Tensor]:
        d = self.dense
        groups = {"encoders.{}.W_enc": d.W_enc, "encoders.{}.b_enc": d.b_enc, "W_dec.{}": d.W_dec}
        groups["encoders.{}.rule.log_theta"] = d.log_theta
        named = {form.format(i): p.grad for form, ps in groups.items() for i, p in enumerate(ps)}
        return named | {"b_dec": d.b_dec.grad}


def reference(
    target: TransformerTarget, dictionaries: Sequence[Replacement], text: Contexts, mode: str, objective: str
) -> tuple[float, float, float]:
    """Backward of the whole loss; KL, CE and clean CE per scored position (and per pass)."""
    tokens = torch.from_numpy(text.token_id.astype(np.int64))
    patch = torch.from_numpy(text.keep == 1)
    score = patch.clone()
    score[:, :-1] &= torch.from_numpy((text.keep[:, 1:] > 0) & (text.document_id[:, 1:] == text.document_id[:, :-1]))
    score[:, -1] = False
    us: dict[int, Tensor] = {}
    vs: dict[int, Tensor] = {}

    def note(layer: int, u: Tensor, v: Tensor) -> Tensor:
        us[layer], vs[layer] = u[patch].detach(), v[patch].detach()
        return v

    log_p = run(target, tokens, note).detach().log_softmax(-1)

    def put(v: Tensor, value_ND: Tensor) -> Tensor:
        out = v.clone()
        out[patch] = value_ND
        return out

    def scored(edit: Edit) -> tuple[Tensor, Tensor]:
        log_q = run(target, tokens, edit).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[score].mean()
        nll = -log_q[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        return kl, nll[score[:, :-1]].mean()

    by_layer = {layer: d for d in dictionaries for layer in d.layers}
    if mode == "cascade":
        passes = [lambda layer, u, v: put(v, by_layer[layer].value(layer, (v if by_layer[layer].sae else u)[patch]))]
    else:
        values = {layer: d.value(layer, d.taken(layer, us, vs)) for layer, d in sorted(by_layer.items())}
        passes = [lambda layer, u, v: put(v, values[layer])]
        if mode == "single_site":
            passes = [
                lambda layer, u, v, chosen=chosen: put(v, values[layer]) if layer == chosen else v
                for chosen in by_layer
            ]
    found = [scored(edit) for edit in passes]
    main = sum(pair[0] if objective == "kl" else pair[1] for pair in found)
    (main + sum(d.terms(vs) for d in dictionaries)).backward()
    nll = -log_p[:, :-1].gather(2, tokens[:, 1:, None])[..., 0][score[:, :-1]].mean()
    return (*(float(sum(pair[i].detach() for pair in found)) / len(found) for i in range(2)), float(nll))


@pytest.mark.parametrize("objective", ["kl", "ce"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("firing", FIRING)
@pytest.mark.parametrize("kind", ["sae", "transcoder", "clt"])
def test_every_gradient_is_that_of_the_dense_formulas(
    target: TransformerTarget, kind: str, firing: str, mode: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(target, kind, firing, monkeypatch, mode=mode, objective=objective)


@pytest.mark.parametrize("mode", MODES)
def test_plain_kernels_give_the_same(target: TransformerTarget, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(target, "clt", "batchtopk", monkeypatch, mode=mode, objective="kl", kernels="plain")


@pytest.mark.parametrize("firing", FIRING)
def test_selections_of_fixed_capacity_give_the_same(
    target: TransformerTarget, firing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_of_firing, "fixed_capacity", lambda a_NF, kernels: padded)  # as on a device
    compare(target, "clt", firing, monkeypatch, mode="cascade", objective="kl")


@pytest.mark.parametrize("mode", MODES)
def test_raw_activations_give_the_same(target: TransformerTarget, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"normalise": "none"}  # what is written is then a part of the sums that later sources add to in place
    compare(target, "clt", "batchtopk", monkeypatch, raw, mode=mode, objective="kl")


def compare(
    target: TransformerTarget,
    kind: str,
    firing: str,
    monkeypatch: pytest.MonkeyPatch,
    dictionary: dict[str, Any] | None = None,
    **train: Any,
) -> None:
    mode, objective = train["mode"], train["objective"]
    text = tiny.contexts(6)
    made = fits(target, kind, firing, dictionary, batch_rows=60, **train)
    dense = [Dictionary(fit, firing) for fit in made]
    kl, ce, ce_clean = reference(target, dense, text, mode, objective)
    found = gradients(joined(made, target, text), monkeypatch)
    for (grads, numbers), want in zip(found, dense, strict=True):
        expected = want.named_gradients()
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert float(grad.abs().max()) > 0, name
            torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-11, msg=name)
        assert numbers["ce_clean"] == pytest.approx(ce_clean, rel=1e-10)
        if mode != "single_site" or kind == "clt":
            assert (numbers["kl"], numbers["ce"]) == pytest.approx((kl, ce), rel=1e-10)
    if mode == "single_site":
        means = [sum(numbers[name] for _, numbers in found) / len(found) for name in ("kl", "ce")]
        assert means == pytest.approx([kl, ce], rel=1e-10)
    assert all(parameter.grad is None for parameter in target.model.parameters())
