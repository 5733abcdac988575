"""Random and derived starting points of weights, by name.

Encoders: `tied`, the decoder's rows; `width`, uniform in ±1/√D; `latents`, uniform in ±1/√F; `kaiming`, uniform in
±√(6/F), which is what Kaiming's initialisation makes of a matrix that is stored [D, F] and taken for one of F inputs.
Decoders: `rows`, random directions of norm 1; `tied`, the encoder's rows (for every target of a CLT); `zero`;
`uniform`, in ±1/√(S·E) with S destinations.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.train.dictionary.holding import Holding
from thresher.train.dictionary.spec import DictionarySpec

_DRAWN = 1 << 20
"""Numbers drawn at a time where most are not kept; a multiple of 16."""


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


def rows(
    how: str, shape: torch.Size, spec: DictionarySpec, rng: torch.Generator, holding: Holding | None = None
) -> Tensor:
    """[F, M] weights by name, all but `tied`; `holding`: those of its latents out of the same draws as for all."""
    if how == "zero":
        return torch.zeros(shape)
    if how == "rows":
        drawn = (
            torch.randn(shape, generator=rng) if holding is None else drawn_rows(torch.randn, shape[1], rng, holding)
        )
        return torch.nn.functional.normalize(drawn, dim=1)
    bound = {
        "width": spec.d_in**-0.5,
        "latents": spec.n_latents**-0.5,
        "kaiming": (6 / spec.n_latents) ** 0.5,
        "uniform": (len(spec.writes) * spec.d_out) ** -0.5,
    }[how]
    if holding is not None:
        return (drawn_rows(torch.rand, shape[1], rng, holding) * 2 - 1) * bound
    return uniform(shape, bound, rng)


def drawn_rows(draw: Callable[..., Tensor], width: int, rng: torch.Generator, holding: Holding) -> Tensor:
    """[n, width] a rank's rows of `draw([F, width])`, number for number, without the rest of it in memory.

    torch makes normal numbers sixteen at a time, and where they do not come out even the last sixteen anew; so pieces
    begin at multiples of sixteen, and the last one has sixteen or more.
    """
    total, first, stop = holding.width * width, holding.first * width, holding.stop * width
    out, start = torch.empty(stop - first), 0
    while start < total:
        size = total - start if total - start < _DRAWN + 16 else _DRAWN
        piece = draw(size, generator=rng)
        low, high = max(start, first), min(start + size, stop)
        if low < high:
            out[low - first : high - first] = piece[low - start : high - start]
        start += size
    return out.view(-1, width)


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
