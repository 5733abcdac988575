"""A decomposition's gates, losses and masks, and its whole step, against plain formulas in float64."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train import tiny
from tests.train.test_decomposition import SETTINGS, D, H
from thresher.evaluate.splice import cascade_edits
from thresher.harvest.target import TransformerTarget
from thresher.train import decompose
from thresher.train.dictionary.decomposition import Decomposition
from thresher.train.dictionary.topologies import build
from thresher.train.endtoend.contexts import Text
from thresher.train.endtoend.decomposed import DecompositionFit, Decompositions


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Gates and losses.


def test_gates_learn_below_zero_only_where_descent_would_raise_them() -> None:
    gamma = torch.tensor([-0.5, -0.5, 0.0, 0.3, 0.3, 1.0, 1.5, 1.5], dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([2.0, -2.0, -1.0, 2.0, -2.0, 3.0, 2.0, -2.0], dtype=torch.float64)
    g = decompose.lower_leaky(gamma)
    assert g.tolist() == [0, 0, 0, 0.3, 0.3, 1, 1, 1]
    (found,) = torch.autograd.grad(g, gamma, slope)
    assert found.tolist() == pytest.approx([0, -0.02, -0.01, 2, -2, 3, 0, 0])


def test_the_minimality_loss_sees_gates_above_one_and_none_below_zero() -> None:
    gamma = torch.tensor([-0.5, 0.0, 0.3, 1.5], dtype=torch.float64, requires_grad=True)
    upper = decompose.upper_leaky(gamma)
    assert upper.tolist() == pytest.approx([0, 0, 0.3, 1.005])
    (found,) = torch.autograd.grad(upper.sum(), gamma)
    assert found.tolist() == pytest.approx([0, 0, 1, 0.01])


@pytest.mark.parametrize("p", [2.0, 0.4])
def test_minimality_and_its_gradient_are_those_of_the_sum_spelled_out(p: float) -> None:
    gammas = [random(7, 5).requires_grad_(), random(7, 3, seed=1).requires_grad_()]
    found = decompose.minimality(gammas, p, 0.1)
    expected = torch.zeros((), dtype=torch.float64)
    for gamma in gammas:
        for c in range(gamma.shape[1]):
            mu = torch.zeros((), dtype=torch.float64)
            for n in range(7):
                value = gamma[n, c]
                if value > 1:
                    mu = mu + (1 + 0.01 * (value - 1) + 1e-12) ** p / 7
                elif value > 0:
                    mu = mu + (value + 1e-12) ** p / 7
                else:
                    mu = mu + 1e-12**p / 7
            expected = expected + mu + 0.1 * mu * torch.log(1 + 7 * mu) / math.log(2)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, gammas), torch.autograd.grad(expected, gammas), strict=True):
        torch.testing.assert_close(one, other)
    assert [decompose.exponent((2.0, 0.4), step, 4) for step in (0, 2, 4)] == pytest.approx([2, 1.2, 0.4])


def test_a_masked_product_is_its_components_and_its_share_of_what_they_leave() -> None:
    x, W, V, U = random(6, 4), random(5, 4, seed=1), random(4, 3, seed=2), random(3, 5, seed=3)
    m, delta = random(6, 3, seed=4), random(6, 1, seed=5)
    leaves = [t.requires_grad_() for t in (x, V, U, m, delta)]
    found = decompose.masked(x, W, V, U, decompose.Mask(m, delta))
    left = W - (V @ U).T
    expected = torch.einsum("nd,dc,nc,ce->ne", x, V, m, U) + delta * (x @ left.T)
    torch.testing.assert_close(found, expected)
    slope = random(6, 5, seed=6)
    pairs = zip(torch.autograd.grad(found, leaves, slope), torch.autograd.grad(expected, leaves, slope), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)
    squares = decompose.squares(W, V, U)
    assert float(squares.detach()) == pytest.approx(float(left.detach().square().sum()))
    again = (W - (V @ U).T).square().sum()
    for one, other in zip(torch.autograd.grad(squares, (V, U)), torch.autograd.grad(again, (V, U)), strict=True):
        torch.testing.assert_close(one, other)


def test_masks_follow_from_seed_and_step_and_route_one_to_all_matrices() -> None:
    like = torch.zeros(())
    draws = decompose.draw(3, 5, 4000, [6, 7, 6, 7], like)
    again, other = decompose.draw(3, 5, 4000, [6, 7, 6, 7], like), decompose.draw(3, 6, 4000, [6, 7, 6, 7], like)
    assert torch.equal(draws.routed, again.routed)
    assert all(torch.equal(a, b) for a, b in zip(draws.r, again.r, strict=True))
    assert not torch.equal(draws.r[0], other.r[0])
    counts = torch.bincount(draws.routed.sum(1), minlength=5)
    assert counts[0] == 0
    assert (counts[1:] / 4000 - 0.25).abs().max() < 0.03
    assert (draws.routed.double().mean(0) - 2.5 / 4).abs().max() < 0.04
    g = torch.rand(4000, 7)
    made = decompose.mask(g, draws, 1)
    routed = draws.routed[:, 1]
    assert torch.equal(made.m[~routed], torch.ones_like(made.m[~routed]))
    assert torch.equal(made.delta[~routed], torch.ones_like(made.delta[~routed]))
    torch.testing.assert_close(made.m[routed], (g + (1 - g) * draws.r[1])[routed])


# Through the model.


def group_of(target: TransformerTarget, **train_settings: Any) -> Decompositions:
    """Of a float64 model, with weights of no special form; nothing warmed up."""
    cpu, contexts = torch.device("cpu"), tiny.contexts(12)
    plans = tiny.plans_for(target, "g", {"batch_rows": 40, **train_settings}, **SETTINGS)
    source: Any = tiny.Statistics()
    fits = [DecompositionFit(plan, source, cpu, None, 10, target) for plan in plans]
    for index, fit in enumerate(fits):
        fit.module.double().take(target.mlp_matrices(index))
        with torch.no_grad():
            rng = torch.Generator().manual_seed(index)
            for parameter in fit.optimiser.trained:  # type: ignore[attr-defined]
                parameter.copy_(tiny.randomised(parameter, rng, 0.5))
    return Decompositions(fits, target, Text(contexts, 0, cpu), None, 4, None)


class Spelled:
    """The whole loss of a step, from the equations, by plain autograd."""

    def __init__(self, group: Decompositions, step: int, total: int) -> None:
        (self.part,) = group.text.step(0, group.contexts).parts
        self.modules, self.target = [fit.module for fit in group.fits], group.target  # type: ignore[attr-defined]
        self.p = 2 + (0.4 - 2) * step / total
        reads = [f"L0{i}.mlp_in" for i in range(2)]
        seen = self.target.record(self.part.tokens, self.target.sites(reads))
        rows = [seen[site].clone().flatten(0, 1)[self.part.patched] for site in reads]
        self.draws = decompose.draw(0, step, len(rows[0]), [12, 14, 12, 14], rows[0])
        self.gammas = []
        for x, m in zip(rows, self.modules, strict=True):
            hidden = torch.nn.functional.gelu(x @ m.W_gate.T + m.b_gate)
            self.gammas.append([hidden @ m.encoder(s).W_enc.T + m.encoder(s).b_enc for s in (0, 1)])
        self.live: dict[int, Tensor] = {}

    def loss(self) -> Tensor:
        left = [(m.matrix(s) - (m.V[s] @ m.U[s]).T).square().sum() for m in self.modules for s in (0, 1)]
        small = torch.stack([decompose.minimality(own, self.p, 0.1) for own in self.gammas]).sum()
        return 20.0 * torch.stack(left).sum() / (4 * D * H) + 1e-3 * small + 0.5 * self.kl()

    def kl(self) -> Tensor:
        edits: dict[str, Any] = {f"L0{i}.mlp_in": functools.partial(self.read, i) for i in range(2)}
        edits |= {f"L0{i}.mlp_out": functools.partial(self.write, i) for i in range(2)}
        log_p, log_q = (
            self.target.logits(self.part.tokens, given).log_softmax(-1).flatten(0, 1)[self.part.scored]
            for given in ({}, edits)
        )
        return (log_p.exp() * (log_p - log_q)).sum() / len(self.part.scored)

    def read(self, i: int, x: Tensor) -> None:
        self.live[i] = x.flatten(0, 1)[self.part.patched]

    def write(self, i: int, x: Tensor) -> Tensor:
        value, module = self.live[i], self.modules[i]
        for s in (0, 1):
            index = 2 * i + s
            g, W = gate(self.gammas[i][s]), module.matrix(s)
            m = g + (1 - g) * self.draws.r[index]
            through = (m * (value @ module.V[s])) @ module.U[s]
            left = W - (module.V[s] @ module.U[s]).T
            through = through + self.draws.delta[:, index : index + 1] * (value @ left.T)
            value = torch.where(self.draws.routed[:, index : index + 1], through, value @ W.T)
            value = value + (module.b_first if s == 0 else module.b_dec[0])
            value = torch.nn.functional.gelu(value, approximate="tanh") if s == 0 else value
        return x.flatten(0, 1).index_copy(0, self.part.patched, value).view_as(x)


def gate(gamma: Tensor) -> Tensor:
    """g, below zero by a term of value 0 whose gradient is cut where it is positive."""
    leak = torch.where(gamma <= 0, 0.01 * gamma - (0.01 * gamma).detach(), 0.0)
    leak.register_hook(lambda slope: slope.clamp_max(0))
    return torch.where(gamma > 0, gamma.clamp(max=1), 0.0) + leak


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_a_steps_gradients_are_those_of_the_whole_loss_spelled_out(kernels: str, monkeypatch: Any) -> None:
    group = group_of(tiny.gpt2(torch.float64), kernels=kernels)
    caught: dict[str, Tensor] = {}

    def conclude(self: DecompositionFit, *rest: Any) -> Tensor:
        named = self.module.named_parameters()
        caught.update({f"{self.plan.name}.{n}": p.grad.clone() for n, p in named if p.grad is not None})
        return torch.zeros(())

    monkeypatch.setattr(DecompositionFit, "conclude", conclude)
    for fit in group.fits:
        fit.done = 4
    group.step()
    trained = {
        f"{fit.plan.name}.{name}": weight
        for fit in group.fits
        for name, weight in fit.coder.named_parameters()
        if weight.requires_grad
    }
    assert caught.keys() == trained.keys()
    wanted = torch.autograd.grad(Spelled(group, 4, 10).loss(), list(trained.values()))
    for name, grad in zip(trained, wanted, strict=True):
        torch.testing.assert_close(caught[name], grad, rtol=1e-8, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def exact(target: TransformerTarget, layer: int) -> Decomposition:
    """Every input dimension a component, all gates open: Δ = 0."""
    spec = tiny.plans_for(target, "g", **SETTINGS | {"components": (D, H)})[layer].spec
    module = build(spec).double()
    assert isinstance(module, Decomposition)
    module.take(target.mlp_matrices(layer))
    with torch.no_grad():
        for s in range(2):
            module.V[s].copy_(torch.eye(module.V[s].shape[0]))
            module.U[s].copy_(module.matrix(s).T)
            module.gate(s).b_enc.fill_(2.0)
    return module


def test_all_components_without_a_rest_are_the_targets_mlp() -> None:
    target = tiny.gpt2(torch.float64)
    modules = [exact(target, layer) for layer in range(2)]
    contexts = tiny.contexts(6)
    tokens, patch = torch.from_numpy(contexts.token_id).long(), torch.from_numpy(contexts.keep == 1)
    clean = target.logits(tokens)
    assert all(float(module.left().detach()) == 0 for module in modules)
    torch.testing.assert_close(target.logits(tokens, cascade_edits(modules, patch)), clean, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for module in modules:
            module.gate(1).b_enc[3] = -2.0
    apart = (target.logits(tokens, cascade_edits(modules, patch)) - clean).abs().max()
    assert float(apart) > 1e-3, "a component that is closed is missed"
