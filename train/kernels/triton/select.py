"""Selections of fixed capacity in few passes over the block; what they must equal stands in kernels/padded.py.

Compacting takes two passes, both in flat order: `_count` counts what exceeds the cut in each span of the block, a sum
over spans tells every span where its entries go, and `_place` writes them there. No entry's place depends on timing.

BatchTopK: a strided sample suggests a floor that somewhat more than ⌊k·N⌋ entries exceed; those are compacted, and the
value of rank ⌊k·N⌋ is found among them digit by digit: positive floats order like their bit patterns, so four
histograms of eight bits, each of the entries that agree with the digits before, end at the exact value. A second
compaction takes what exceeds it and of its equals the first ones. If the sample misled, the same kernels look at the
whole block instead; which of the two it is, they learn from device memory, where one of them finds that it has nothing
to do.

TopK: the k-th largest of the maxima of groups of 64 is a floor that at least k entries of the row reach; one program
per row then finds the exact k-th value among those, again digit by digit, and writes the row's latents. Equal values
at the edge: the lower latent first.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.train.kernels.padded import Padded
from thresher.train.kernels.triton.launch import on

_TILE = 2048
_ROUNDS = 16  # tiles in a span
_SAMPLE = 1 << 15
_GROUP = 64


def topk(a_NF: Tensor, k: int) -> Padded:
    """The k largest of every row, latents ascending, of equal ones the lower; no padding."""
    tokens, width = a_NF.shape
    a_NF = a_NF.contiguous()
    positions = torch.empty(tokens * k, dtype=torch.int64, device=a_NF.device)
    floor = torch.full((tokens,), -torch.inf, device=a_NF.device)
    if width % _GROUP == 0 and width // _GROUP >= k:
        peaks = a_NF.view(tokens, -1, _GROUP).amax(2).float()
        floor = torch.topk(peaks.masked_fill(peaks.isnan(), -torch.inf), k, dim=1, sorted=False).values.amin(1)
    with on(a_NF):
        _topk[(tokens,)](a_NF, floor, positions, width, k, TILE=min(_TILE, max(16, 1 << (width - 1).bit_length())))
    return Padded(positions, tokens, width)


def above(a_NF: Tensor, floor: Tensor | float, capacity: int) -> tuple[Padded, Tensor]:
    """The first `capacity` entries above their floor ([F] or a number), and how many there are, on the device."""
    tokens, width = a_NF.shape
    flat = a_NF.reshape(-1)
    end = _number(flat, flat.shape[0])
    per_latent = isinstance(floor, Tensor)
    cut = floor if isinstance(floor, Tensor) else torch.full((1,), floor, device=flat.device)
    cut = cut.float()
    picker = _Picker(flat, None, end, cut, _number(flat, 0), width if per_latent else 0)
    positions = flat.new_full((capacity,), flat.shape[0], dtype=torch.int64)
    picker.place(positions)
    return Padded(positions, tokens, width, picker.total > capacity), picker.total


def batch_topk(a_NF: Tensor, count: int) -> Padded:
    """The `count` largest positive entries of the block, ties to the lower position; padding if fewer are positive."""
    flat = a_NF.reshape(-1)
    size = flat.shape[0]
    positions = flat.new_full((count,), size, dtype=torch.int64)
    if count == 0:
        return Padded(positions, *a_NF.shape)
    floor = _likely_floor(flat, count)
    likely = _Picker(flat, None, _number(flat, size), floor, _number(flat, 0), 0)
    found = flat.new_full((min(size, count + count // 2 + 4096),), size, dtype=torch.int64)
    values = torch.empty(found.shape, dtype=torch.float32, device=flat.device)
    likely.place(found, values)
    enough = (likely.total <= found.shape[0]) & ((likely.total >= count) | (floor[0] <= 0))
    among, all_of = torch.where(enough, likely.total, 0), torch.where(enough, 0, size)
    cut, need = _ranked(((values, among), (flat, all_of)), count)
    for numbers, places, end in ((values, found, among), (flat, None, all_of)):
        _Picker(numbers, places, end, cut, need, 0).place(positions)
    return Padded(positions, *a_NF.shape)


class _Picker:
    """Compaction of what exceeds a cut, and of the first `need` that equal it."""

    def __init__(
        self, values: Tensor, places: Tensor | None, end: Tensor, cut: Tensor, need: Tensor, per_latent: int
    ) -> None:
        """values [C], of which `end` (scalar) count; places [C]: where they stand in the block (None: in place);
        cut [1], or [F] with per_latent = F."""
        self.given = (values, places, end, cut, need, max(per_latent, 1))
        self.flags = {"PER_LATENT": per_latent > 0, "PLACES": places is not None, "TILE": _TILE, "ROUNDS": _ROUNDS}
        self.spans = triton.cdiv(values.shape[0], _TILE * _ROUNDS)
        counts = torch.empty(2, self.spans, dtype=torch.int64, device=values.device)
        with on(values):
            _count[(self.spans,)](*self.given, counts, self.spans, **self.flags)
        self.after = counts.cumsum(1)
        self.before = self.after - counts
        self.total = self.after[0, -1] + torch.minimum(self.after[1, -1], need)

    def place(self, positions: Tensor, values: Tensor | None = None) -> None:
        """Write the flat positions, ascending, and the values if wanted, as far as there is room."""
        with on(positions):
            _place[(self.spans,)](
                *self.given, self.before, self.spans, positions, values, positions.shape[0],
                VALUES=values is not None, **self.flags,
            )  # fmt: skip


def _number(like: Tensor, value: int) -> Tensor:
    return torch.full((), value, dtype=torch.int64, device=like.device)


def _likely_floor(flat: Tensor, count: int) -> Tensor:
    """[1] float32: as `_likely_floor` in kernels/firing.py."""
    stride = max(1, flat.shape[0] // _SAMPLE) | 1
    sample = flat[::stride].float()
    wanted = count / stride
    rank = math.ceil(wanted + 4 * math.sqrt(wanted) + 4)
    if rank >= sample.shape[0]:
        return torch.zeros(1, device=flat.device)
    return torch.topk(sample, rank, sorted=False).values.amin(0, keepdim=True).clamp_min(0.0)


def _ranked(sources: tuple[tuple[Tensor, Tensor], ...], rank: int) -> tuple[Tensor, Tensor]:
    """The positive value of a rank ([1]; 0 if there are fewer) and how many of its equals are wanted (scalar).

    Over all sources (values [C], how many of them count), of which one at most has any.
    """
    device = sources[0][0].device
    digits = torch.zeros(4, 256, dtype=torch.int32, device=device)
    cut = torch.empty(1, dtype=torch.float32, device=device)
    need = torch.empty((), dtype=torch.int64, device=device)
    with on(cut):
        for turn in range(4):
            for values, end in sources:
                spans = triton.cdiv(values.shape[0], _TILE * _ROUNDS)
                _digits[(spans,)](values, end, digits, rank, TURN=turn, TILE=_TILE, ROUNDS=_ROUNDS)
        _cut[(1,)](digits, rank, cut, need)
    return cut, need


@triton.jit
def _judge(  # type: ignore[no-untyped-def]
    values, places, cut, per_latent, index, real, PER_LATENT: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Values of a tile, and whether they exceed the cut or equal it."""
    value = tl.load(values + index, mask=real, other=0.0).to(tl.float32)
    if PER_LATENT:
        limit = tl.load(cut + index % per_latent, mask=real, other=0.0)
        over = real & (value > limit)
        tied = real & (value != value) & False
    else:
        limit = tl.load(cut)
        over = real & (value > limit)
        tied = real & (value == limit)
    return value, over, tied


@triton.jit
def _count(  # type: ignore[no-untyped-def]
    values, places, end, cut, need, per_latent, counts, spans, PER_LATENT: tl.constexpr, PLACES: tl.constexpr,
    TILE: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Entries of each span above the cut, and equal to it."""
    span = tl.program_id(0).to(tl.int64)
    stop = tl.load(end)
    over_total = tl.zeros([TILE], dtype=tl.int32)
    tied_total = tl.zeros([TILE], dtype=tl.int32)
    start = span * TILE * ROUNDS
    for first in range(start, tl.minimum(start + TILE * ROUNDS, stop), TILE):
        index = first + tl.arange(0, TILE)
        _, over, tied = _judge(values, places, cut, per_latent, index, index < stop, PER_LATENT, PLACES)
        over_total += over.to(tl.int32)
        tied_total += tied.to(tl.int32)
    tl.store(counts + span, tl.sum(over_total, axis=0).to(tl.int64))
    tl.store(counts + spans + span, tl.sum(tied_total, axis=0).to(tl.int64))


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    values, places, end, cut, need, per_latent, before, spans, positions, kept, capacity, VALUES: tl.constexpr,
    PER_LATENT: tl.constexpr, PLACES: tl.constexpr, TILE: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Write what is kept behind what earlier spans keep."""
    span = tl.program_id(0).to(tl.int64)
    stop = tl.load(end)
    wanted = tl.load(need)
    overs = tl.load(before + span)
    ties = tl.load(before + spans + span)
    start = span * TILE * ROUNDS
    for first in range(start, tl.minimum(start + TILE * ROUNDS, stop), TILE):
        index = first + tl.arange(0, TILE)
        value, over, tied = _judge(values, places, cut, per_latent, index, index < stop, PER_LATENT, PLACES)
        over_after = tl.cumsum(over.to(tl.int32), axis=0)
        tied_after = tl.cumsum(tied.to(tl.int32), axis=0)
        tie_rank = ties + tied_after - tied.to(tl.int32)
        keep = over | (tied & (tie_rank < wanted))
        slot = overs + over_after - over.to(tl.int32) + tl.minimum(tie_rank, wanted)
        fits = keep & (slot < capacity)
        position = index
        if PLACES:
            position = tl.load(places + index, mask=fits, other=0)
        tl.store(positions + slot, position, mask=fits)
        if VALUES:
            tl.store(kept + slot, value, mask=fits)
        overs += tl.sum(over.to(tl.int32), axis=0)
        ties += tl.sum(tied.to(tl.int32), axis=0)


@triton.jit
def _descend(digits, rank, TURNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The leading digits of the wanted value after some turns, and its rank among values that share them.

    The prefix is −1 when fewer than `rank` values were counted.
    """
    bins = tl.arange(0, 256)
    prefix = tl.zeros([], dtype=tl.int32)
    left = prefix + rank
    for turn in tl.static_range(TURNS):
        counts = tl.load(digits + turn * 256 + bins)
        upwards = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts  # of this digit or a larger one
        digit = tl.sum((upwards >= left).to(tl.int32), axis=0) - 1
        left -= tl.sum(tl.where(bins > digit, counts, 0), axis=0)
        prefix = tl.where((digit < 0) | (prefix < 0), -1, prefix * 256 + digit)
    return prefix, left


@triton.jit
def _digits(  # type: ignore[no-untyped-def]
    values, end, digits, rank, TURN: tl.constexpr, TILE: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Count the next eight bits of the positive values that begin like the wanted one. Whole numbers: any order."""
    span = tl.program_id(0).to(tl.int64)
    stop = tl.load(end)
    start = span * TILE * ROUNDS
    if start < stop:
        prefix, _ = _descend(digits, rank, TURN)
        bins = tl.arange(0, 256)
        counts = tl.zeros([256], dtype=tl.int32)
        for first in range(start, tl.minimum(start + TILE * ROUNDS, stop), TILE):
            index = first + tl.arange(0, TILE)
            value = tl.load(values + index, mask=index < stop, other=0.0).to(tl.float32)
            bits = value.to(tl.int32, bitcast=True)
            counted = value > 0
            if TURN > 0:
                counted = counted & ((bits >> (32 - 8 * TURN)) == prefix)
            counts += tl.histogram((bits >> (24 - 8 * TURN)) & 255, 256, mask=counted)
        tl.atomic_add(digits + TURN * 256 + bins, counts, mask=counts > 0)


@triton.jit
def _cut(digits, rank, cut, need):  # type: ignore[no-untyped-def]
    prefix, left = _descend(digits, rank, 4)
    tl.store(cut, tl.where(prefix < 0, 0, prefix).to(tl.float32, bitcast=True))
    tl.store(need, tl.where(prefix < 0, 0, left).to(tl.int64))


@triton.jit
def _ordered(at, real):  # type: ignore[no-untyped-def]
    """Bit patterns that order like the values as unsigned numbers, and the values, what is no number as the least."""
    value = tl.load(at, mask=real, other=0.0).to(tl.float32)
    value = tl.where(value == value, value, float("-inf"))
    value = tl.where(value == 0.0, 0.0, value)  # −0 equals 0
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000, value


@triton.jit
def _topk(a, floor, positions, width, k, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    row = a + token * width
    least = tl.load(floor + token)
    bins = tl.arange(0, 256)
    prefix = tl.zeros([], dtype=tl.uint32)
    left = tl.zeros([], dtype=tl.int32) + k
    for turn in tl.static_range(4):
        counts = tl.zeros([256], dtype=tl.int32)
        for first in range(0, width, TILE):
            column = first + tl.arange(0, TILE)
            key, value = _ordered(row + column, column < width)
            counted = (column < width) & (value >= least)
            if turn > 0:
                counted = counted & ((key >> (32 - 8 * turn)) == prefix)
            counts += tl.histogram(((key >> (24 - 8 * turn)) & 255).to(tl.int32), 256, mask=counted)
        upwards = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
        digit = tl.sum((upwards >= left).to(tl.int32), axis=0) - 1
        left -= tl.sum(tl.where(bins > digit, counts, 0), axis=0)
        prefix = prefix * 256 + digit.to(tl.uint32)
    slot = token * k
    ties = tl.zeros([], dtype=tl.int32)
    for first in range(0, width, TILE):
        column = first + tl.arange(0, TILE)
        key, _ = _ordered(row + column, column < width)
        over = (column < width) & (key > prefix)
        tied = (column < width) & (key == prefix)
        tie_rank = ties + tl.cumsum(tied.to(tl.int32), axis=0) - tied.to(tl.int32)
        keep = over | (tied & (tie_rank < left))
        after = tl.cumsum(keep.to(tl.int32), axis=0)
        tl.store(positions + slot + after - 1, token * width + column, mask=keep)
        slot += tl.sum(keep.to(tl.int32), axis=0)
        ties += tl.sum(tied.to(tl.int32), axis=0)
