"""Selections of tokens that compete with each other: of one layer or of all, of a batch in one piece or in parts.

Every part of every source keeps as many entries as the whole batch may keep in all, at most; the cut is made among
those, so the selection is the one of the whole block [N, F] of a source, or [N, L, F] of a joint pool, entry for entry.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thresher.train.dictionary.encoder import Chosen, Tally
from thresher.train.dictionary.offers import cut_latents, settled, some
from thresher.train.dictionary.rules.base import merged
from thresher.train.kernels import padded

if TYPE_CHECKING:
    from thresher.train.dictionary.coder import Coder


@torch.no_grad()
def choose(
    coder: "Coder",
    parts: Sequence[Sequence[Tensor]],
    tokens: int | None = None,
    cut_pools: "Callable[[Sequence[Sequence[Chosen]], int], list[list[Chosen]]] | None" = None,
) -> list[list[Chosen]]:
    """What is selected, by part and source; parts: rows [n, D] by part and source, of one batch.

    Where that has more rows elsewhere, `tokens` is its N, and `cut_pools` says what of the candidates of every pool, by
    source and part, is among its best so many.
    """
    tokens = sum(part[0].shape[0] for part in parts) if tokens is None else tokens
    found = []
    for source in range(len(parts[0])):
        encoder, bias_F, norms_F = coder.encoder(source), coder.bias(source), coder.rank_norms(source)
        found.append([encoder.choose(part[source], bias_F, tokens, norms_F) for part in parts])
    budget = coder.encoder(0).rule.budget(tokens)
    if budget is not None:
        joint = coder.spec.pool == "joint"
        pools = [[one for column in found for one in column]] if joint else found
        if cut_pools is None and coder.holding is not None:
            cut_pools = functools.partial(cut_latents, coder, coder.holding, tokens)
        kept = [cut(pool, budget) for pool in pools] if cut_pools is None else cut_pools(pools, budget)
        every = iter([one for pool in kept for one in pool])
        found = [[next(every) for _ in column] for column in found]
    if coder.holding is not None:
        found = settled(coder, coder.holding, found)
    return [list(row) for row in zip(*found, strict=True)]


def cut(parts: Sequence[Chosen], count: int) -> list[Chosen]:
    """Keep the `count` entries of all parts with the largest scores; equal ones in order of part and position."""
    scores = [part.scores() for part in parts]
    selections = [part.selection for part in parts if part.selection is not None]
    if any(isinstance(selection, padded.Padded) for selection in selections):
        pairs = [(selection, part.values) for selection, part in zip(selections, parts, strict=True)]
        made = padded.cut(pairs, count, scores)
        return [part._replace(selection=s, values=v) for part, (s, v) in zip(parts, made, strict=True)]
    flat = torch.cat(scores)
    if flat.shape[0] <= count:
        return list(parts)
    pieces = padded.best(flat, count).split([part.values.shape[0] for part in parts])
    return [only(part, mask, count) for part, mask in zip(parts, pieces, strict=True)]


def only(part: Chosen, keep: Tensor, count: int) -> Chosen:
    """A selection reduced to the entries in a mask [A], `count` at most."""
    assert part.selection is not None
    selection, values = some(part.selection, part.values, keep, count)
    return part._replace(selection=selection, values=values)


def shared(tallies: Sequence[Sequence[Tally]]) -> list[list[Tally]]:
    """Tallies by source and part, each telling of all sources: a joint pool has one running threshold."""
    together = [
        merged([tally.seen for tally in column if tally.seen is not None])._replace(tokens=column[0].tokens)
        for column in zip(*tallies, strict=True)
    ]
    return [[t._replace(seen=all_of) for t, all_of in zip(source, together, strict=True)] for source in tallies]
