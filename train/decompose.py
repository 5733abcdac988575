"""Gates and losses of parameter decomposition.

W = Σ_c u_c v_cᵀ + Δ for every matrix W [E, D] of the target. A gate network gives γ for each token and component, and

    g = clamp(γ, 0, 1)         in masks; its backward is 0 for γ > 1, and for γ ≤ 0 passes .01 of the gradient where
                               descent would raise γ (where the gradient is negative)
    ĝ = g, but 1 + .01(γ − 1) above 1          in the minimality loss alone
    faithfulness = Σ‖Δ‖² / number of entries, over all matrices together
    minimality   = Σ_matrices Σ_c [μ_c + β μ_c log₂(1 + N μ_c)],  μ_c = mean over N positions of (ĝ + 1e-12)^p
    mask m = g + (1 − g) r,  r ~ U(0, 1);  m_Δ ~ U(0, 1)

Stochastic subset: at every position n ~ U{1 … M} of the M matrices go through their masked components and Δ, the others
through W. A masked matrix computes m_Δ W x + ((m − m_Δ) ⊙ (x V)) U, which is what it stands for,
(m ⊙ (x V)) U + m_Δ Δ x, without a product with Δ; m = m_Δ = 1 gives W x itself.

After Bushnaq, Braun and Sharkey 2025, "Stochastic parameter decomposition" (arXiv:2506.20790), and its successor.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAK = 0.01
_FLOOR = 1e-12


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(gamma)
        return gamma.clamp(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gamma,) = ctx.saved_tensors
        below = torch.where(gamma <= 0, LEAK * grad.clamp_max(0), grad)
        return torch.where(gamma > 1, 0.0, below)


def lower_leaky(gamma: Tensor) -> Tensor:
    """g of any shape."""
    out: Tensor = _LowerLeaky.apply(gamma)
    return out


def upper_leaky(gamma: Tensor) -> Tensor:
    """ĝ of any shape; no gradient at γ ≤ 0, where (ĝ + 1e-12)^p is steep."""
    return torch.where(gamma > 1, 1 + LEAK * (gamma - 1), torch.relu(gamma))


def exponent(ends: Sequence[float], step: int, total: int) -> float:
    """p of a step counted from 0."""
    first, last = ends
    return first + (last - first) * step / total


def minimality(gammas: Sequence[Tensor], p: float, beta: float) -> Tensor:
    """The loss of some matrices, from γ [N, C] of each."""
    total = gammas[0].new_zeros(())
    for gamma_NC in gammas:
        mu_C = (upper_leaky(gamma_NC) + _FLOOR).pow(p).mean(0)
        total = total + (mu_C + beta * mu_C * torch.log1p(gamma_NC.shape[0] * mu_C) / math.log(2)).sum()
    return total


def squares(W_ED: Tensor, V_DC: Tensor, U_CE: Tensor) -> Tensor:
    """‖Δ‖² of a matrix."""
    return (W_ED.T - V_DC @ U_CE).square().sum()


class Mask(NamedTuple):
    """How a matrix goes through its components."""

    m: Tensor
    """[N, C]."""
    delta: Tensor
    """[N, 1] m_Δ."""


def masked(x_ND: Tensor, W_ED: Tensor, V_DC: Tensor, U_CE: Tensor, mask: Mask) -> Tensor:
    """[N, E] a masked matrix's product, without its bias."""
    return mask.delta * (x_ND @ W_ED.T) + ((mask.m - mask.delta) * (x_ND @ V_DC)) @ U_CE


class Draws(NamedTuple):
    """The random numbers of a step."""

    routed: Tensor
    """[N, M] bool: which matrices go through their components."""
    delta: Tensor
    """[N, M] m_Δ."""
    r: list[Tensor]
    """[N, C] by matrix."""


def draw(seed: int, step: int, tokens: int, widths: Sequence[int], like: Tensor) -> Draws:
    """Those of a step, a function of seed and step; `widths`: C by matrix."""
    digest = hashlib.sha256(f"decomposition\0{seed}\0{step}".encode()).digest()
    rng = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    many = len(widths)

    def uniform(columns: int) -> Tensor:
        return torch.rand(tokens, columns, generator=rng, device=like.device, dtype=like.dtype)

    number_N1 = torch.randint(1, many + 1, (tokens, 1), generator=rng, device=like.device)
    rank_NM = uniform(many).argsort(1).argsort(1)
    return Draws(rank_NM < number_N1, uniform(many), [uniform(width) for width in widths])


def mask(g_NC: Tensor, draws: Draws, matrix: int) -> Mask:
    """One matrix's mask of a step; m = m_Δ = 1 where it is not routed through its components."""
    routed_N1 = draws.routed[:, matrix : matrix + 1]
    m_NC = torch.where(routed_N1, g_NC + (1 - g_NC) * draws.r[matrix], 1.0)
    return Mask(m_NC, torch.where(routed_N1, draws.delta[:, matrix : matrix + 1], 1.0))
