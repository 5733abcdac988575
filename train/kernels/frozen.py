"""Which latents fire when every token decides alone, on a CPU: compiled loops over rows, on several threads.

Library calls make a mask of the whole block and search it on one thread. Here a row is looked at while it is in the
cache. `above` takes what exceeds its latent's threshold; `largest` the k largest of a row that are positive, by the
same search for a cut as AuxK's choice (silent.py): what is not positive has no code. kernels/firing.py holds the plain
forms: `select_frozen` and `plain_topk`.

What is not a number fires, so that it shows in whatever is computed from the codes.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np import arrayobj
from torch import Tensor

from thresher.cache.kernels.cpu_pool import over_rows
from thresher.cache.kernels.jit import compiled
from thresher.train.kernels.silent import close_up, reach
from thresher.train.kernels.sparse import Selection


def can_choose(a_NF: Tensor) -> bool:
    """Whether the loops know the block's device and format."""
    return a_NF.device.type == "cpu" and a_NF.dtype in (torch.float32, torch.float64)


def above(a_NF: Tensor, floor_F: Tensor) -> tuple[Selection, Tensor]:
    """Entries above their latent's floor [F] (or one for all, []), by token and ascending; and their values [A].

    A piece of rows is counted and filled while it is in the cache, into arrays of its own, which are joined at the end.
    """
    tokens, width = a_NF.shape
    a, floor = a_NF.numpy(), floor_F.expand(width).contiguous().numpy()
    offsets = np.zeros(tokens + 1, np.int64)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {0: (np.empty(0, np.int64), np.empty(0, a.dtype))}

    def piece(first: int, stop: int) -> None:
        size = _count(a, floor, first, stop, offsets)
        found[first] = np.empty(size, np.int64), np.empty(size, a.dtype)
        _fill(a, floor, first, stop, offsets, *found[first])

    over_rows(tokens, piece, a.size)
    np.cumsum(offsets, out=offsets)
    latents, values = (np.concatenate([found[first][part] for first in sorted(found)]) for part in (0, 1))
    return Selection(torch.from_numpy(latents), torch.from_numpy(offsets), width), torch.from_numpy(values)


def largest(a_NF: Tensor, k: int) -> tuple[Selection, Tensor] | None:
    """The positive ones among the k largest of every row, with their values [A]; of equal ones at the edge the lower
    latents. None where something is infinite or not a number."""
    tokens, width = a_NF.shape
    a, room = a_NF.numpy(), min(k, width)
    kind = np.empty(0, np.int32 if a.itemsize == 4 else np.int64)
    latents, values = np.empty(tokens * room, np.int64), np.empty(tokens * room, a.dtype)
    counts = np.empty(tokens, np.int64)
    over_rows(tokens, lambda first, stop: _best(a, kind, room, first, stop, latents, values, counts), 4 * a.size)
    offsets = np.zeros(tokens + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    if bool((counts < 0).any()):
        return None
    if offsets[-1] < tokens * room:
        close_up(offsets, room, latents, values)
    latents, values = latents[: offsets[-1]], values[: offsets[-1]]
    return Selection(torch.from_numpy(latents), torch.from_numpy(offsets), width), torch.from_numpy(values)


_intrinsic: Any = intrinsic  # the type checker does not know that the first argument is not given in calls
_LANES = 64
_WORD = ir.IntType(_LANES)


@_intrinsic
def _exceeding(typing_context, row, floor, at):  # type: ignore[no-untyped-def]
    """A bit for each of 64 numbers from `at` on: whether it exceeds its floor, or is none. So many at once because
    every loop over bits ends with a branch that no processor foresees."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        vectors = []
        for kind, value in zip(signature.args[:2], arguments[:2], strict=True):
            data = arrayobj.make_array(kind)(context, builder, value).data
            vector = ir.VectorType(context.get_data_type(kind.dtype), _LANES)
            place = builder.bitcast(builder.gep(data, [arguments[2]]), vector.as_pointer())
            vectors.append(builder.load(place, align=kind.dtype.bitwidth // 8))
        return builder.bitcast(builder.fcmp_unordered(">", *vectors), _WORD)

    return types.int64(row, floor, types.int64), generate


@_intrinsic
def _lowest(typing_context, bits):  # type: ignore[no-untyped-def]
    """Position of the lowest bit that is set; one is."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.int64), generate


@compiled()
def _count(a, floor, first, stop, offsets):  # type: ignore[no-untyped-def]
    """Numbers of entries by row to offsets[n + 1]; returns their sum."""
    total = np.int64(0)
    for n in range(first, stop):
        row, found = a[n], np.int32(0)
        for i in range(row.shape[0]):
            found = np.int32(found + np.int32(not row[i] <= floor[i]))
        offsets[n + 1] = found
        total += found
    return total


@compiled(forceinline=True)
def _take(row, floor, at, end, latents, values):  # type: ignore[no-untyped-def]
    """Put what exceeds its floor, whose number is known, to places `at` to `end`."""
    i = 0
    while i + _LANES <= row.shape[0] and at < end:
        bits = _exceeding(row, floor, i)
        while bits != 0:
            latents[at] = i + _lowest(bits)
            values[at] = row[latents[at]]
            bits &= bits - 1
            at += 1
        i += _LANES
    while at < end:
        latents[at], values[at] = i, row[i]
        at += not row[i] <= floor[i]
        i += 1


@compiled()
def _fill(a, floor, first, stop, offsets, latents, values):  # type: ignore[no-untyped-def]
    at = 0
    for n in range(first, stop):
        end = at + offsets[n + 1]
        _take(a[n], floor, at, end, latents, values)
        at = end


@compiled(forceinline=True)
def _exceeding_count(row, cut):  # type: ignore[no-untyped-def]
    """How many values exceed `cut`."""
    found = np.int32(0)
    for i in range(row.shape[0]):
        found = np.int32(found + np.int32(row[i] > cut))
    return np.int64(found)


@compiled(forceinline=True, fastmath={"reassoc", "contract"})
def _size(row):  # type: ignore[no-untyped-def]
    """Root of the mean square; not a number where some value is none."""
    total = row.dtype.type(0)
    for i in range(row.shape[0]):
        total += row[i] * row[i]
    return np.sqrt(total / row.dtype.type(row.shape[0]))


@compiled(forceinline=True)
def _keep(row, index, cut, spare, at, end, latents, values):  # type: ignore[no-untyped-def]
    """Of some values and their latents, put what exceeds the cut and the first `spare` that equal it to places `at` to
    `end`."""
    i = 0
    while at < end:
        tied = row[i] == cut and spare > 0
        spare -= tied
        latents[at], values[at] = index[i], row[i]
        at += row[i] > cut or tied
        i += 1


@compiled()
def _best(a, kind, k, first, stop, latents, values, counts):  # type: ignore[no-untyped-def]
    """Rows first to stop: entries of row n go to places from n · k on, their number to counts[n]; -1 where something
    is infinite or no number.

    Rows are alike but for their size: what exceeds most of the last row's cut in units of its size is a small multiple
    of k values, and the search goes on among those. A row where they are fewer than k is looked at whole.
    """
    zero, most, largest_finite = a.dtype.type(0), a.dtype.type(0.8), np.nextafter(a.dtype.type(np.inf), a.dtype.type(0))
    share, pace, floor = zero, zero, np.empty(a.shape[1] + _LANES, a.dtype)
    some, index = np.empty(a.shape[1] + _LANES, a.dtype), np.empty(a.shape[1], np.int64)
    for n in range(first, stop):
        row, at = a[n], n * k
        size = _size(row)
        if size != size or (size == np.inf and _exceeding_count(row, largest_finite) > 0):
            counts[n] = -1
            continue
        unit = size if size < np.inf else zero
        low = most * share * unit
        found = _exceeding_count(row, low)
        if found < k and low > zero:
            low = zero
            found = _exceeding_count(row, low)
        floor[:] = low
        _take(row, floor, 0, found, index, some)
        part = some[:found]
        cut, spare, _, apart = reach(part, part.view(kind.dtype), k, found, share * unit, pace * unit)
        if found > k and unit > zero:
            share, pace = cut / unit, apart / unit
        counts[n] = min(k, found)
        end = at + counts[n]
        if spare >= 0:
            _keep(part, index, cut, spare, at, end, latents, values)
            continue
        some[found : found + _LANES] = zero  # nothing of it exceeds, and so the search goes in whole steps
        floor[:found] = np.nextafter(cut, zero)
        _take(some[: (found + _LANES - 1) // _LANES * _LANES], floor, at, end, latents, values)
        for place in range(at, end):
            latents[place] = index[latents[place]]
