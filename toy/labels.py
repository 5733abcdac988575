"""What the toy model is asked for: y = relu(x) + σ x Mᵀ, so y_i = relu(x_i) + σ Σ_j M_ij x_j.

M mixes every input linearly into every output. It is what makes the toy's loss better than that of exact ReLUs on half
the features: with M = 0 the advantage is gone. Entries have a root mean square of 1, so σ means the same under every
option; `normalise = "none"` leaves low ranks as published figures have them.

M is drawn on the CPU in float64 from the stream `mixing` of a seed: neither device nor input distribution changes it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.toy.inputs import stream

EMBED_WIDTH = 1000
INITIAL_SCALE = 0.01
"""Of a learned σ."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The label map."""

    kind: Literal["clean", "noisy", "residual_transpose"] = "noisy"
    """clean: M = 0. noisy: Gaussian. residual_transpose: sign (W_E W_Eᵀ - I) of an embedding with unit rows."""
    scale: float = 0.0
    """σ; where it is learned, its initial value."""
    learn_scale: bool = False
    """Train σ with the weights, weight decay included; |σ| is used."""
    symmetric: bool = False
    """noisy: M = Mᵀ."""
    zero_diagonal: bool = False
    """noisy: diagonal entries 0, put in last; raises the rank of a low-rank M."""
    rank: int | None = None
    """noisy: M = U D Vᵀ with so many columns; left out: every entry by itself."""
    flat_spectrum: bool = False
    """rank: orthonormal columns of U and V, so all singular values are equal."""
    normalise_rows: bool = False
    """rank: unit rows of U and V."""
    tied_factors: bool = False
    """rank: V = U, with a diagonal of mean √rank; combine it with zero_diagonal."""
    align_to_neurons: bool = False
    """rank: rows of U and V from the number of neurons on are 0."""
    normalise: Literal["rms", "none"] = "rms"
    """rms: entries of root mean square 1; none: the product of the factors as it is."""
    sign: Literal[-1, 1] = 1
    """residual_transpose: +1 as published numbers have it, -1 as the residual stream would give it."""

    def __post_init__(self) -> None:
        needs_rank = ("flat_spectrum", "normalise_rows", "tied_factors", "align_to_neurons")
        for name in needs_rank:
            if getattr(self, name) and self.rank is None:
                raise UserError(
                    f"labels.{name} needs labels.rank, and it is left out. Set a rank, or leave it out too."
                )
        if self.flat_spectrum and (self.normalise_rows or self.align_to_neurons):
            raise UserError(
                "labels.flat_spectrum excludes normalise_rows and align_to_neurons, which would bend the spectrum. "
                "Choose one of them."
            )
        if self.rank is not None and self.rank < 1:
            raise UserError(f"labels.rank is {self.rank}; expected at least 1. Leave it out for full rank.")
        if self.kind == "clean" and (self.scale or self.learn_scale):
            raise UserError(
                f"labels.scale is {self.scale} (learned: {self.learn_scale}) with kind clean; expected 0, since there "
                "is no mixing to scale."
            )

    @property
    def mixed(self) -> bool:
        """Whether there is anything but ReLUs in the label."""
        return self.kind != "clean"


def mixing_matrix(labels: Labels, features: int, neurons: int, seed: int) -> Tensor:
    """M [D, D], float32; row i belongs to output i. Raises UserError for a flat spectrum of rank above D."""
    if labels.kind == "clean":
        return torch.zeros(features, features)
    rng = stream(seed, "mixing")
    if labels.kind == "residual_transpose":
        embedding = _unit_rows(rng.standard_normal((features, EMBED_WIDTH)))
        return _single(labels.sign * (embedding @ embedding.T - np.eye(features)))
    if labels.rank is None:
        m_DD = rng.standard_normal((features, features))
        if labels.symmetric:
            m_DD = np.triu(m_DD) + np.triu(m_DD, 1).T
    else:
        m_DD = _low_rank(labels, labels.rank, features, neurons, rng)
    if labels.zero_diagonal:
        np.fill_diagonal(m_DD, 0)
    return _single(m_DD)


def _low_rank(labels: Labels, rank: int, features: int, neurons: int, rng: np.random.Generator) -> np.ndarray:
    """c U D Vᵀ. A symmetric one shares its factor and has random signs in D, which keeps rank and flatness; copying a
    triangle would destroy both."""
    if labels.flat_spectrum and rank > features:
        raise UserError(
            f"labels.rank is {rank} with flat_spectrum and {features} features; expected at most {features}, since no "
            f"more columns can be orthogonal. Set rank to {features} or less."
        )
    factors = [rng.standard_normal((features, rank)) for _ in range(2)]
    if labels.flat_spectrum:
        factors = [np.linalg.qr(factor)[0] for factor in factors]
    if labels.normalise_rows:
        factors = [_unit_rows(factor) for factor in factors]
    u, v = factors
    signs = np.ones(rank)
    if labels.tied_factors or labels.symmetric:
        v = u
        if not labels.tied_factors:
            signs = rng.choice([-1.0, 1.0], rank)
    scale = 1.0
    if labels.normalise == "rms":
        scale = {(False, False): rank**-0.5, (False, True): rank**0.5, (True, False): features * rank**-0.5}[
            labels.flat_spectrum, labels.normalise_rows
        ]
    if labels.align_to_neurons:
        u, v = (np.concatenate([factor[:neurons], np.zeros_like(factor[neurons:])]) for factor in (u, v))
        scale *= features / neurons if labels.normalise == "rms" else 1
    return scale * (u * signs) @ v.T


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values, normalised to a sum of 1."""
    values = torch.linalg.svdvals(matrix.double())
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def label_rows(x_RD: Tensor, mixing_DD: Tensor, scale: float) -> Tensor:
    """y [R, D] of input rows."""
    y_RD = x_RD.clamp(min=0)
    return y_RD + scale * (x_RD @ mixing_DD.T) if scale else y_RD


def _unit_rows(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def _single(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(matrix.astype(np.float32))
