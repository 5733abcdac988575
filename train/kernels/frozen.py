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

from thresher.cache.kernels.jit import compiled
from thresher.cache.kernels.lines import LINE_BYTES
from thresher.train.kernels.cpu_pool import over_rows
from thresher.train.kernels.silent import choose_columns
from thresher.train.kernels.sparse import Selection


def can_choose(a_NF: Tensor) -> bool:
    """Whether the loops know the block's device and format."""
    return a_NF.device.type == "cpu" and a_NF.dtype in (torch.float32, torch.float64)


def is_whole(a_NF: Tensor) -> bool:
    """Whether all of it are numbers, as far as their sum tells."""
    return not bool(a_NF.sum().isnan())


def above(a_NF: Tensor, floor_F: Tensor) -> Selection:
    """Entries above their latent's floor [F] (or one for all, []), by token and ascending."""
    tokens, width = a_NF.shape
    a, floor = a_NF.numpy(), floor_F.expand(width).contiguous().numpy()
    counts = np.zeros(tokens + 1, np.int64)
    over_rows(tokens, lambda first, stop: _count(a, floor, first, stop, counts), a.size)
    offsets = np.cumsum(counts)
    latents = np.empty(offsets[-1], np.int64)
    over_rows(tokens, lambda first, stop: _fill(a, floor, first, stop, offsets, latents), a.size)
    return Selection(torch.from_numpy(latents), torch.from_numpy(offsets), width)


def largest(a_NF: Tensor, k: int) -> Selection:
    """The positive ones among the k largest of every row of numbers; of equal ones at the edge the lower latents."""
    found = choose_columns(a_NF, torch.arange(a_NF.shape[1]), k)
    return found.selection


_intrinsic: Any = intrinsic  # the type checker does not know that the first argument is not given in calls
_WORD = ir.IntType(64)


@_intrinsic
def _exceeding(typing_context, row, floor, at):  # type: ignore[no-untyped-def]
    """A bit for each of a cache line's numbers from `at` on: whether it exceeds its floor, or is none."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        vectors = []
        for kind, value in zip(signature.args[:2], arguments[:2], strict=True):
            data = arrayobj.make_array(kind)(context, builder, value).data
            lanes = LINE_BYTES // (kind.dtype.bitwidth // 8)
            vector = ir.VectorType(context.get_data_type(kind.dtype), lanes)
            place = builder.bitcast(builder.gep(data, [arguments[2]]), vector.as_pointer())
            vectors.append(builder.load(place, align=kind.dtype.bitwidth // 8))
        bits = builder.bitcast(builder.fcmp_unordered(">", *vectors), ir.IntType(lanes))
        return builder.zext(bits, _WORD)

    return types.int64(row, floor, types.int64), generate


@_intrinsic
def _lowest(typing_context, bits):  # type: ignore[no-untyped-def]
    """Position of the lowest bit that is set; one is."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.int64), generate


@compiled()
def _count(a, floor, first, stop, counts):  # type: ignore[no-untyped-def]
    for n in range(first, stop):
        row, found = a[n], np.int32(0)
        for i in range(row.shape[0]):
            found = np.int32(found + np.int32(not row[i] <= floor[i]))
        counts[n + 1] = found


@compiled()
def _fill(a, floor, first, stop, offsets, latents):  # type: ignore[no-untyped-def]
    lanes = LINE_BYTES // a.itemsize
    for n in range(first, stop):
        row, at, end, i = a[n], offsets[n], offsets[n + 1], 0
        while i + lanes <= row.shape[0] and at < end:
            bits = _exceeding(row, floor, i)
            while bits != 0:
                latents[at] = i + _lowest(bits)
                bits &= bits - 1
                at += 1
            i += lanes
        while at < end:
            latents[at] = i
            at += not row[i] <= floor[i]
            i += 1
