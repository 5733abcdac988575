"""Adam, and AdamW: the same with a decoupled decay of the matrices.

w ← (1 − ηλ) w − η m̂ / (√v̂ + ε), with m̂ and v̂ the means of g and g² that decay by β₁ and β₂, freed of their zero start;
λ = 0 in Adam and for vectors. After Kingma and Ba 2015, Loshchilov and Hutter 2019.

On a CPU all of it but the norm is one pass over each row, and on CUDA one kernel. Elsewhere clipping and the guard
against non-finite gradients ride in torch's fused kernel, which divides by `grad_scale` and leaves parameters and step
count alone when `found_inf` is set (both as torch.amp's scaler does): no further pass over the gradients and, on CUDA,
no synchronisation.
"""

import torch
from torch import Tensor, nn

from thresher.train.config import TrainConfig
from thresher.train.kernels import cpu
from thresher.train.kernels.choice import Implementation
from thresher.train.updates.rule import Parameters, Rule, Turn, count

_OF = type[torch.optim.Adam] | type[torch.optim.AdamW]


class Adam(Rule):
    """On all parameters, or on the `only` ones."""

    own = ("numba", "triton")
    kept = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, parameters: Parameters, config: TrainConfig, only: list[nn.Parameter] | None = None) -> None:
        super().__init__(parameters, config)
        self._betas, self._eps = (config.beta1, config.beta2), config.eps
        self._decay = config.resolved_weight_decay if config.optimiser == "adamw" else 0.0
        self._only = parameters.all if only is None else only
        self._fused = self._torch(rate=1.0, fused=True)
        self.state = self._fused.state  # type: ignore[assignment]

    def _torch(self, rate: float, **options: bool) -> torch.optim.Adam:
        """torch's own, matrices and vectors in two groups where they differ."""
        if not self._decay:
            return torch.optim.Adam(self._only, lr=rate, betas=self._betas, eps=self._eps, **options)
        groups = [
            {"params": [p for p in self._only if self.parameters.is_matrix(p) is whole], "weight_decay": decay}
            for whole, decay in ((True, self._decay), (False, 0.0))
        ]
        return torch.optim.AdamW(groups, lr=rate, betas=self._betas, eps=self._eps, **options)

    def by_rows(self, how: Implementation, rate: float, finite: Tensor) -> Tensor:
        """Every row is touched once, by kernels of our own."""
        if how == "triton":
            return self._on_device(rate, finite)

        def update(turn: Turn, scale: float) -> None:
            weight, grad, m, v, step = self.matrices(turn.parameter)
            step += 1
            numbers = cpu.adam(weight.dtype, rate, self._betas, self._eps, int(step), self._decay_of(turn.parameter))
            cpu.update(weight, grad, m, v, turn.along, scale, numbers, turn.unit)

        return self.by_cpu_rows(finite, update)

    def _on_device(self, rate: float, finite: Tensor) -> Tensor:
        """The same on CUDA, where nothing is read back: whether there is an update at all is decided over there."""
        from thresher.train.kernels import triton

        known = self.parameters
        turns = [
            triton.Rows(*self.matrices(p), *known.noted(p), known.copy(p), self._decay_of(p))
            for p in known.with_gradient()
        ]
        norm: Tensor = triton.step(turns, rate, finite, self.clip, self._betas, self._eps)
        return norm

    def _decay_of(self, parameter: nn.Parameter) -> float:
        return self._decay if self._decay and self.parameters.is_matrix(parameter) else 0.0

    def of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's state; 0 before the first step."""
        state = self.state[parameter]
        if not state:
            state["step"] = count(parameter)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def begin(self) -> None:
        """Of all parameters, or of the `only` ones."""
        for parameter in self._only:
            self.of(parameter)

    def matrices(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Weight, gradient and moments by rows, and the count of steps, in the place where torch keeps them."""
        state = self.of(parameter)
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        weight, grad, m, v = (self.parameters.rows(parameter, tensor) for tensor in tensors)
        return weight, grad, m, v, state["step"]

    def move(self, rate: float, norm: Tensor) -> None:
        """By torch's fused kernel."""
        self._fused.found_inf = (~norm.isfinite()).to(torch.float32)  # type: ignore[attr-defined]
        if self.clip is not None:
            scale = (norm / self.clip).clamp_min(1.0).nan_to_num(1.0)
            self._fused.grad_scale = scale.to(torch.float32)  # type: ignore[attr-defined]
        for group in self._fused.param_groups:
            group["lr"] = rate
        self._fused.step()

    def plain(self, rate: float) -> torch.optim.Adam:
        """torch's, one parameter after the other."""
        spelled = self._torch(rate, foreach=False)
        spelled.state = self.state  # type: ignore[assignment]
        return spelled
