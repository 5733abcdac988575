"""The update of a decomposition: Adam or AdamW on components and gates, the components' gradient clipped by itself."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from thresher.train.config import TrainConfig
from thresher.train.dictionary.decomposition import Decomposition
from thresher.train.meeting import Meeting
from thresher.train.optim import Optimiser

_KEPT = ("step", "exp_avg", "exp_avg_sq")
_WARMUP_RATE = 1e-3


class ComponentOptimiser(Optimiser):
    """As `Optimiser`, by torch's own rules: no row has a norm to keep."""

    def __init__(self, coder: Decomposition, config: TrainConfig) -> None:
        # Not the base class's: its rules go by encoders and decoder rows, which take gradients of their own.
        self.clip = config.resolved_clip
        self.trained = [parameter for parameter in coder.parameters() if parameter.requires_grad]
        self.clipped = coder.component_parameters
        decay = config.resolved_weight_decay if config.optimiser == "adamw" else 0.0
        groups = [
            {"params": [p for p in self.trained if (p.dim() > 1) is matrix], "weight_decay": decay if matrix else 0.0}
            for matrix in (True, False)
        ]
        self.inner = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)

    @torch.no_grad()
    def step(self, rate: float, finite: Tensor, meeting: Meeting | None = None) -> Tensor:
        """As `Optimiser.step`, of one rank; the norm is of all gradients, what is clipped that of the components."""
        assert meeting is None, "ranks do not share a decomposition"
        norm = self._norm(self.trained)
        norm = torch.where(finite & norm.isfinite(), norm, torch.inf)
        if bool(norm.isfinite()):
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.clipped, self.clip)
            for group in self.inner.param_groups:
                group["lr"] = rate
            self.inner.step()
        self.clear()
        return norm

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Bool scalar: whether all gradients are."""
        return self._norm(self.trained).isfinite()

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in self.trained:
            parameter.grad = None

    def release(self) -> None:
        """The same."""
        self.clear()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Weights are those to be evaluated and saved anyway."""
        yield

    def moments(self) -> dict[str, Tensor]:
        """As `Optimiser.moments`."""
        return {
            f"{index}.{key}": self.inner.state[parameter][key]
            for index, parameter in enumerate(self.trained)
            for key in _KEPT
            if key in self.inner.state.get(parameter, {})
        }

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """As `Optimiser.load_moments`."""
        for name, tensor in moments.items():
            index, key = name.split(".")
            parameter = self.trained[int(index)]
            place = torch.device("cpu") if key == "step" else parameter.device
            self.inner.state.setdefault(parameter, {})[key] = tensor.to(place)

    def forget(self) -> None:
        """Give back the memory of gradients and state; nothing can follow."""
        self.clear()
        self.inner.state.clear()

    @staticmethod
    def _norm(parameters: list[torch.nn.Parameter]) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def warm_up(coder: Decomposition, steps: int) -> None:
    """AdamW at 1e-3 on ‖Δ‖² over the number of entries alone: part of the initial weights, for it sees no text."""
    if steps == 0:
        return
    optimiser = torch.optim.AdamW(coder.component_parameters, lr=_WARMUP_RATE, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        (coder.left() / coder.entries).backward()
        optimiser.step()
    optimiser.zero_grad()
