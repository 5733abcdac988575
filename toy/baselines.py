"""Models written down rather than trained.

The model computes x W_in W_out of row vectors, so what has to be factored is the *transpose* of the label's linear map:
W_in W_out = Aᵀ ≈ (I + σM)ᵀ. Factoring I + σM itself, as earlier code did, fits the wrong labels unless M is symmetric
(`orientation="untransposed"` keeps that for comparison).
"""

import math
import warnings
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.toy.inputs import stream
from thresher.toy.model import Weights

Orientation = Literal["correct", "untransposed"]
OUTER_STEPS = 500
INNER_STEPS = 5
FLOOR = 1e-8


def half_identity(features: int, neurons: int, b: float = 0.0) -> Weights:
    """The naive model, W_in = [I; 0] and W_out = [I, b]: exact on the first features, b times their sum on the rest."""
    _check_sizes(features, neurons)
    w_in, w_out = torch.zeros(1, features, neurons), torch.full((1, neurons, features), b)
    w_in[0, :neurons] = torch.eye(neurons)
    w_out[0, :, :neurons] = torch.eye(neurons)
    return Weights(w_in, w_out)


def wanted_map(mixing_DD: Tensor, scale: float, identity: float = 1.0, orientation: Orientation = "correct") -> Tensor:
    """(c I + σM)ᵀ, [D, D] float64: what W_in W_out should be."""
    whole = identity * torch.eye(mixing_DD.shape[0], dtype=torch.float64) + scale * mixing_DD.double()
    return whole.T if orientation == "correct" else whole


def svd(mixing_DD: Tensor, scale: float, neurons: int, identity: float) -> Weights:
    """The best linear model of rank m: (cI + σM)ᵀ = U S Vᵀ, W_in = U_m S_m, W_out = V_mᵀ.

    Every neuron's largest |input weight| is positive; with a ReLU behind them the choice matters.
    """
    _check_sizes(mixing_DD.shape[0], neurons)
    u, s, vt = torch.linalg.svd(wanted_map(mixing_DD, scale, identity))
    w_in, w_out = u[:, :neurons] * s[:neurons], vt[:neurons]
    largest_H = w_in.abs().argmax(0)
    sign_H = w_in[largest_H, torch.arange(neurons)].sign()
    return Weights((w_in * sign_H)[None].float(), (w_out * sign_H[:, None])[None].float())


def semi_nmf(
    mixing_DD: Tensor, scale: float, neurons: int, *, seed: int, orientation: Orientation = "correct"
) -> Weights:
    """(I + σM)ᵀ ≈ U V with U ≥ 0 (Ding, Li and Jordan 2010): W_in = U, W_out = V, so every neuron is linear on x ≥ 0.

    U begins as scikit-learn's NMF of |X|, begun at random. Then 500 times V = pinv(U) X and five projected gradient
    steps on U; a step goes from 0.1 to 0.001 along a cosine, at most 1 / ‖V Vᵀ‖₂.
    """
    from sklearn.decomposition import NMF

    _check_sizes(mixing_DD.shape[0], neurons)
    x = wanted_map(mixing_DD, scale, 1.0, orientation).numpy()
    draw = np.random.RandomState(stream(seed, "weights").integers(2**32))  # the only kind that scikit-learn takes
    start = NMF(neurons, init="random", max_iter=500, random_state=draw)
    with warnings.catch_warnings(action="ignore"):  # a start need not have converged
        u = np.maximum(start.fit_transform(np.abs(x)), FLOOR)
    for step in range(OUTER_STEPS):
        v = np.linalg.pinv(u) @ x
        gram, cross = v @ v.T, x @ v.T
        rate = 0.001 + 0.099 * 0.5 * (1 + math.cos(math.pi * step / OUTER_STEPS))
        rate = min(rate, 1 / float(np.linalg.norm(gram, 2)))
        for _ in range(INNER_STEPS):
            u = np.maximum(u - rate * (u @ gram - cross), FLOOR)
    v = np.linalg.pinv(u) @ x
    return Weights(*(torch.from_numpy(part.astype(np.float32))[None] for part in (u, v)))


def _check_sizes(features: int, neurons: int) -> None:
    if not 0 < neurons <= features:
        raise UserError(
            f"toy.neurons is {neurons} with {features} features; expected at least 1 and at most {features}, since a "
            "baseline gives every neuron a direction of its own. Choose fewer neurons."
        )
