"""What is written where in a model's pass, and which positions count: shared by training end to end and evaluation.

One patch mask P and one scoring mask S serve whoever replaces parts of a model, so that what a dictionary is trained
for is what it is judged by. P never looks at token ids: padding often shares its id with the end of text, so the
harvested `keep` code alone says what is real. S asks for both ends of a prediction, because a packed row would
otherwise score the first word of a document as if the previous document could have foretold it.

Only positions in P are read or written; elsewhere the live value stays. All edits are differentiable in what they
write. Where nobody looks at what they overwrite, they say so, and the target may leave it uncomputed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.contracts import Edit, Overwriting
from thresher.cache.layout import KEPT, Contexts

PATCH_RULE = "keep = 1 (real, not special) except the first real position of a row; elsewhere the live value stays"
SCORE_RULE = "source t is patched, t + 1 is real, both in one document"


class Positions(NamedTuple):
    """Where a batch is patched; of the flattened [B, T]."""

    patched: Tensor
    """[N] int64."""
    others: Tensor
    """[M] int64: all other positions."""


def patch_mask(contexts: Contexts) -> np.ndarray:
    """P, [M, T] bool."""
    real = contexts.keep > 0
    first = real & (np.cumsum(real, axis=1) == 1)
    return (contexts.keep == KEPT) & ~first


def score_mask(contexts: Contexts) -> np.ndarray:
    """S over source positions, [M, T] bool; the last position predicts nothing and is never in it."""
    scored = patch_mask(contexts)
    scored[:, :-1] &= (contexts.keep[:, 1:] > 0) & (contexts.document_id[:, 1:] == contexts.document_id[:, :-1])
    scored[:, -1:] = False
    return scored


def places(mask_BT: Tensor) -> Tensor:
    """[N] int64: the true positions of the flattened batch, which a mask would be searched for at every site."""
    return mask_BT.flatten().nonzero()[:, 0]


def positions(mask_BT: Tensor) -> Positions:
    """The true positions of a batch, and the others."""
    return Positions(places(mask_BT), places(~mask_BT))


def read_rows(x_BTD: Tensor, places_N: Tensor) -> Tensor:
    """The given positions as [N, D] in float32, or in the model's dtype where that is wider."""
    x_ND = x_BTD.flatten(0, 1).index_select(0, places_N)
    return x_ND.to(torch.promote_types(x_BTD.dtype, torch.float32))


def write_rows(x_BTD: Tensor, places_N: Tensor, value: Tensor) -> Tensor:
    """A copy of the live value with `value` ([N, D] or [D]) at the given positions."""
    out_BTD = x_BTD.clone(memory_format=torch.contiguous_format)
    rows_ND = value.to(x_BTD.dtype).expand(places_N.shape[0], -1)
    out_BTD.view(-1, x_BTD.shape[-1]).index_copy_(0, places_N, rows_ND)
    return out_BTD


def recording_edits(sites: Sequence[str], places_N: Tensor, into: dict[str, Tensor]) -> dict[str, Edit]:
    """Edits that change nothing and keep each site's rows at the given positions in `into`, [N, D]."""

    def recorder(site: str) -> Edit:
        def edit(x_BTD: Tensor) -> None:
            into[site] = read_rows(x_BTD, places_N)

        return edit

    return {site: recorder(site) for site in sites}


def constant_edits(values: Mapping[str, Tensor], at: Positions) -> dict[str, Edit]:
    """Edits that write given values ([N, D] rows, or one [D] for all) at the patched positions."""

    def writer(value: Tensor) -> Edit:
        return Overwriting(lambda x_BTD: write_rows(x_BTD, at.patched, value), at.others)

    return {site: writer(value) for site, value in values.items()}


def stream_edits(
    reads: Sequence[Sequence[Sequence[str]]],
    writes: Sequence[Sequence[str]],
    at: Positions,
    encode: Callable[[int, int, Tensor], None],
    decode: Callable[[int, int], Tensor],
) -> dict[str, Edit]:
    """Edits for one pass in which every dictionary reads the stream as the earlier replacements left it.

    `reads`: by dictionary and source the sites it reads; `writes`: sites by dictionary. `encode(i, source, x_ND)` gets
    what a source of dictionary i reads, once the last of its sites has come, several sites side by side;
    `decode(i, destination)` gives what dictionary i writes, [N, E], once all that it reads up to there has come. A site
    may be read by several dictionaries and written by one. The writer reads it as the model made it (an SAE reads what
    it is about to overwrite); any other reader sees what was written, as the rest of the model does.
    """
    seen: dict[tuple[int, int], dict[str, Tensor]] = {}

    def show(whom: Sequence[tuple[int, int]], site: str, x_BTD: Tensor) -> None:
        x_ND = read_rows(x_BTD, at.patched) if whom else None
        for i, source in whom:
            sites, rows = reads[i][source], seen.setdefault((i, source), {})
            assert x_ND is not None
            rows[site] = x_ND
            if len(rows) == len(sites):
                encode(i, source, x_ND if len(sites) == 1 else torch.cat([rows[name] for name in sites], dim=1))

    def edit_of(site: str) -> Edit:
        readers = [(i, s) for i, sources in enumerate(reads) for s, names in enumerate(sources) if site in names]
        writer = next(((i, j) for i, names in enumerate(writes) for j, name in enumerate(names) if name == site), None)
        own = [reader for reader in readers if writer is None or reader[0] == writer[0]]
        others = [reader for reader in readers if reader not in own]

        def edit(x_BTD: Tensor) -> Tensor | None:
            show(own, site, x_BTD)
            if writer is None:
                return None
            out_BTD = write_rows(x_BTD, at.patched, decode(*writer))
            show(others, site, out_BTD)
            return out_BTD

        return edit if writer is None or own else Overwriting(edit, at.others)

    read = [names for sources in reads for names in sources]
    touched = dict.fromkeys(site for names in (*read, *writes) for site in names)
    return {site: edit_of(site) for site in touched}
