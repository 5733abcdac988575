"""Input rows of a toy model by number: what a token of it is.

Row t is a pure function of the seed and t: feature j of it hangs on a hash of (seed, t, j), so rows need no memory,
come out the same on every device and in any order, and are as many as there are token ids. The hash is SplitMix64's
finaliser (Steele, Lea and Flood 2014), whose integers wrap.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thresher.cache.errors import UserError

ROWS = 1 << 31
"""Token ids that there are, so rows that can be had."""
_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB as signed integers."""


@dataclass(frozen=True, kw_only=True)
class ToyInputs:
    """How the rows of a toy model are distributed."""

    mode: Literal["bernoulli", "single", "pairs"] = "bernoulli"
    """bernoulli: each feature by itself, uniform in (-1, 1) where active. single: exactly one. pairs: features are 0 or
    1, each by itself, and the last is always 1."""
    p: float = 0.01
    """Probability that a feature is active; without effect under single."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UserError(f"p of a toy model's inputs is {self.p}; expected more than 0 and at most 1.")


def input_rows(inputs: ToyInputs, rows: Tensor, features: int) -> Tensor:
    """[…, D] float32 rows of the numbers […] int64."""
    flat_N = rows.reshape(-1).to(torch.int64)
    key_N1 = _mix(flat_N + _mix(torch.tensor(inputs.seed, device=rows.device)))[:, None]
    column_D = torch.arange(features, device=rows.device)
    if inputs.mode == "single":
        chosen_N1 = (_uniform(_mix(key_N1)) * features).long()
        value_N1 = 2 * _uniform(_mix(key_N1 ^ _GOLDEN)) - 1
        x_ND = torch.where(column_D == chosen_N1, value_N1, 0.0)
    else:
        hash_ND = _mix(key_N1 + column_D * _GOLDEN)
        active_ND = _uniform(hash_ND) < inputs.p
        value_ND = torch.ones_like(active_ND, dtype=torch.float32)
        if inputs.mode == "bernoulli":
            value_ND = 2 * _uniform(_mix(hash_ND)) - 1
        else:
            active_ND[:, -1] = True
        x_ND = torch.where(active_ND, value_ND, 0.0)
    return x_ND.reshape(*rows.shape, features)


def _mix(z: Tensor) -> Tensor:
    """A hash of int64; shifts are logical."""
    z = z + _GOLDEN
    z = (z ^ _right(z, 30)) * _FIRST
    z = (z ^ _right(z, 27)) * _SECOND
    return z ^ _right(z, 31)


def _right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _uniform(z: Tensor) -> Tensor:
    """[0, 1) float32 from the upper 24 bits."""
    return _right(z, 40).float() / (1 << 24)
