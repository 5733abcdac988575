"""How much of a known solution a dictionary has found: cosines of its directions with the true ones.

Pure. A truth is a pair of directions, what an encoder should read and what a decoder should write. A latent stands for
the truth with which the smaller of both cosines is large. Scores follow toy.md §8; those weighted weigh a truth by the
squared norm of what it writes, since true decoder rows of a toy MLP differ in size by a factor of some hundred.

Behind every score stands `null`, that of as many random directions: among many the best is not 0.
"""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

DUPLICATE, MISSING = 0.9, 0.5
NEGLIGIBLE = 1e-4
"""A truth that writes less than this share of the largest squared norm is none to be found."""
NULL_SEED = 0


class Truth(NamedTuple):
    """What a source should have learned."""

    encoder: Tensor
    """[T, D]."""
    decoder: Tensor
    """[T, E]."""
    kept: Tensor
    """[all truths] bool: those that write something; the others are in neither tensor."""


class Recovery(NamedTuple):
    """Of one source."""

    truths: int
    latents: int
    """Alive ones."""
    encoder: float
    """Mean over truths of the largest |cosine| with an encoder row."""
    decoder: float
    """Mean over truths of the largest |cosine| with a decoder row."""
    encoder_weighted: float
    decoder_weighted: float
    encoder_matched: float
    """Mean cosine of one-to-one pairs, chosen for the largest sum over both; a truth without a latent counts 0."""
    decoder_matched: float
    duplicates: int
    """Latents beyond the first of a truth, both cosines above 0.9."""
    missing: int
    """Truths with which no latent has both cosines at 0.5 or more."""
    missing_weight: float
    """Their share of the squared norms that all truths write."""


def truth_of(encoder_TD: Tensor, decoder_TE: Tensor) -> Truth:
    """The truths that read and write something."""
    squares_T = decoder_TE.square().sum(1)
    kept_T = (squares_T > NEGLIGIBLE * squares_T.max()) & (encoder_TD.norm(dim=1) > 0)
    return Truth(encoder_TD[kept_T], decoder_TE[kept_T], kept_T)


def recovery(truth: Truth, encoder_FD: Tensor, decoder_FE: Tensor) -> Recovery:
    """Scores of the directions of latents, the alive ones, float64."""
    enc_FT, dec_FT = cosines(encoder_FD, truth.encoder), cosines(decoder_FE, truth.decoder)
    truths = len(truth.encoder)
    if not len(enc_FT):
        return Recovery(truths, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, truths, 1.0)
    weight_T = truth.decoder.square().sum(1)
    weight_T = weight_T / weight_T.sum()
    best = [cos_FT.abs().max(0).values for cos_FT in (enc_FT, dec_FT)]
    both_FT = torch.minimum(enc_FT, dec_FT)
    missing_T = both_FT.max(0).values < MISSING
    rows, columns = linear_sum_assignment((enc_FT + dec_FT).numpy(), maximize=True)
    matched = [float(cos_FT[rows, columns].sum()) / truths for cos_FT in (enc_FT, dec_FT)]
    plain = [float(each.mean()) for each in best]
    weighted = [float((each * weight_T).sum()) for each in best]
    return Recovery(
        truths,
        len(enc_FT),
        encoder=plain[0],
        decoder=plain[1],
        encoder_weighted=weighted[0],
        decoder_weighted=weighted[1],
        encoder_matched=matched[0],
        decoder_matched=matched[1],
        duplicates=int(((both_FT > DUPLICATE).sum(0) - 1).clamp(min=0).sum()),
        missing=int(missing_T.sum()),
        missing_weight=float(weight_T[missing_T].sum()),
    )


def null(truth: Truth, latents: int) -> Recovery:
    """Scores of as many random directions."""
    rng = torch.Generator().manual_seed(NULL_SEED)
    shapes = (truth.encoder.shape[1], truth.decoder.shape[1])
    return recovery(truth, *(torch.randn(latents, width, generator=rng, dtype=torch.float64) for width in shapes))


def best_by_truth(truth: Truth, encoder_FD: Tensor, decoder_FE: Tensor) -> list[float]:
    """By truth, the larger over latents of the smaller cosine, descending: what a picture shows."""
    if not len(encoder_FD):
        return [0.0] * len(truth.encoder)
    both_FT = torch.minimum(cosines(encoder_FD, truth.encoder), cosines(decoder_FE, truth.decoder))
    return sorted((float(value) for value in both_FT.max(0).values), reverse=True)


def cosines(a_FD: Tensor, b_TD: Tensor) -> Tensor:
    """[F, T]; 0 with a vector that is 0."""
    return torch.nn.functional.normalize(a_FD.double(), dim=1) @ torch.nn.functional.normalize(b_TD.double(), dim=1).T
