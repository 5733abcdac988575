"""Adam with a learning-rate rule, warm-up and decay, clipping, and unit decoder rows.

Order of one step: take the part along the row out of every decoder gradient, measure the global norm, clip, Adam,
renormalise the rows. Renormalising before the update would leave saved rows off unit norm.

Clipping and a guard against non-finite gradients ride in the fused kernel, which divides by `grad_scale` and leaves
parameters and step count alone when `found_inf` is set (both as torch.amp's scaler does): no further pass over the
gradients and, on CUDA, no synchronisation. `plain_step` is the specification.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from thresher.train.config import TrainConfig
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.spec import DictionarySpec


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
        betas = (config.beta1, config.beta2)
        self.adam = torch.optim.Adam(self.parameters, lr=1.0, betas=betas, eps=config.eps, fused=True)
        self._decoders = list(coder.W_dec) if coder.spec.unit_norm else []

    @torch.no_grad()
    def step(self, rate: float, finite: Tensor) -> Tensor:
        """One update at a learning rate, or none when `finite` (bool scalar) or the gradient's norm is not.

        Returns the gradient's norm before clipping; infinite exactly when the update was left out.
        """
        for weight in self._decoders:
            project_rows(weight)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = torch.where(finite & norm.isfinite(), norm, torch.inf)
        self.adam.found_inf = (~norm.isfinite()).to(torch.float32)  # type: ignore[attr-defined]
        if self.clip is not None:
            self.adam.grad_scale = (norm.float() / self.clip).clamp_min(1.0).nan_to_num(1.0)  # type: ignore[attr-defined]
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        for weight in self._decoders:
            renormalise_rows(weight)
        self.adam.zero_grad(set_to_none=True)
        return norm

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
) -> None:
    """What `Optimiser.step` must equal, with an ordinary Adam: the ruled order spelled out."""
    for weight in unit:
        assert weight.grad is not None
        rows, grad = weight.flatten(1), weight.grad.flatten(1)
        weight.grad = (grad - (grad * rows).sum(1, keepdim=True) * rows).view_as(weight)
    if clip is not None:
        norm = torch.stack([(p.grad**2).sum() for p in parameters if p.grad is not None]).sum().sqrt()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= min(1.0, clip / float(norm))
    adam.step()
    for weight in unit:
        weight.copy_(torch.nn.functional.normalize(weight.flatten(1), dim=1).view_as(weight))
