"""Adam with a learning-rate rule, warm-up and decay, clipping, and unit decoder rows.

Order of one step: take the part along the row out of every decoder gradient, measure the global norm, clip, Adam,
renormalise the rows. Renormalising before the update would leave saved rows off unit norm.

`plain_step` is the specification. On a CPU all of it but the norm is one pass over each row, and the norm falls out of
the kernels that made the gradients (kernels/gradients.py): where a row's gradient is g + αw, w its weight, taking out
the part along w makes it g + α'w with α' = α − (g + αw)·w, and ‖g + α'w‖² = ‖g‖² + 2α' g·w + α'²‖w‖².

Elsewhere clipping and a guard against non-finite gradients ride in torch's fused kernel, which divides by `grad_scale`
and leaves parameters and step count alone when `found_inf` is set (both as torch.amp's scaler does): no further pass
over the gradients and, on CUDA, no synchronisation.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from thresher.train.config import TrainConfig
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.kernels import cpu
from thresher.train.kernels.gradients import Facts


def base_rate(config: TrainConfig, spec: DictionarySpec) -> float:
    """The learning rate at its plateau."""
    if config.lr == "auto":
        return 2e-4 / math.sqrt(spec.n_latents / 2**14)
    return float(config.lr)


def rate_factor(config: TrainConfig, step: int, total: int) -> float:
    """What the plateau is multiplied by at a step counted from 0."""
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    done = step / total
    fall = {
        "none": 1.0,
        "step": 0.1 if done >= 0.8 else 1.0,
        "tail": min(1.0, (1 - done) / 0.2),
        "linear": 1 - done,
    }[config.decay]
    return rise * fall


class Optimiser:
    """Adam on all parameters of one dictionary."""

    def __init__(self, coder: Coder, config: TrainConfig) -> None:
        self.parameters = list(coder.parameters())
        self.clip = config.clip
        self.coder = coder
        self._sinks = coder.gather()
        self._encoders = {(encoder := coder.encoder(source)).W_enc: encoder for source in range(len(coder.reads))}
        self._betas, self._eps = (config.beta1, config.beta2), config.eps
        self._unit = list(coder.W_dec) if coder.spec.unit_norm else []
        self.adam = torch.optim.Adam(self.parameters, lr=1.0, betas=self._betas, eps=config.eps, fused=True)

    @torch.no_grad()
    def step(self, rate: float, finite: Tensor) -> Tensor:
        """One update at a learning rate, or none when `finite` (bool scalar) or the gradient's norm is not.

        Returns the gradient's norm before clipping; infinite exactly when the update was left out.
        """
        first = self.parameters[0]
        how = self.coder.kernels.pick("update", first.device, first.dtype, sum(p.numel() for p in self.parameters))
        self._sinks.settle(whole=how not in ("numba", "triton"))
        ways = {"numba": self._by_rows, "triton": self._by_rows_on_device, "torch": self._fused, "plain": self._plain}
        norm = ways[how](rate, finite)
        if how != "triton":  # which writes a shorter copy of an encoder together with it
            for encoder in self._encoders.values():
                encoder.changed()
        self.clear()
        return norm

    def clear(self) -> None:
        """Forget all gradients."""
        self._sinks.clear()
        self.adam.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Forget all gradients and give their memory back, until the next step."""
        self.clear()
        self._sinks.release()

    def _by_rows(self, rate: float, finite: Tensor) -> Tensor:
        """On a CPU: every row is touched once, by kernels of our own."""
        turns = [self._turn(parameter) for parameter in self.parameters if parameter.grad is not None]
        norm = self.parameters[0].new_tensor(sum(turn.square for turn in turns) ** 0.5)
        if not bool(finite & norm.isfinite()):
            return torch.full_like(norm, torch.inf)
        scale = 1.0 if self.clip is None else 1 / max(1.0, float(norm) / self.clip)
        for turn in turns:
            weight, grad, m, v, step = self._matrices(turn.parameter)
            step += 1
            adam = cpu.adam(weight.dtype, rate, self._betas, self._eps, int(step))
            cpu.update(weight, grad, m, v, turn.along, scale, adam, turn.unit)
        return norm

    def _by_rows_on_device(self, rate: float, finite: Tensor) -> Tensor:
        """The same on CUDA, where nothing is read back: whether there is an update at all is decided over there."""
        from thresher.train.kernels import triton

        rows = [
            triton.Rows(*self._matrices(parameter), *self._noted(parameter), self._copy(parameter))
            for parameter in self.parameters
            if parameter.grad is not None
        ]
        norm: Tensor = triton.step(rows, rate, finite, self.clip, self._betas, self._eps)
        return norm

    def _copy(self, parameter: nn.Parameter) -> Tensor | None:
        """A weight's copy in a shorter format, which the update has to write too."""
        encoder = self._encoders.get(parameter)
        return None if encoder is None or encoder.matmul_dtype is None else encoder.low_weight()

    def _noted(self, parameter: nn.Parameter) -> tuple[Tensor | None, Facts | None, bool]:
        """Multiples of the weight that its gradient lacks, facts of what it has, and whether rows keep norm 1."""
        sink = self._sinks.find(parameter)
        unit = any(parameter is weight for weight in self._unit)
        return (None, None, unit) if sink is None else (sink.along, sink.facts(), unit)

    def _turn(self, parameter: nn.Parameter) -> "_Turn":
        """What a parameter's update needs to know of its gradient's rows."""
        noted, facts, unit = self._noted(parameter)
        assert parameter.grad is not None
        if facts is None:
            facts = cpu.facts_of(_rows(parameter), _rows(parameter.grad))
        if not unit and noted is None:
            return _Turn(parameter, unit, None, float(facts.squares.sum()))
        along = torch.zeros_like(facts.dots) if noted is None else noted.double()
        if unit:  # the part along the row: (g + along · w) · w
            along = along - (facts.dots + along * facts.weights)
        squares = facts.squares + 2 * along * facts.dots + along.square() * facts.weights
        return _Turn(parameter, unit, along.to(parameter.dtype), float(squares.clamp_min(0.0).sum()))

    def _matrices(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Weight, gradient and moments by rows, and the count of steps, in the place where torch keeps them."""
        state: dict[str, Tensor] = self.adam.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=None if parameter.device.type == "cpu" else parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        matrices = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        weight, grad, m, v = (_rows(tensor) for tensor in matrices)
        return weight, grad, m, v, state["step"]

    def _fused(self, rate: float, finite: Tensor) -> Tensor:
        """By library calls that read nothing back."""
        for weight in self._unit:
            project_rows(weight)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = torch.where(finite & norm.isfinite(), norm, torch.inf)
        self.adam.found_inf = (~norm.isfinite()).to(torch.float32)  # type: ignore[attr-defined]
        if self.clip is not None:
            self.adam.grad_scale = (norm / self.clip).clamp_min(1.0).nan_to_num(1.0)  # type: ignore[attr-defined]
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        for weight in self._unit:
            renormalise_rows(weight)
        return norm

    def _plain(self, rate: float, finite: Tensor) -> Tensor:
        """The specification, guarded."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not bool(finite & norm.isfinite()):
            return torch.full_like(norm, torch.inf)
        adam = torch.optim.Adam(self.parameters, lr=rate, betas=self._betas, eps=self._eps, foreach=False)
        adam.state = self.adam.state
        return plain_step(self.parameters, self._unit, adam, self.clip)

    def restart(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Forget what was gathered of some rows [n] of a parameter, which were set anew from outside."""
        for key in ("exp_avg", "exp_avg_sq"):
            if parameter in self.adam.state:
                self.adam.state[parameter][key].index_fill_(0, rows, 0.0)

    def moments(self) -> dict[str, Tensor]:
        """Adam's state by parameter position, for a checkpoint."""
        state = self.adam.state
        return {
            f"{index}.{key}": state[parameter][key]
            for index, parameter in enumerate(self.parameters)
            for key in ("step", "exp_avg", "exp_avg_sq")
            if parameter in state
        }

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """Put back what `moments` gave."""
        for name, tensor in moments.items():
            index, key = name.split(".")
            parameter = self.parameters[int(index)]
            self.adam.state[parameter][key] = tensor.to(parameter.device)


class _Turn(NamedTuple):
    """A parameter whose gradient is complete."""

    parameter: nn.Parameter
    unit: bool
    """Whether its rows keep norm 1."""
    along: Tensor | None
    """[F] multiples of the weight's rows that its gradient still lacks."""
    square: float
    """‖gradient‖², with those."""


def _rows(tensor: Tensor) -> Tensor:
    """A matrix by rows; a vector is one row."""
    return tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach()[None]


def project_rows(weight: nn.Parameter) -> None:
    """Remove from each row's gradient its part along the row (over all destinations together)."""
    if weight.grad is None:
        return
    rows, grad = weight.detach().flatten(1), weight.grad.flatten(1)
    grad.addcmul_(rows, torch.linalg.vecdot(grad, rows)[:, None], value=-1)


def renormalise_rows(weight: nn.Parameter) -> None:
    """Set every row's norm to 1, over all destinations together."""
    rows = weight.detach().flatten(1)
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


@torch.no_grad()
def plain_step(
    parameters: Sequence[nn.Parameter], unit: Sequence[nn.Parameter], adam: torch.optim.Adam, clip: float | None
) -> Tensor:
    """What `Optimiser.step` must equal, with an ordinary Adam: the ruled order spelled out. Returns the norm."""
    for weight in unit:
        assert weight.grad is not None
        rows, grad = weight.flatten(1), weight.grad.flatten(1)
        weight.grad = (grad - (grad * rows).sum(1, keepdim=True) * rows).view_as(weight)
    norm = torch.stack([(p.grad**2).sum() for p in parameters if p.grad is not None]).sum().sqrt()
    if clip is not None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= min(1.0, clip / float(norm))
    adam.step()
    for weight in unit:
        weight.copy_(torch.nn.functional.normalize(weight.flatten(1), dim=1).view_as(weight))
    return norm
