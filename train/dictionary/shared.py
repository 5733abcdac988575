"""A dictionary whose latents several ranks share, in training and when it is served: the sums over all of them.

Training takes at most two collectives forward: candidates, where the rule counts (offers.py), and one sum of all
partial reconstructions, those of prefixes, of Multi-TopK's second code and of AuxK among them, with whatever else
losses add up over latents. Biases and skip connections, which every rank has, come on top of the sum.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thresher.cache.contracts import Codes
from thresher.train.dictionary.holding import Holding, Sums
from thresher.train.dictionary.offers import best_of_tokens, in_rectangle, rectangle, some
from thresher.train.kernels.sparse import Selection, bags
from thresher.train.stages import stage

if TYPE_CHECKING:
    from thresher.train.dictionary.coder import Coder, Pass
    from thresher.train.dictionary.encoder import Fired

Beside = Callable[["Coder", Sequence["Fired"], Sequence[Tensor]], Sums]
"""A rank's own sums for the losses of a pass, from its codes and its inputs [N, D] by source."""


def shared_pass(
    coder: "Coder", holding: Holding, xs: Sequence[Tensor], fired: Sequence["Fired"], beside: Beside | None
) -> "Pass":
    """The pass of all latents from the codes of this rank's; one collective."""
    from thresher.train.dictionary.coder import Pass, wide_of

    ends, wide = holding.ends(coder.spec.prefix_ends), wide_of(fired)
    with stage("decode"):
        own = _segments(coder, xs, fired, ends)
        own += _segments(coder, xs, wide, ()) if wide else []
        asked = Sums() if beside is None else beside(coder, fired, xs)
        given = [value for value in asked if value is not None]
        summed = holding.add_up([*own, *given])
        parts, rest = summed[: len(own)], iter(summed[len(own) :])
        sums = Sums(*(None if value is None else next(rest) for value in asked))
        still_NSE = coder.without_codes(xs)
        second = still_NSE + parts.pop() if wide else None
        parts[0] = parts[0] + still_NSE
        *prefixes, y_NSE = itertools.accumulate(parts)
    return Pass(tuple(fired), y_NSE, tuple(prefixes), second, sums)


def _segments(coder: "Coder", xs: Sequence[Tensor], codes: Sequence["Fired"], ends: Sequence[int]) -> list[Tensor]:
    """[N, S, E] what the codes of each segment write; segments without a latent of this rank stay 0."""
    empty = torch.zeros(xs[0].shape[0], *coder.b_dec.shape, dtype=coder.b_dec.dtype, device=coder.b_dec.device)
    sums = [empty, *(torch.zeros_like(empty) for _ in ends[1:])]
    full = [i for i, end in enumerate(ends) if end > (ends[i - 1] if i else 0)] if ends else [0]
    written = coder.written_by([sums[i] for i in full], xs, codes, [ends[i] for i in full] if ends else ())
    for i, sum_NSE in zip(full, written, strict=True):
        sums[i] = sum_NSE
    return sums


@torch.no_grad()
def cut_codes(coder: "Coder", source: int, codes: Codes) -> Codes:
    """Codes that a rule keeps of all ranks' latents, from those that it keeps of this one's; a collective, or none."""
    rule, holding = coder.encoder(source).rule, coder.holding
    count = rule.per_token()
    if holding is None or count is None:
        return codes
    norms_F, selection = coder.rank_norms(source), Selection(codes.latents, codes.offsets, codes.width)
    scores = codes.values if norms_F is None else codes.values * norms_F.index_select(0, codes.latents)
    heard = holding.group.gather(rectangle(selection, scores, min(count, holding.widest)))
    mask = in_rectangle(selection, best_of_tokens(heard, count)[holding.group.index])
    kept, values = some(selection, codes.values, mask)
    return codes._replace(values=values, latents=kept.latents, offsets=kept.offsets)


@torch.no_grad()
def decode_shared(coder: "Coder", holding: Holding, destination: int, codes: Sequence[Codes]) -> Tensor:
    """[N, E] as `Coder.decode`, from the codes of all ranks; one collective."""
    y_NE = torch.zeros(codes[0].tokens, coder.b_dec.shape[1], dtype=coder.b_dec.dtype, device=coder.b_dec.device)
    for source, part in zip(coder.sources(destination), codes, strict=True):
        span = coder.written(source)
        index = part.latents * len(span) + (destination - span.start)
        y_NE += bags(coder.W_dec[source].flatten(0, 1), index, part.offsets, part.values)
    holding.group.add_up([y_NE])
    y_NE += coder.b_dec[destination]
    if coder.W_skip is not None:
        x_ND = codes[list(coder.sources(destination)).index(destination)].x
        assert x_ND is not None, "codes of a dictionary with a skip connection carry its input"
        y_NE = torch.addmm(y_NE, x_ND, coder.W_skip[destination].T)
    return coder.outside(y_NE, codes)
