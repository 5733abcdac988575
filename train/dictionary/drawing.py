"""Random and derived starting points of weights, by name.

Encoders: `tied`, the decoder's rows; `width`, uniform in ±1/√D; `latents`, uniform in ±1/√F; `kaiming`, uniform in
±√(6/F), which is what Kaiming's initialisation makes of a matrix that is stored [D, F] and taken for one of F inputs.
Decoders: `rows`, random directions of norm 1; `tied`, the encoder's rows (for every target of a CLT); `zero`;
`uniform`, in ±1/√(S·E) with S destinations.
"""

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.train.dictionary.spec import DictionarySpec


def resolved(spec: DictionarySpec, auto: tuple[str, str]) -> tuple[str, str]:
    """Names of the encoder's and the decoder's start; a decoder whose rows need a norm cannot start as zero."""
    enc = auto[0] if spec.init_encoder == "auto" else spec.init_encoder
    dec = auto[1] if spec.init_decoder == "auto" else spec.init_decoder
    if dec == "zero" and (spec.unit_norm or spec.unit_per_target or spec.rank_by == "norm"):
        if spec.init_decoder == "zero":
            raise UserError(
                "dictionary.init_decoder is 'zero', but the decoder's rows are to keep norm 1, or latents are ranked "
                "by it (rank_by): zero rows cannot have the one and would never be chosen by the other. Choose another "
                "init_decoder."
            )
        dec = "uniform"
    if "tied" in (enc, dec) and spec.d_in not in (spec.d_out, len(spec.writes) * spec.d_out):
        raise UserError(
            f"dictionary.init_encoder or init_decoder is 'tied', but what is read is {spec.d_in} wide and what is "
            f"written {spec.d_out}; expected the same width. Choose another start."
        )
    if enc == "tied" and dec in ("tied", "zero"):
        raise UserError(
            f"dictionary.init_encoder is {enc!r} and init_decoder {dec!r} (named, or by 'auto'); expected at least one "
            "of them to be drawn by itself. Set init_encoder = 'width', for example."
        )
    return enc, dec


def rows(how: str, shape: torch.Size, spec: DictionarySpec, rng: torch.Generator) -> Tensor:
    """[F, M] weights by name, all but `tied`."""
    if how == "zero":
        return torch.zeros(shape)
    if how == "rows":
        return torch.nn.functional.normalize(torch.randn(shape, generator=rng), dim=1)
    bound = {
        "width": spec.d_in**-0.5,
        "latents": spec.n_latents**-0.5,
        "kaiming": (6 / spec.n_latents) ** 0.5,
        "uniform": (len(spec.writes) * spec.d_out) ** -0.5,
    }[how]
    return uniform(shape, bound, rng)


def uniform(shape: torch.Size, bound: float, rng: torch.Generator) -> Tensor:
    """Uniform in ±bound."""
    return (torch.rand(shape, generator=rng) * 2 - 1) * bound


def geometric_median(y_NE: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """[E] float64: the point of least summed distance to the rows, by Weiszfeld's iteration from their mean.

    It ends when the summed distance falls by less than `tolerance` of itself.
    """
    y_NE = y_NE.double()
    point_E, before = y_NE.mean(0), torch.inf
    for _ in range(iterations):
        away_N = (y_NE - point_E).norm(dim=1)
        total = float(away_N.sum())
        if before - total <= tolerance * total:
            break
        before = total
        weight_N = 1 / away_N.clamp_min(1e-12 * max(total, 1.0))
        point_E = (weight_N @ y_NE) / weight_N.sum()
    return point_E
