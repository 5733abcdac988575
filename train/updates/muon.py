"""Muon for matrices, Adam for vectors.

    m ← μ m + (1 − μ) g        g' = (1 − μ) g + μ m        w ← (1 − ηλ) w − η · 0.2 √max(rows, columns) · orthogonal(g')

`orthogonal` takes g' near the closest matrix with equal singular values, by five Newton–Schulz steps with the
coefficients of Jordan et al. 2024 on g' / ‖g'‖_F; the factor gives the update the root mean square that Adam's has, so
one rate serves both (Liu et al. 2025, "Muon is Scalable for LLM Training"). In bfloat16 on CUDA, else in the weight's
own format.

A matrix is what updates/rule.py says: W_enc [F, D] and, of W_dec [F, T, E], every destination's [F, E] by itself: what
a source writes to one place has nothing to do with the scale of what it writes to another.
"""

import torch
from torch import Tensor, nn

from thresher.train.config import TrainConfig
from thresher.train.updates.adam import Adam
from thresher.train.updates.rule import Parameters, Rule

_STEPS = 5
_A, _B, _C = 3.4445, -4.775, 2.0315
_TINY = 1e-12
_SIZE = 0.2


class Muon(Rule):
    """On all parameters."""

    kept = ("step", "momentum", *Adam.kept[1:])

    def __init__(self, parameters: Parameters, config: TrainConfig) -> None:
        super().__init__(parameters, config)
        self.momentum, self.decay = config.resolved_momentum, config.resolved_weight_decay
        self.vectors = Adam(parameters, config, [p for p in parameters.all if not parameters.is_matrix(p)])
        self.state = self.vectors.state

    def of(self, parameter: nn.Parameter) -> Tensor:
        """A matrix's m; 0 before the first step."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]

    def begin(self) -> None:
        """m of matrices, and Adam's state of vectors."""
        self.vectors.begin()
        for parameter in self.parameters.matrices:
            self.of(parameter)

    def matrices(self) -> list[nn.Parameter]:
        """Those with a gradient."""
        return [parameter for parameter in self.parameters.matrices if parameter.grad is not None]

    def move(self, rate: float, norm: Tensor) -> None:
        """By library calls; where the norm is infinite, the gradient gives way to the momentum and the rate is 0."""
        go = norm.isfinite()
        scale = torch.ones_like(norm) if self.clip is None else (self.clip / norm).clamp_max(1.0)
        for parameter in self.matrices():
            m = self.of(parameter)
            assert parameter.grad is not None
            g = torch.where(go, parameter.grad * scale.to(m.dtype), m)
            m.lerp_(g, 1 - self.momentum)
            own_rate = (rate * go).to(m.dtype)
            parameter.detach().mul_(1 - own_rate * self.decay)
            for weight, ahead in zip(_sheets(parameter.detach()), _sheets(g.lerp_(m, self.momentum)), strict=True):
                low = torch.bfloat16 if ahead.device.type == "cuda" else ahead.dtype
                weight.sub_(own_rate * (_SIZE * max(weight.shape) ** 0.5) * orthogonal(ahead, low).to(weight.dtype))
        self.vectors.move(rate, norm)

    def plain(self, rate: float) -> "PlainMuon":
        """The three lines, and Adam's."""
        return PlainMuon(self, rate)


class PlainMuon:
    """Muon spelled out, one parameter after the other."""

    def __init__(self, rule: Muon, rate: float) -> None:
        self.rule, self.rate = rule, rate

    def step(self) -> None:
        """Move all parameters."""
        mu, eta = self.rule.momentum, self.rate
        for parameter in self.rule.matrices():
            m, g = self.rule.of(parameter), parameter.grad
            assert g is not None
            m.copy_(mu * m + (1 - mu) * g)
            ahead = (1 - mu) * g + mu * m
            for weight, part in zip(_sheets(parameter.detach()), _sheets(ahead), strict=True):
                rows, columns = weight.shape
                step = orthogonal(part, torch.bfloat16 if part.is_cuda else part.dtype).to(weight.dtype)
                weight.copy_((1 - eta * self.rule.decay) * weight - eta * 0.2 * max(rows, columns) ** 0.5 * step)
        self.rule.vectors.plain(eta).step()


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, C] in `dtype`: singular values of the matrix moved to about 1 (between 0.7 and 1.2), directions kept."""
    wide = matrix.shape[0] <= matrix.shape[1]
    X = (matrix if wide else matrix.T).to(dtype)  # products of the shorter side
    X = X / torch.linalg.vector_norm(X).clamp_min(_TINY)
    for _ in range(_STEPS):
        A = X @ X.T
        X = _A * X + (_B * A + _C * (A @ A)) @ X
    return X if wide else X.T


def _sheets(weight: Tensor) -> list[Tensor]:
    """The matrices of a weight [R, C], or [F, T, E], one for each destination."""
    return [weight] if weight.dim() == 2 else list(weight.unbind(1))
