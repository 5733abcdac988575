"""Resampling: ReLU latents that have fallen silent start anew from inputs that the dictionary reconstructs badly.

After Bricken et al. 2023, "Towards Monosemanticity". Every R steps, each latent that was silent for the tokens of R/2
steps takes a token of the current batch, drawn without replacement with a probability in proportion to ‖e‖, what the
dictionary left of all that the latent writes to. With x the token as the encoder sees it (less b_dec under a pre-bias),

    w_f = x/‖x‖        encoder row = 0.2 · (mean norm of the living encoder rows) · x/‖x‖        b_enc,f = 0

and the optimiser's memory of those three is forgotten. Where input and output are different spaces (transcoder, CLT)
w_f is the residual's direction e/‖e‖ instead, over all destinations together: what the token lacks there. If more are
silent than tokens have an error, the first ones are taken; if none is alive, the norm is that of all rows.

Draws come from a generator that depends on seed, step and source alone, so a resumed run draws the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.initial import generator
from thresher.train.losses import residuals
from thresher.train.optim import Optimiser

SHARE = 0.2
"""Norm of a new encoder row, in mean norms of living ones."""


@torch.no_grad()
def resample(
    coder: Coder,
    optimiser: Optimiser,
    parts: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    silent_tokens: int,
    seed: int,
    step: int,
) -> int:
    """Set up anew every latent silent for `silent_tokens` tokens; how many those were. Reads back.

    `parts`: xs [n, D] by source and ys [n, E] by destination of the current batch's parts.
    """
    sources = range(len(coder.inputs))
    silent = [torch.nonzero(coder.encoder(source).dead(silent_tokens)).view(-1) for source in sources]
    places = _places(coder, silent)
    if not any(place.total for place in places):
        return 0
    errors = _errors(coder, parts)
    count = 0
    for source in sources:
        x_ND = torch.cat([xs[source] for xs, _ in parts])
        rng = generator(seed, "resample", str(step), *coder.inputs[source])
        e_NSE = torch.cat([errors_nSE[:, list(coder.written(source))] for errors_nSE in errors])
        count += _restart(coder, optimiser, source, silent[source], places[source], x_ND, e_NSE, rng)
    coder.recount()
    return count


class _Place(NamedTuple):
    """Where a rank's silent latents stand among those of all ranks that share them."""

    first: int
    total: int


def _places(coder: Coder, silent: Sequence[Tensor]) -> list[_Place]:
    """By source; of shared latents a collective."""
    own = [latents.numel() for latents in silent]
    if coder.holding is None:
        return [_Place(0, number) for number in own]
    group = coder.holding.group
    counts = group.gather(torch.tensor(own, device=coder.b_dec.device)).tolist()
    return [
        _Place(sum(row[source] for row in counts[: group.index]), sum(row[source] for row in counts))
        for source in range(len(own))
    ]


def _errors(coder: Coder, parts: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[Tensor]:
    """[n, S, E] by part: y − ŷ."""
    return [torch.stack([found.residual for found in residuals(coder, coder(xs), ys)], 1) for xs, ys in parts]


def _restart(
    coder: Coder,
    optimiser: Optimiser,
    source: int,
    silent: Tensor,
    place: _Place,
    x_ND: Tensor,
    e_NTE: Tensor,
    rng: torch.Generator,
) -> int:
    """One source's latents; `e_NTE` is what is left of the destinations that it writes to."""
    encoder = coder.encoder(source)
    weights_N = torch.linalg.vector_norm(e_NTE.flatten(1), dim=1).double().cpu()
    number = min(place.total, int(torch.count_nonzero(weights_N)))
    if number == 0:
        return 0
    silent = silent[: max(number - place.first, 0)]
    tokens = torch.multinomial(weights_N, number, generator=rng)[place.first :][: silent.numel()].to(x_ND.device)
    living = torch.ones(coder.n_latents, dtype=torch.bool, device=x_ND.device).index_fill_(0, silent, False)
    norms_F = torch.linalg.vector_norm(encoder.W_enc, dim=1)
    if coder.holding is not None:
        norms_F, living = coder.holding.whole(norms_F), coder.holding.whole(living.to(norms_F.dtype)) > 0
    norm = norms_F[living].mean() if bool(living.any()) else norms_F.mean()
    x_nD = x_ND[tokens] - coder.b_dec[source] if coder.spec.pre_bias else x_ND[tokens]
    x_nD = torch.nn.functional.normalize(x_nD, dim=1)
    w_nM = x_nD if coder.own_site else torch.nn.functional.normalize(e_NTE[tokens].flatten(1), dim=1)
    W_dec = coder.W_dec[source]
    encoder.W_enc.index_copy_(0, silent, SHARE * norm * x_nD)
    encoder.b_enc.index_fill_(0, silent, 0.0)
    w_nTE = w_nM.view(-1, *W_dec.shape[1:])
    W_dec.index_copy_(0, silent, torch.nn.functional.normalize(w_nTE, dim=2) if coder.spec.unit_per_target else w_nTE)
    encoder.tokens_since_fired.index_fill_(0, silent, 0)
    encoder.changed()
    for parameter in (encoder.W_enc, encoder.b_enc, W_dec):
        optimiser.restart(parameter, silent)
    return number
