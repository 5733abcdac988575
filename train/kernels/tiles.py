"""Selections of a block of pre-activations that is too large to be made at once, from tiles of its rows.

A token's own choice (TopK, thresholds) is the same in a tile as in the block, and the tiles' entries follow each other.
BatchTopK's ⌊kN⌋ largest entries are among those that each tile alone would keep of that many, so the cut is made once
more over all tiles; equal values go to the earlier token, as in one block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.train.kernels import firing, low, padded
from thresher.train.kernels.padded import Padded
from thresher.train.kernels.silent import Silent, SilentBlock
from thresher.train.kernels.sparse import Selection

LIMIT_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Size of a block by device, above which it is made in tiles."""


def tile_rows(width: int, itemsize: int, device: torch.device) -> int:
    """Rows of a tile."""
    return max(1, LIMIT_BYTES.get(device.type, 1 << 30) // (width * itemsize))


def served_rows(width: int, itemsize: int, device: torch.device) -> int:
    """Rows of a tile where only a selection is wanted of it: on a CPU few enough to stay in its caches until then, and
    enough for a product at full speed."""
    rows = tile_rows(width, itemsize, device)
    return min(rows, max(256, (1 << 23) // (width * itemsize))) if device.type == "cpu" else rows


def joined(
    parts: Sequence[tuple[Selection, Tensor]], count: int | None = None, norms_F: Tensor | None = None
) -> tuple[Selection, Tensor]:
    """One selection and its values [A] from those of consecutive tiles; `count`: only the largest, so many.

    `norms_F`: they compete by their values times these.
    """
    if any(isinstance(selection, Padded) for selection, _ in parts):
        return _joined_padded([(s, values) for s, values in parts if isinstance(s, Padded)], count, norms_F)
    counts = torch.cat([selection.offsets.diff() for selection, _ in parts])
    latents = torch.cat([selection.latents for selection, _ in parts])
    values = torch.cat([values for _, values in parts])
    if count is not None and values.shape[0] > count:
        keep = firing._largest(values if norms_F is None else values * norms_F[latents], count)
        rows = torch.arange(counts.shape[0], device=counts.device).repeat_interleave(counts)
        counts = torch.bincount(rows[keep], minlength=counts.shape[0])
        latents, values = latents[keep], values[keep]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Selection(latents, offsets, parts[0][0].width), values


def _joined_padded(
    found: Sequence[tuple[Padded, Tensor]], count: int | None, norms_F: Tensor | None
) -> tuple[Selection, Tensor]:
    scores = None if norms_F is None else [values * norms_F.index_select(0, s.latents) for s, values in found]
    parts: Sequence[tuple[Selection, Tensor]] = found if count is None else padded.cut(found, count, scores)
    selections = [selection for selection, _ in parts if isinstance(selection, Padded)]
    width, tokens = selections[0].width, sum(selection.tokens for selection in selections)
    places, start = [], 0
    for selection in selections:
        places.append(torch.where(selection.real, selection.positions + start * width, tokens * width))
        start += selection.tokens
    positions, order = torch.sort(torch.cat(places), stable=True)  # padding goes behind all tiles
    order = order if count is None else order[:count]
    flags = [selection.overflowed for selection in selections if selection.overflowed is not None]
    overflowed = torch.stack(flags).any() if flags else None
    values = torch.cat([values for _, values in parts]).index_select(0, order)
    return Padded(positions[: order.shape[0]], tokens, width, overflowed), values


def joined_silent(parts: Sequence[Silent | SilentBlock]) -> Silent | SilentBlock:
    """The codes of dead latents in all tiles; a block if any of them is one."""
    lists = [part for part in parts if isinstance(part, Silent)]
    if len(lists) == len(parts):
        selection, values = joined([(part.selection, part.values) for part in lists])
        return lists[0]._replace(selection=selection, values=values)
    return SilentBlock(parts[0].latents, torch.cat([_as_block(part) for part in parts]))


def _as_block(part: Silent | SilentBlock) -> Tensor:
    if isinstance(part, SilentBlock):
        return part.codes
    return low.spread(part.values, part.selection.latents, part.selection.offsets, part.selection.width)
