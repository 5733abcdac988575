"""Muon for matrices, Adam for vectors.

    m ← μ m + (1 − μ) g        g' = (1 − μ) g + μ m        w ← (1 − ηλ) w − η · 0.2 √max(rows, columns) · orthogonal(g')

`orthogonal` takes g' near the closest matrix with equal singular values, by five Newton–Schulz steps with the
coefficients of Jordan et al. 2024 on g' / ‖g'‖_F; the factor gives the update the root mean square that Adam's has, so
one rate serves both (Liu et al. 2025, "Muon is Scalable for LLM Training"). In bfloat16 on CUDA, else in the weight's
own format.

A matrix is what updates/rule.py says: W_enc [F, D] and, of W_dec [F, T, E], every destination's [F, E] by itself: what
a source writes to one place has nothing to do with the scale of what it writes to another.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from thresher.train.config import TrainConfig
from thresher.train.dictionary.holding import Holding
from thresher.train.mesh import Group
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
            sheets = _sheets(g.lerp_(m, self.momentum))
            for weight, step in zip(_sheets(parameter.detach()), self.orthogonal(parameter, sheets), strict=True):
                weight.sub_(own_rate * (_SIZE * self.longest(parameter, weight) ** 0.5) * step.to(weight.dtype))
        self.vectors.move(rate, norm)

    def orthogonal(self, parameter: nn.Parameter, sheets: list[Tensor]) -> Iterable[Tensor]:
        """`orthogonal` of every matrix of a parameter, one at a time unless ranks share its rows."""
        holding = self._holding_of(parameter)
        low = torch.bfloat16 if sheets[0].device.type == "cuda" else sheets[0].dtype
        if holding is None:
            return (orthogonal(sheet, low) for sheet in sheets)
        return orthogonal_rows(sheets, low, holding.group)

    def _holding_of(self, parameter: nn.Parameter) -> Holding | None:
        return None if self.parameters.is_replicated(parameter) else self.parameters.holding

    def longest(self, parameter: nn.Parameter, weight: Tensor) -> int:
        """The longer side of a matrix of a parameter, all of its rows counted."""
        holding = self._holding_of(parameter)
        return max(weight.shape[0] if holding is None else holding.width, weight.shape[1])

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
            steps = self.rule.orthogonal(parameter, _sheets(ahead))
            for weight, step in zip(_sheets(parameter.detach()), steps, strict=True):
                size = 0.2 * self.rule.longest(parameter, weight) ** 0.5
                weight.copy_((1 - eta * self.rule.decay) * weight - eta * size * step.to(weight.dtype))
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


def orthogonal_rows(sheets: list[Tensor], dtype: torch.dtype, group: Group) -> list[Tensor]:
    """`orthogonal` of matrices [F, C] of which every rank has some rows; five collectives for all of them.

    Gram matrices over the columns, XᵀX [C, C], are sums over rows, and (bA + cA²) X = X (bB + cB²) with A = XXᵀ and
    B = XᵀX; the trace of the first is the norm's square.
    """
    X = torch.stack([sheet.to(dtype) for sheet in sheets])
    for step in range(_STEPS):
        B = X.mT @ X
        group.add_up([B])
        if step == 0:
            norm = B.diagonal(dim1=1, dim2=2).sum(1).sqrt().clamp_min(_TINY)[:, None, None]
            X, B = X / norm, B / norm.square()
        X = _A * X + X @ (_B * B + _C * (B @ B))
    return list(X.unbind())


def _sheets(weight: Tensor) -> list[Tensor]:
    """The matrices of a weight [R, C], or [F, T, E], one for each destination."""
    return [weight] if weight.dim() == 2 else list(weight.unbind(1))
