"""Which entries are kept where ranks hold different latents: candidates are exchanged, the cut is that of one process.

Every rank offers the entries that its own latents alone would keep; what all together keep is among those. Of a rule
that counts per token, and of AuxK where more latents are dead than it wakes, that is [n, c] scores of each token's own
candidates, latents ascending, −∞ behind them: one collective for all sources and parts of a batch. Where tokens compete
train/candidates.py has the form, the same as for rows on several ranks.

Ranks hold consecutive latents, so of equal scores at the edge the lower latent of a token is kept, and of a batch the
lower position, as in one process. Nothing is read back from a device.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thresher.train.dictionary.encoder import Chosen
from thresher.train.dictionary.objective import MULTI
from thresher.train.kernels import padded
from thresher.train.kernels.padded import Padded
from thresher.train.kernels.silent import Silent
from thresher.train.kernels.sparse import Selection

if TYPE_CHECKING:
    from thresher.train.dictionary.coder import Coder
    from thresher.train.dictionary.holding import Holding

Found = list[list[Chosen]]
"""By source and part."""


@torch.no_grad()
def settled(coder: "Coder", holding: "Holding", found: Found) -> Found:
    """What all ranks together keep, per token, of what each has found among its own latents; a collective, or none."""
    rule, encoder = coder.encoder(0).rule, coder.encoder(0)
    count = MULTI * encoder.count() if encoder.multi else rule.per_token()
    pieces = [(source, part) for source, column in enumerate(found) for part in range(len(column))]
    crowded = [s for s in range(len(found)) if encoder.aux_k and rule.aux_floor() is None and _crowded(coder, s)]
    asleep = [(s, p) for s, p in pieces if s in crowded]
    offers = [] if count is None else [_by_token(found[s][p], min(count, holding.widest)) for s, p in pieces]
    offers += [_by_silence(found[s][p], min(encoder.aux_k, max(c[s] for c in coder.dead))) for s, p in asleep]
    if not offers:
        return found
    heard = iter(_exchanged(holding, offers))
    out = [list(column) for column in found]
    for s, p in [] if count is None else pieces:
        main = encoder.count() if encoder.multi else None
        out[s][p] = _keep_of_tokens(found[s][p], next(heard), count or 0, main, holding)
    for s, p in asleep:
        out[s][p] = _keep_silent(out[s][p], next(heard), encoder.aux_k, holding)
    return out


def cut_latents(
    coder: "Coder", holding: "Holding", tokens: int, found: Sequence[Sequence[Chosen]], budget: int
) -> list[list[Chosen]]:
    """What all ranks together keep of every pool's candidates, where tokens compete; a collective.

    `found`: by pool, source and part, of all `tokens` rows of a batch.
    """
    from thresher.train.candidates import cut_over, forms_of

    places = torch.arange(tokens, dtype=torch.int32, device=coder.b_dec.device)
    return cut_over(holding.group, found, forms_of(coder, tokens, budget), places, budget)


def _crowded(coder: "Coder", source: int) -> bool:
    """Whether more latents are dead than AuxK wakes of a token."""
    return coder.dead_of(source) > coder.encoder(source).aux_k


def _exchanged(holding: "Holding", offers: Sequence[Tensor]) -> list[Tensor]:
    """Every offer as all ranks made it, with a first dimension of ranks."""
    gathered = holding.group.gather(torch.cat([offer.reshape(-1) for offer in offers]))
    split = gathered.split([offer.numel() for offer in offers], dim=1)
    return [part.reshape(holding.group.size, *offer.shape) for part, offer in zip(split, offers, strict=True)]


def _places(selection: Selection) -> Tensor:
    """[A] where an entry stands among those of its token."""
    return torch.arange(selection.latents.shape[0], device=selection.latents.device) - selection.offsets[selection.rows]


def rectangle(selection: Selection, scores: Tensor, width: int) -> Tensor:
    """[n, width] each token's scores, −∞ behind them."""
    out = scores.new_full((selection.tokens, width + 1), -torch.inf)
    places = _places(selection).clamp_max(width)  # what pads a selection goes to a column that is cut off
    if isinstance(selection, Padded):
        places = torch.where(selection.real, places, width)
    out[selection.rows, places] = scores
    return out[:, :width]


def _by_token(chosen: Chosen, width: int) -> Tensor:
    assert chosen.selection is not None
    return rectangle(chosen.selection, chosen.scores(), width)


def _by_silence(chosen: Chosen, width: int) -> Tensor:
    """Of a rank without dead latents: none."""
    if chosen.silent is None:
        assert chosen.selection is not None or chosen.values.dim() == 2
        tokens = chosen.values.shape[0] if chosen.selection is None else chosen.selection.tokens
        return chosen.values.new_full((tokens, width), -torch.inf)
    assert isinstance(chosen.silent, Silent), "ranks that share latents list the codes of dead ones"
    return rectangle(chosen.silent.selection, chosen.silent.values, width)


def best_of_tokens(values_RNC: Tensor, count: int) -> Tensor:
    """[R, N, C] bool: the `count` largest of every token over all ranks, equal ones at the edge by rank and place.

    What is no number is kept, so that it shows.
    """
    ranks, tokens, width = values_RNC.shape
    all_NM = values_RNC.transpose(0, 1).reshape(tokens, ranks * width)
    keep = all_NM > -torch.inf
    if count < all_NM.shape[1]:
        edge_N1 = torch.topk(all_NM, count, dim=1, sorted=False).values.amin(1, keepdim=True)
        above, tied = all_NM > edge_N1, all_NM == edge_N1
        keep &= above | (tied & (tied.cumsum(1) <= count - above.sum(1, keepdim=True)))
    return (keep | all_NM.isnan()).view(tokens, ranks, width).transpose(0, 1)


def in_rectangle(selection: Selection, keep_NC: Tensor) -> Tensor:
    """[A] bool: entries that are kept, from the rectangle of them."""
    places = _places(selection)
    inside = places < keep_NC.shape[1]
    if isinstance(selection, Padded):
        inside &= selection.real
    return keep_NC[selection.rows, places.clamp_max(max(keep_NC.shape[1] - 1, 0))] & inside


def _keep_of_tokens(chosen: Chosen, heard_RNC: Tensor, count: int, main: int | None, holding: "Holding") -> Chosen:
    assert chosen.selection is not None
    mask = in_rectangle(chosen.selection, best_of_tokens(heard_RNC, count)[holding.group.index])
    selection, values = some(chosen.selection, chosen.values, mask)
    kept = chosen._replace(selection=selection, values=values)
    if main is None:
        return kept
    narrow = in_rectangle(chosen.selection, best_of_tokens(heard_RNC, main)[holding.group.index])
    return kept._replace(main=narrow[mask])


def _keep_silent(chosen: Chosen, heard_RNC: Tensor, count: int, holding: "Holding") -> Chosen:
    silent = chosen.silent
    if silent is None:
        return chosen
    assert isinstance(silent, Silent)
    mask = in_rectangle(silent.selection, best_of_tokens(heard_RNC, count)[holding.group.index])
    selection, values = some(silent.selection, silent.values, mask)
    return chosen._replace(silent=silent._replace(selection=selection, values=values))


def some(selection: Selection, values: Tensor, mask: Tensor, count: int | None = None) -> tuple[Selection, Tensor]:
    """The entries [A] of a selection for which `mask` is true, `count` at most; of one of fixed capacity the rest
    becomes padding."""
    if isinstance(selection, Padded):
        return padded.only(selection, values, mask, mask.shape[0] if count is None else count)
    offsets = torch.nn.functional.pad(mask.cumsum(0), (1, 0)).index_select(0, selection.offsets)
    entries = torch.nonzero(mask).view(-1)
    kept = Selection(selection.latents.index_select(0, entries), offsets, selection.width)
    return kept, values.index_select(0, entries)
