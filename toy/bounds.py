"""Closed forms of L/p: what a model can reach, and what simple ones do.

With n features, m neurons and values uniform in (-1, 1): E[x²] = p/3, E[relu(x)²] = p/6, E[relu(x)] = p/4 of one
feature, and relu(x) = (x + |x|)/2. Derivations stand under each function; toy.md §4 has the table they give.
"""

import math

import torch
from torch import Tensor

ZERO = 1 / 6
"""The model 0 on clean labels: E[relu(x)²] / p."""
HALF_LINEAR = 1 / 12
"""x/2 on every feature, which needs n neurons' rank: (relu(x) - x/2)² = x²/4."""


def naive(features: int, neurons: int, scale: float = 0.0) -> float:
    """Exact ReLUs on as many features as there are neurons, 0 on the rest: (n - m)/6n + nσ²/3.

    The unused outputs lose 1/6 each. Every output also misses σ Σ_j M_ij x_j, of variance σ² Σ_j M_ij² p/3 = nσ²p/3
    for entries of mean square 1; it is uncorrelated with relu(x_i) but for the diagonal, whose mean is 0.
    """
    return (features - neurons) / (6 * features) + features * scale**2 / 3


def best_offset(neurons: int, p: float) -> float:
    """b* = (p/4) E[S] / E[S²]: what every neuron adds to an output that no neuron serves.

    S = Σ of m active ReLUs. The unused relu(x_i) is independent of S, so E[(relu(x_i) - bS)²] is least at
    E[relu] E[S] / E[S²].
    """
    mean, square = _sum_moments(neurons, p)
    return p / 4 * mean / square


def offset(features: int, neurons: int, p: float, b: float | None = None) -> float:
    """Naive with offset b on unused outputs, on clean labels; without b, the best one.

    (n - m)/n · (E[relu²] - 2b E[relu] E[S] + b² E[S²]) / p, which at b* is (n - m)/n · (1/6 - (p E[S]/4)² / (p E[S²])).
    """
    mean, square = _sum_moments(neurons, p)
    b = best_offset(neurons, p) if b is None else b
    return (features - neurons) / features * (p / 6 - 2 * b * p / 4 * mean + b**2 * square) / p


def rank_bound(mixing_DD: Tensor, scale: float, neurons: int) -> float:
    """No model with W_in ≥ 0 is better on single-active inputs: (Σ_{i>m} s_i(I + σM)² + σ²‖M‖²) / 6n.

    For W_in ≥ 0 and x_j > 0 the model is the linear A of rank m, and the label is (I + σM) x: the part left is at least
    what the singular values beyond m hold (Eckart and Young 1936). For x_j < 0 the model is 0 and the label σMx. Either
    sign has half of the rows, and E[x²] = 1/3.
    """
    features = mixing_DD.shape[0]
    mixed_DD = scale * mixing_DD.double()
    values = torch.linalg.svdvals(torch.eye(features, dtype=torch.float64) + mixed_DD)
    return float((values[neurons:].square().sum() + mixed_DD.square().sum()) / (6 * features))


def symmetric_bound(features: int, scale: float) -> float:
    """`rank_bound` of symmetric Gaussian M and m = n/2, for large n: (1/2 - 8√n σ/3π + 3nσ²/2) / 6.

    The eigenvalues of M lie on Wigner's semicircle of radius 2√n. The lower half of 1 + σλ keeps, per feature,
    1/2 (1 + nσ²) + σ E[λ; λ < 0]·2, and E[|λ|] = 8√n/3π; ‖σM‖² adds nσ². Holds while 1 + σλ stays positive, σ < 1/2√n.
    """
    root = math.sqrt(features) * scale
    return (0.5 - 8 * root / (3 * math.pi) + 1.5 * root**2) / 6


def best_symmetric(features: int) -> tuple[float, float]:
    """(σ, bound) where `symmetric_bound` is least: σ = 8 / 9π√n = 0.283 / √n."""
    scale = 8 / (9 * math.pi * math.sqrt(features))
    return scale, symmetric_bound(features, scale)


def _sum_moments(neurons: int, p: float) -> tuple[float, float]:
    """E[S] = mp/4 and E[S²] = m(p/6 - p²/16) + (mp/4)² of the sum of m independent ReLUs."""
    mean = neurons * p / 4
    return mean, neurons * (p / 6 - p**2 / 16) + mean**2
