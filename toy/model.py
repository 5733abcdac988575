"""The toy model, many at a time: f(x) = relu(x W_in) W_out, without biases.

W_in and W_out of K models are stacked, so that one batched product serves all of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.toy.inputs import stream


class Weights(NamedTuple):
    """K models of one size."""

    w_in: Tensor
    """[K, D, H]."""
    w_out: Tensor
    """[K, H, D]."""

    @property
    def models(self) -> int:
        """K."""
        return self.w_in.shape[0]

    def part(self, which: int | slice) -> "Weights":
        """Some of the models, as a stack again."""
        chosen = slice(which, which + 1 or None) if isinstance(which, int) else which
        return Weights(self.w_in[chosen], self.w_out[chosen])


def initial_weights(features: int, neurons: int, seed: int) -> Weights:
    """One model, uniform in ±√(6 / neurons) and ±√(6 / features) (toy.md §1), from the stream `weights`."""
    rng = stream(seed, "weights")
    bounds = ((features, neurons, (6 / neurons) ** 0.5), (neurons, features, (6 / features) ** 0.5))
    w_in, w_out = (
        torch.from_numpy(rng.uniform(-bound, bound, (rows, columns)).astype(np.float32))[None]
        for rows, columns, bound in bounds
    )
    return Weights(w_in, w_out)


def stacked(models: Sequence[Weights]) -> Weights:
    """All models of several stacks."""
    return Weights(*(torch.cat([getattr(one, name) for one in models]) for name in Weights._fields))


def forward(weights: Weights, x_RD: Tensor) -> Tensor:
    """f(x) of every model, [K, R, D]."""
    return (x_RD @ weights.w_in).clamp(min=0) @ weights.w_out


def linear_map(weights: Weights) -> Tensor:
    """A = (W_in W_out)ᵀ of every model, [K, D, D]: A[i, j] is the gain from input j to output i, indexed like M."""
    return (weights.w_in @ weights.w_out).mT


def rays(weights: Weights) -> tuple[Tensor, Tensor]:
    """f(+e_j) and f(-e_j) of every model in row j, [K, D, D] each: along a ray the model is linear."""
    return weights.w_in.clamp(min=0) @ weights.w_out, (-weights.w_in).clamp(min=0) @ weights.w_out
