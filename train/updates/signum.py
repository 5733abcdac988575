"""Schedule-free signum: signs of gradients, and an average of the weights in the place of a falling rate.

    u ← u − η sign(g(v))        x̄ ← (1 − c) x̄ + c u,  c = 1/t        v = (1 − μ) u + μ x̄

While training goes on the dictionary's parameters are v, where gradients are taken. What is evaluated, calibrated and
saved is x̄ (`averaged`); a checkpoint holds x̄ as the weights, and u and v beside it. Where decoder rows keep norm 1, so
do those of u, x̄ and v: projection and penalties presume it of v, and an average of unit vectors is shorter than 1, so
a saved x̄ would not have it by itself.

Clipping has no effect, since signs have no scale. Weights that have no gradient in a step stay as they are.
After Defazio et al. 2024, "The Road Less Scheduled"; Bernstein et al. 2018, "signSGD".
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from thresher.train.config import TrainConfig
from thresher.train.kernels import cpu
from thresher.train.kernels.choice import Implementation
from thresher.train.updates.rule import Parameters, Rule, Turn, count


class Signum(Rule):
    """On all parameters."""

    own = ("numba",)
    kept = ("step", "u", "mean")

    def __init__(self, parameters: Parameters, config: TrainConfig) -> None:
        super().__init__(parameters, config)
        self.momentum = config.resolved_momentum

    def of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's `u`, `mean` (x̄) and `step` (t); all are the weight before the first step."""
        state = self.state.setdefault(parameter, {})
        if not state:
            weight = parameter.detach()
            state |= {"step": count(parameter), "u": weight.clone(), "mean": weight.clone()}
        return state

    def begin(self) -> None:
        """Of all parameters."""
        for parameter in self.parameters.all:
            self.of(parameter)

    def by_rows(self, how: Implementation, rate: float, finite: Tensor) -> Tensor:
        """On a CPU every row is touched once."""

        def update(turn: Turn, scale: float) -> None:
            parameter, state = turn.parameter, self.of(turn.parameter)
            assert parameter.grad is not None
            state["step"] += 1
            share = 1 / float(state["step"])
            tensors = (parameter, parameter.grad, state["u"], state["mean"])
            places = (self.parameters.rows(parameter, tensor) for tensor in tensors)
            cpu.signum(*places, turn.along, rate, share, self.momentum, turn.unit)  # type: ignore[call-arg, arg-type]

        return self.by_cpu_rows(finite, update)

    def move(self, rate: float, norm: Tensor) -> None:
        """By library calls; where the norm is infinite, signs and the share are 0."""
        go = norm.isfinite()
        for parameter in self.parameters.with_gradient():
            state = self.of(parameter)
            assert parameter.grad is not None
            state["step"].add_(go)
            share = go / state["step"].clamp_min(1.0)
            state["u"].sub_(torch.where(go, parameter.grad, 0.0).sign_(), alpha=rate)
            state["mean"].lerp_(state["u"], share.to(parameter.dtype))
            if self.parameters.is_unit(parameter):
                for kept in ("u", "mean"):
                    rows = self.parameters.rows(parameter, state[kept])
                    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
                    rows.div_(torch.where(go, norms, 1.0))
            torch.mul(state["u"], 1 - self.momentum, out=parameter.detach())  # v; its norm is the frame's matter
            parameter.detach().add_(state["mean"], alpha=self.momentum)

    def plain(self, rate: float) -> "PlainSignum":
        """The three lines."""
        return PlainSignum(self, rate)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, weights are x̄. Nothing is copied: v waits in the place of x̄."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for parameter, state in self.state.items():
            parameter.data, state["mean"] = state["mean"], parameter.data
        self.parameters.changed()

    def restart(self, parameter: nn.Parameter, latents: Tensor) -> None:
        """Rows that were set anew are where u and x̄ go on from."""
        if parameter in self.state:
            for kept in ("u", "mean"):
                self.state[parameter][kept].index_copy_(0, latents, parameter.detach()[latents])

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """What `moments` gave inside `averaged`: the weights are x̄, and v lies in its place."""
        super().load_moments(moments)
        self._exchange()


class PlainSignum:
    """Signum spelled out, one parameter after the other."""

    def __init__(self, rule: Signum, rate: float) -> None:
        self.rule, self.rate = rule, rate

    def step(self) -> None:
        """Move u and x̄, and set v."""
        momentum = self.rule.momentum
        for parameter in self.rule.parameters.with_gradient():
            state = self.rule.of(parameter)
            assert parameter.grad is not None
            state["step"] += 1
            c = 1 / float(state["step"])
            state["u"] = state["u"] - self.rate * torch.sign(parameter.grad)
            state["mean"] = (1 - c) * state["mean"] + c * state["u"]
            if self.rule.parameters.is_unit(parameter):
                for kept in ("u", "mean"):
                    rows = self.rule.parameters.rows(parameter, state[kept])
                    state[kept] = normalize(rows, dim=1).view_as(parameter)
            parameter.copy_((1 - momentum) * state["u"] + momentum * state["mean"])
