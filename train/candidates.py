"""BatchTopK's cut where rows or latents of a batch are on several ranks: exact, and of equal scores the one that a
single process would keep.

Every rank tells the scores of as many of its own entries as the whole batch may keep, the best, in the order of its
rows, and how many each row has. So all know the least score that is kept, and how many entries of exactly that score
there is room for: the first ones in the order of source, row of the batch and latent.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.encoder import Chosen
from thresher.train.dictionary.pools import cut, only
from thresher.train.kernels.padded import PADDING, Padded
from thresher.train.mesh import Group


class Form(NamedTuple):
    """How what a rank tells of one pool is laid out; the same on all ranks."""

    sources: int
    most: int
    """Rows that no rank has more of."""
    capacity: int
    """C: entries that no rank has more of."""
    dtype: torch.dtype
    """Of scores."""

    @property
    def words(self) -> int:
        """int32 numbers that it takes."""
        return self.capacity * (self.dtype.itemsize // 4) + self.sources * self.most


class Pool:
    """A rank's candidates of one pool."""

    def __init__(self, parts: Sequence[Chosen], form: Form) -> None:
        """`parts`: by source and part, cut to what the whole batch may keep."""
        self.parts, self.form = parts, form
        scores = torch.cat([part.scores() for part in parts])
        self._end = scores.shape[0]
        self._positions: Tensor | None = None
        selections = [part.selection for part in parts if part.selection is not None]
        filled = torch.cat([scores, scores.new_full((1,), PADDING)])
        if any(isinstance(selection, Padded) for selection in selections):
            real = torch.cat([_real(selection) for selection in selections])
            fill = torch.nonzero_static(real, size=form.capacity, fill_value=self._end)
            self._positions = fill.view(-1)
            self.scores = filled.index_select(0, self._positions)
        else:
            self.scores = torch.nn.functional.pad(scores, (0, form.capacity - self._end), value=PADDING)
        counts = torch.cat([selection.offsets.diff() for selection in selections]).view(form.sources, -1)
        self.counts = torch.nn.functional.pad(counts, (0, form.most - counts.shape[1]))

    def packed(self) -> Tensor:
        """[words] int32: what it tells the others."""
        return pack(self.scores, self.counts)

    def only(self, keep: Tensor) -> list[Chosen]:
        """The parts with those of the candidates that are kept; keep: [C] bool."""
        if self._positions is None:
            mask = keep[: self._end]
        else:
            mask = keep.new_zeros(self._end + 1).index_copy_(0, self._positions, keep)[: self._end]
        pieces = mask.split([part.values.shape[0] for part in self.parts])
        return [only(part, piece, self.form.capacity) for part, piece in zip(self.parts, pieces, strict=True)]


def pack(scores: Tensor, counts: Tensor) -> Tensor:
    """[words] int32: scores [C], and entries [sources, most] by row."""
    return torch.cat([scores.contiguous().view(torch.int32), counts.reshape(-1).to(torch.int32)])


def nothing(form: Form, device: torch.device) -> Tensor:
    """[words] int32: of a rank that has no candidates."""
    scores = torch.full((form.capacity,), PADDING, dtype=form.dtype, device=device)
    return pack(scores, torch.zeros(form.sources, form.most, device=device))


def unpack(told_RB: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """[R, C] scores and [R, sources, most] int64 entries by row, of all ranks; told_RB: [R, words] int32."""
    wide = form.capacity * (form.dtype.itemsize // 4)
    scores_RC = told_RB[:, :wide].contiguous().view(form.dtype)
    return scores_RC, told_RB[:, wide:].long().view(-1, form.sources, form.most)


def cut_over(
    group: Group, found: Sequence[Sequence[Chosen]], forms: Sequence[Form], places_m: Tensor, budget: int
) -> list[list[Chosen]]:
    """What all ranks together keep of every pool's candidates, by source and part; one collective.

    places_m: [most] int32, where this rank's rows stand in the batch.
    """
    mine = [Pool(cut(parts, budget), form) for parts, form in zip(found, forms, strict=True)]
    told_RB = group.gather(torch.cat([places_m, *(pool.packed() for pool in mine)]))
    places_Rm, *told = told_RB.split([places_m.shape[0], *(pool.form.words for pool in mine)], dim=1)
    kept = []
    for pool, words_RB in zip(mine, told, strict=True):
        keep = keep_own(*unpack(words_RB, pool.form), places_Rm.long(), group.index, budget)
        kept.append(pool.only(keep))
    return kept


def forms_of(coder: Coder, most: int, budget: int) -> list[Form]:
    """How every pool is told of, where no rank has more than `most` rows."""
    sources, latents = len(coder.inputs), coder.n_latents if coder.holding is None else coder.holding.widest
    number, each = (1, sources) if coder.spec.pool == "joint" else (sources, 1)
    capacity = min(budget, each * most * latents)
    return [Form(each, most, capacity, coder.b_dec.dtype)] * number


def keep_own(scores_RC: Tensor, counts_RSm: Tensor, places_Rm: Tensor, own: int, budget: int) -> Tensor:
    """[C] bool: which of rank `own`'s candidates are among the `budget` largest positive ones of all ranks.

    scores_RC: behind a rank's candidates numbers below 0; counts_RSm: candidates of every row by source; places_Rm: the
    rows' places in the batch. On a device nothing is read back.
    """
    flat = scores_RC.reshape(-1)
    if budget == 0:
        return torch.zeros_like(scores_RC[own], dtype=torch.bool)
    if flat.shape[0] <= budget:
        return scores_RC[own] > 0
    edge = torch.kthvalue(flat, flat.shape[0] - budget + 1).values.clamp_min(0.0)
    tied_RC = (scores_RC == edge) & (edge > 0)
    room = budget - (flat > edge).sum()
    keep = scores_RC[own] > edge
    if flat.device.type == "cpu" and bool(tied_RC.sum() <= room):
        return keep | tied_RC[own]
    return keep | (tied_RC[own] & (_order(tied_RC, counts_RSm, places_Rm, own) < room))


def _order(tied_RC: Tensor, counts_RSm: Tensor, places_Rm: Tensor, own: int) -> Tensor:
    """[C]: of each tied entry of rank `own`, how many tied ones of all ranks come before it."""
    ranks, sources, most = counts_RSm.shape
    capacity, rows = tied_RC.shape[1], sources * most
    ends_Rn = counts_RSm.view(ranks, rows).cumsum(1)
    entry_RC = torch.arange(capacity, device=tied_RC.device).expand(ranks, -1).contiguous()
    row_RC = torch.searchsorted(ends_Rn, entry_RC, right=True).clamp_max(rows - 1)  # padding, in the last, is not tied
    ties_Rn = torch.zeros_like(ends_Rn).scatter_add_(1, row_RC, tied_RC.long())
    first_S = torch.arange(sources, device=tied_RC.device) * (places_Rm.max() + 1)
    places = (first_S[None, :, None] + places_Rm[:, None, :]).reshape(-1)
    order = places.argsort(stable=True)  # a row on several ranks: in the order of their latents; none: has no entries
    ordered = ties_Rn.view(-1).index_select(0, order)
    before = torch.empty_like(ordered).index_copy_(0, order, ordered.cumsum(0) - ordered).view(ranks, rows)
    here = ties_Rn[own].cumsum(0) - ties_Rn[own]  # in rows before it on this rank
    tied = tied_RC[own].long()
    return tied.cumsum(0) - tied + (before[own] - here).index_select(0, row_RC[own])


def _real(selection: object) -> Tensor:
    assert isinstance(selection, Padded)
    return selection.real
