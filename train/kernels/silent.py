"""Which dead latents AuxK wakes, and with what codes: of every token the k largest positive pre-activations among them.

The dead latents' pre-activations are columns of the block that the encoder's product has made, so they cost no second
product: a pass over the rows picks them out and chooses. On a CPU compiled loops look for a value that exactly k of a
row's columns reach; the next row starts from it, with steps as long as values lay apart there and then by false
position (regula falsi). A step is a count in vector registers, which is cheaper than to partition or sort. Where equal
values make that impossible the lower latents win.

What is not positive has no code and no gradient, so it is no entry at all.

Where dense products in bfloat16 are to follow (train/auxk.py), codes come as the block that those take, without a list
of them in between.

A device must not be asked how many latents are dead, nor how many codes they have. There the dead ones stand in a list
of fixed length with living ones behind them (`dead_first`), whose pre-activations are replaced by a number far below
zero; every token has the same number of entries, and those that are not positive have the value 0. The list names no
latent twice, so that rows of zeros can be added for the living ones like any other rows.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.kernels.cpu_pool import over_rows
from thresher.cache.kernels.jit import compiled
from thresher.train.kernels import firing
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.low import patterns, rounded
from thresher.train.kernels.padded import PADDING, wide
from thresher.train.kernels.sparse import ByLatent, Selection

_BLOCK_SHARE = 0.06
"""Share of [N, n] filled by codes above which four dense products in bfloat16 are faster than four sparse ones."""
_BLOCK_WORK = 1 << 26
"""N · n · E below which they are not taken."""


class Dead(NamedTuple):
    """Which latents are dead."""

    latents: Tensor
    """[n] int64: ascending, without `number`; with it the first so many are, and the rest are other ones."""
    number: Tensor | None = None
    """How many of them, a scalar on the device; None: all."""

    def real(self) -> Tensor:
        """[n] bool: those that are dead."""
        if self.number is None:
            return torch.ones_like(self.latents, dtype=torch.bool)
        return torch.arange(self.latents.shape[0], device=self.latents.device) < self.number


class Silent(NamedTuple):
    """Codes of dead latents."""

    latents: Tensor
    """[n] int64: as in `Dead`."""
    selection: Selection
    """Entries, by token; its latents count in `latents`, so its width is n."""
    values: Tensor
    """[A] pre-activations there, all above 0; with a `number` as many for every token, or 0."""
    number: Tensor | None = None
    """As in `Dead`."""


class SilentBlock(NamedTuple):
    """Codes of dead latents, on a CPU whose matrix unit is to multiply them."""

    latents: Tensor
    """[n] int64: as in `Dead`."""
    codes: Tensor
    """[N, n] bfloat16: the pre-activation where there is a code, else 0."""


def dead_first(dead_F: Tensor, length: int) -> Dead:
    """The dead latents and behind them living ones, `length` in all, which must hold all dead ones."""
    count = torch.count_nonzero(dead_F)
    place_F = torch.where(dead_F, dead_F.cumsum(0), count + (~dead_F).cumsum(0)) - 1
    latents = torch.empty_like(place_F).scatter_(0, place_F, torch.arange(dead_F.shape[0], device=dead_F.device))
    return Dead(latents[:length], count)


@functools.cache
def has_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def choose_silent(a_NF: Tensor, dead: Dead, k: int, kernels: Kernels, width: int = 0) -> Silent | SilentBlock:
    """The k largest positive entries of each row among the columns of dead latents; without gradient.

    `width`: E of the products that follow, which may then get a block; 0: they want a list.
    """
    latents = dead.latents
    how = kernels.pick("silent", a_NF.device, a_NF.dtype, a_NF.shape[0] * latents.shape[0])
    if dead.number is not None:
        return _padded_choice(a_NF, dead, k, kernels)
    if how == "numba":
        room = a_NF.shape[0] * latents.shape[0]
        if a_NF.dtype == torch.float32 and room * width >= max(_BLOCK_WORK, 1) and has_tiles():
            block, count = _compiled_block(a_NF, latents, k)
            if count > _BLOCK_SHARE * room:
                return block
        return choose_columns(a_NF, latents, k)
    a_Nn = a_NF.index_select(1, latents)
    if latents.shape[0] <= k:
        return _entries(a_Nn, latents, a_Nn > 0)
    best = torch.topk(a_Nn, k, dim=1, sorted=False).indices
    return _entries(a_Nn, latents, torch.zeros_like(a_Nn, dtype=torch.bool).scatter_(1, best, True) & (a_Nn > 0))


def by_latent(selection: Selection) -> ByLatent:
    """`Selection.by_latent` on a CPU, by counting: there are many entries for each of few latents."""
    index, offsets = selection.latents.numpy(), selection.offsets.numpy()
    order, token = np.empty_like(index), np.empty_like(index)
    starts = np.zeros(selection.width + 1, np.int64)
    _turn(index, offsets, order, token, starts)
    return ByLatent(torch.from_numpy(order), torch.from_numpy(token), torch.from_numpy(starts))


def plain_silent(a_NF: Tensor, latents: Tensor, k: int) -> Tensor:
    """[N, n] bool: what `choose_silent` must choose; equal values go to the lower latent."""
    a_Nn = a_NF[:, latents]
    best = torch.sort(a_Nn, dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(a_Nn, dtype=torch.bool).scatter_(1, best, True) & (a_Nn > 0)


def _entries(a_Nn: Tensor, latents: Tensor, mask_Nn: Tensor) -> Silent:
    width = mask_Nn.shape[1]
    position = torch.nonzero(mask_Nn.view(-1)).view(-1)
    offsets = torch.nn.functional.pad(mask_Nn.sum(1).cumsum(0), (1, 0))
    return Silent(latents, Selection(position % width, offsets, width), a_Nn.view(-1).index_select(0, position))


def _padded_choice(a_NF: Tensor, dead: Dead, k: int, kernels: Kernels) -> Silent:
    a_Nn = a_NF.index_select(1, dead.latents).masked_fill_(~dead.real(), PADDING)
    tokens, width = a_Nn.shape
    room = min(k, width)
    if room < width:
        columns = firing.select_topk(a_Nn, room, kernels).latents
        a_Nn = a_Nn.gather(1, columns.view(tokens, room))
    else:
        columns = torch.arange(width, device=a_Nn.device).repeat(tokens)
    offsets = torch.arange(0, tokens * room + 1, room, device=a_Nn.device)
    values = torch.relu(a_Nn.to(wide(a_Nn.dtype))).view(-1)
    return Silent(dead.latents, Selection(columns, offsets, width), values, dead.number)


def choose_columns(a_NF: Tensor, latents: Tensor, k: int) -> Silent:
    """The k largest positive entries of each row among some columns [n], by compiled loops on a CPU."""
    tokens, width = a_NF.shape[0], latents.shape[0]
    room = min(k, width)
    a, columns = a_NF.numpy(), latents.numpy()
    index = np.empty(tokens * room, np.int64)
    values = np.empty(tokens * room, a.dtype)
    counts = np.empty(tokens, np.int64)
    bits = np.empty(0, np.int32 if a.itemsize == 4 else np.int64)

    def piece(first: int, stop: int) -> None:
        _choose(a, bits, columns, room, first, stop, index, values, counts)

    over_rows(tokens, piece, 4 * tokens * width)
    offsets = np.zeros(tokens + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    if offsets[-1] < tokens * room:
        close_up(offsets, room, index, values)
    size = int(offsets[-1])
    selection = Selection(torch.from_numpy(index[:size]), torch.from_numpy(offsets), width)
    return Silent(latents, selection, torch.from_numpy(values[:size]))


def _compiled_block(a_NF: Tensor, latents: Tensor, k: int) -> tuple[SilentBlock, int]:
    """The codes, and how many there are."""
    z_Nn = torch.empty(a_NF.shape[0], latents.shape[0], dtype=torch.bfloat16)
    a, columns, low = a_NF.numpy(), latents.numpy(), patterns(z_Nn)
    counts, bits = np.empty(a.shape[0], np.int64), np.empty(0, np.int32)

    def piece(first: int, stop: int) -> None:
        _choose_block(a, bits, columns, k, first, stop, low, counts)

    over_rows(a.shape[0], piece, 4 * z_Nn.numel())
    return SilentBlock(latents, z_Nn), int(counts.sum())


@compiled(forceinline=True)
def reaching(row, cut):  # type: ignore[no-untyped-def]
    """How many values are at least `cut`."""
    found = np.int32(0)
    for i in range(row.shape[0]):
        found = np.int32(found + np.int32(row[i] >= cut))  # a sum alone would become int64, in half as many lanes
    return found


@compiled(forceinline=True)
def _largest(row, bits):  # type: ignore[no-untyped-def]
    """The largest value, some being positive: those order like their bits, which vector registers can compare."""
    best = bits[0]
    for i in range(bits.shape[0]):
        best = max(best, bits[i])
    bits[-1], last = best, bits[-1]
    largest = row[-1]
    bits[-1] = last
    return largest


@compiled()
def _cut(row, bits, k, positive, guess, pace):  # type: ignore[no-untyped-def]
    """(cut, k, pace): exactly k values reach the cut; or (cut, fewer, pace): too many reach it, so few exceed it.

    More than k values are positive, `positive` of them. More than k reach `low` and fewer reach `high`, always. `pace`
    is how far apart neighbours lie there; that of a row is the first thing to try on the next, 0 if nothing is known.
    """
    kind = row.dtype.type
    low, many, high, few = kind(0), positive, kind(np.inf), np.int64(0)
    cut, steps = guess, 0
    while True:
        if high == np.inf and not (low < cut and pace > 0 and steps < 3):
            high = _largest(row, bits)
            few = np.int64(reaching(row, high))
            if few >= k:
                return high, k if few == k else 0, pace
        if not low < cut < high:
            cut = low + (high - low) / kind(2)
            if not low < cut < high:  # neighbours: what reaches low and not high equals low
                return low, few, pace
        reached = np.int64(reaching(row, cut))
        if high < np.inf and low > 0:
            pace = (high - low) / kind(many - few)
        if reached == k:
            return cut, k, pace
        if reached > k:
            low, many = cut, reached
        else:
            high, few = cut, reached
        steps += 1
        if steps < 3 and pace > 0:
            cut += kind(reached - k) * pace
        elif high < np.inf:
            share = kind(0.5) if steps % 3 == 0 else kind(many - k) / kind(many - few)
            cut = low + (high - low) * share


@compiled(forceinline=True)
def reach(row, bits, k, positive, guess, pace):  # type: ignore[no-untyped-def]
    """(cut, spare, guess, pace): what exceeds the cut is chosen, and of what equals it the first `spare`, all if -1.

    With what the next row is to begin from.
    """
    if positive <= k:
        return np.nextafter(row.dtype.type(0), row.dtype.type(1)), -1, guess, pace
    cut, sure, pace = _cut(row, bits, k, positive, guess, pace)
    return cut, -1 if sure == k else k - sure, cut, pace


@compiled(forceinline=True)
def _read(a, columns, n, row):  # type: ignore[no-untyped-def]
    """Gather a row's columns; how many are positive."""
    source = a[n]
    for i in range(row.shape[0]):
        row[i] = source[np.uint64(columns[i])]  # unsigned: no index counts from the end, which nobody has to ask then
    return np.int64(reaching(row, np.nextafter(row.dtype.type(0), row.dtype.type(1))))


@compiled()
def _choose(a, kind, columns, k, first, stop, index, values, counts):  # type: ignore[no-untyped-def]
    """Rows first to stop: entries of row n go to index and values from n · k on, their number to counts[n]."""
    row = np.empty(columns.shape[0], a.dtype)
    bits, guess, pace = row.view(kind.dtype), a.dtype.type(0), a.dtype.type(0)
    for n in range(first, stop):
        positive = _read(a, columns, n, row)
        cut, spare, guess, pace = reach(row, bits, k, positive, guess, pace)
        at, end, i = n * k, n * k + min(k, positive), 0
        counts[n] = end - at
        if spare < 0:
            while at < end:
                index[at], values[at] = i, row[i]
                at += row[i] >= cut
                i += 1
            continue
        while at < end:
            tied = row[i] == cut and spare > 0
            spare -= tied
            index[at], values[at] = i, row[i]
            at += row[i] > cut or tied
            i += 1


@compiled()
def _choose_block(a, kind, columns, k, first, stop, low, counts):  # type: ignore[no-untyped-def]
    """Rows first to stop: row n's codes go to low[n] as bfloat16, with 0 elsewhere, their number to counts[n]."""
    row = np.empty(columns.shape[0], a.dtype)
    bits, guess, pace = row.view(kind.dtype), a.dtype.type(0), a.dtype.type(0)
    for n in range(first, stop):
        positive = _read(a, columns, n, row)
        cut, spare, guess, pace = reach(row, bits, k, positive, guess, pace)
        counts[n] = min(k, positive)
        out = low[n]
        if spare < 0:
            for i in range(row.shape[0]):
                out[i] = rounded(row[i]) if row[i] >= cut else np.uint16(0)
            continue
        for i in range(row.shape[0]):
            tied = row[i] == cut and spare > 0
            spare -= tied
            out[i] = rounded(row[i]) if row[i] > cut or tied else np.uint16(0)


@compiled()
def _turn(index, offsets, order, token, starts):  # type: ignore[no-untyped-def]
    """Order the entries by latent and then by token, by counting."""
    for entry in range(index.shape[0]):
        starts[index[entry] + 1] += 1
    for latent in range(starts.shape[0] - 1):
        starts[latent + 1] += starts[latent]
    place = starts[:-1].copy()
    for n in range(offsets.shape[0] - 1):
        for entry in range(offsets[n], offsets[n + 1]):
            latent = index[entry]
            order[place[latent]], token[place[latent]] = entry, n
            place[latent] += 1


@compiled()
def close_up(offsets, room, index, values):  # type: ignore[no-untyped-def]
    """Move the entries of rows that take less than their room to where they belong."""
    for n in range(offsets.shape[0] - 1):
        for i in range(offsets[n + 1] - offsets[n]):
            index[offsets[n] + i] = index[n * room + i]
            values[offsets[n] + i] = values[n * room + i]
