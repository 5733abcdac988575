"""The frame of an update: learning-rate rule, warm-up and decay, clipping, unit decoder rows, and the guard.

Order of one step: take the part along the row out of every decoder gradient, measure the global norm, clip, the update
rule (train/updates/), renormalise the rows. Renormalising before the update would leave saved rows off unit norm. A
loss or gradient that is not finite leaves the update out; on CUDA nobody waits to hear of it.

`plain_step` is the specification. Where a rule has kernels that touch each row once, they do all of it but the norm,
which falls out of the kernels that made the gradients (kernels/gradients.py): where a row's gradient is g + αw, w its
weight, taking out the part along w makes it g + α'w with α' = α − (g + αw)·w, and
‖g + α'w‖² = ‖g‖² + 2α' g·w + α'²‖w‖².
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from thresher.train.config import TrainConfig
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.meeting import Meeting
from thresher.train.updates.adam import Adam
from thresher.train.updates.muon import Muon
from thresher.train.updates.rule import Parameters, Rule, Steps
from thresher.train.updates.signum import Signum

RULES: dict[str, type[Rule]] = {"adam": Adam, "adamw": Adam, "signum": Signum, "muon": Muon}

_RATES = {"adam": 2e-4, "adamw": 2e-4, "signum": 5e-3}
"""At 2¹⁴ latents; they fall with the root of the number. Muon's 2e-3 does not depend on it."""


def base_rate(config: TrainConfig, spec: DictionarySpec) -> float:
    """The learning rate at its plateau."""
    if config.lr != "auto":
        return float(config.lr)
    if config.optimiser == "muon":
        return 2e-3
    return _RATES[config.optimiser] / math.sqrt(spec.n_latents / 2**14)


def rate_factor(config: TrainConfig, step: int, total: int) -> float:
    """What the plateau is multiplied by at an optimiser step counted from 0."""
    warmup = config.resolved_warmup
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    done = step / total
    fall = {
        "none": 1.0,
        "step": 0.1 if done >= 0.8 else 1.0,
        "tail": min(1.0, (1 - done) / 0.2),
        "linear": 1 - done,
        "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * done)),
    }[config.resolved_decay]
    return rise * fall


class Optimiser:
    """One dictionary's update: the frame around a rule."""

    def __init__(self, coder: Coder, config: TrainConfig) -> None:
        self.coder, self.clip = coder, config.resolved_clip
        self.parameters = Parameters(coder)
        self.rule = RULES[config.optimiser](self.parameters, config)

    @torch.no_grad()
    def step(self, rate: float, finite: Tensor, meeting: Meeting | None = None) -> Tensor:
        """One update at a learning rate, or none when `finite` (bool scalar) or the gradient's norm is not.

        `meeting`: of ranks that share the latents, which hold it once all know their part of the norm.
        Returns the gradient's norm before clipping; infinite exactly when the update was left out.
        """
        every = self.parameters.all
        size = sum(p.numel() for p in every)
        own = self.rule.own if meeting is None else [name for name in self.rule.own if name != "triton"]
        how = self.coder.kernels.pick("update", every[0].device, every[0].dtype, size, own)
        self.parameters.meeting = meeting
        self.parameters.sinks.settle(whole=how not in self.rule.own)
        if how in self.rule.own:
            norm = self.rule.by_rows(how, rate, finite)
        else:
            norm = (self._plain if how == "plain" else self._by_calls)(rate, finite)
        if how != "triton":  # which writes a shorter copy of an encoder together with it
            self.parameters.changed()
        self.clear()
        return norm

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Bool scalar: whether all gradients are. For dictionaries of which either all are updated or none."""
        self.parameters.sinks.settle(whole=True)
        grads = [p.grad for p in self.parameters.all if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads).isfinite()

    def clear(self) -> None:
        """Forget all gradients."""
        self.parameters.sinks.clear()
        self.coder.partial.clear()
        for parameter in self.parameters.all:
            parameter.grad = None

    def release(self) -> None:
        """Forget all gradients and give their memory back, until the next step."""
        self.clear()
        self.parameters.sinks.release()

    def _by_calls(self, rate: float, finite: Tensor) -> Tensor:
        """By library calls that, on CUDA, read nothing back."""
        for weight in self.parameters.unit:
            project_rows(self.parameters.rows(weight, weight), self.parameters.rows(weight, weight.grad))
        norm = self.parameters.norm()
        norm = torch.where(finite & norm.isfinite(), norm, torch.inf)
        if norm.device.type == "cpu" and not bool(norm.isfinite()):
            return norm
        self.rule.move(rate, norm)
        for weight in self.parameters.unit:
            renormalise_rows(self.parameters.rows(weight, weight))
        return norm

    def _plain(self, rate: float, finite: Tensor) -> Tensor:
        """The specification, guarded."""
        if self.parameters.meeting is not None:
            return self._plain_shared(rate, finite)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.all if p.grad is not None])
        if not bool(finite & norm.isfinite()):
            return torch.full_like(norm, torch.inf)
        return plain_step(
            self.parameters.all, self.parameters.unit, self.rule.plain(rate), self.clip, self.parameters.apart
        )

    def _plain_shared(self, rate: float, finite: Tensor) -> Tensor:
        """The same where the norm takes a collective, so that there is one look at it, after the projection."""
        known: list[Tensor] = []

        def measure() -> Tensor:
            norm = self.parameters.norm()
            known.append(torch.where(finite & norm.isfinite(), norm, torch.inf))
            return known[0]

        plain_step(
            self.parameters.all,
            self.parameters.unit,
            self.rule.plain(rate),
            self.clip,
            self.parameters.apart,
            measure,
        )
        return known[0]

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the dictionary's weights are those to be evaluated and saved (updates/signum.py)."""
        return self.rule.averaged()

    def restart(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Forget what was gathered of some rows [n] of a parameter, which were set anew from outside."""
        self.rule.restart(parameter, rows)

    def moments(self) -> dict[str, Tensor]:
        """The rule's state by parameter position, for a checkpoint; beside weights from inside `averaged`."""
        return self.rule.moments()

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """Put back what `moments` gave, after the weights saved with it."""
        self.rule.load_moments(moments)

    def forget(self) -> None:
        """Give back the memory of gradients and state; nothing can follow."""
        self.release()
        self.rule.state.clear()


def project_rows(rows: Tensor, grad: Tensor | None) -> None:
    """Remove from each row's gradient its part along the row."""
    if grad is not None:
        grad.addcmul_(rows, torch.linalg.vecdot(grad, rows)[:, None], value=-1)


def renormalise_rows(rows: Tensor) -> None:
    """Set every row's norm to 1."""
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


@torch.no_grad()
def plain_step(
    parameters: Sequence[nn.Parameter],
    unit: Sequence[nn.Parameter],
    rule: Steps,
    clip: float | None,
    apart: bool = False,
    measure: Callable[[], Tensor] | None = None,
) -> Tensor:
    """What `Optimiser.step` must equal, with an ordinary optimiser: the ruled order spelled out. Returns the norm.

    `apart`: every destination's part of a row of `unit` is a row of its own. `measure`: the norm, where these are not
    all parameters; if it is infinite nothing is moved.
    """
    for weight in unit:
        assert weight.grad is not None
        rows, grad = (t.flatten(0, 1) if apart else t.flatten(1) for t in (weight, weight.grad))
        weight.grad = (grad - (grad * rows).sum(1, keepdim=True) * rows).view_as(weight)
    if measure is None:
        norm = torch.stack([(p.grad**2).sum() for p in parameters if p.grad is not None]).sum().sqrt()
    elif not bool((norm := measure()).isfinite()):
        return norm
    if clip is not None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= min(1.0, clip / float(norm))
    rule.step()
    for weight in unit:
        rows = torch.nn.functional.normalize(weight.flatten(0, 1) if apart else weight.flatten(1), dim=1)
        weight.copy_(rows.view_as(weight))
    return norm
