"""Rows in whole cache lines: written past the cache, and fetched into it ahead of their use.

A plain store first fetches the line that it is about to overwrite. Where whole lines are written and not read again
soon, that is wasted: non-temporal stores go without, up to twice as fast. And a processor foresees the next line of a
row but not the next row at a random place, so that is asked for in good time.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from thresher.cache.kernels.jit import compiled

LINE_BYTES = 64

_intrinsic: Any = intrinsic  # the type checker does not know that the first argument is not given in calls


def inlined(**options: Any) -> Any:
    """As `compiled`, inside its callers: a call would count references to the row, and each count drains the stores."""
    return compiled(forceinline=True, **options)


@_intrinsic
def _stream_row(typing_context, out, at, row):  # type: ignore[no-untyped-def]
    """Write `row` to `out[at]`, both of whole cache lines and `out` aligned to them, past the cache.

    Such stores become visible to other threads at the latest with the next locked instruction, and handing a shard to
    another thread takes many of those.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target = arrayobj.make_array(signature.args[0])(context, builder, arguments[0])
        source = arrayobj.make_array(signature.args[2])(context, builder, arguments[2])
        row_bytes = cgutils.unpack_tuple(builder, target.strides, 2)[0]
        line = ir.VectorType(ir.IntType(32), LINE_BYTES // 4)
        place = cgutils.pointer_add(builder, target.data, builder.mul(row_bytes, arguments[1]))
        place, taken = (builder.bitcast(p, line.as_pointer()) for p in (place, source.data))
        with cgutils.for_range(builder, builder.udiv(row_bytes, ir.Constant(row_bytes.type, LINE_BYTES))) as loop:
            value = builder.load(builder.gep(taken, [loop.index]), align=2)
            store = builder.store(value, builder.gep(place, [loop.index]), align=LINE_BYTES)
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.none(out, types.int64, row), generate


def prefetch(builder: Any, start: ir.Value, size: int) -> None:
    """Emit instructions that fetch `size` bytes at an address, which need not be there."""
    pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    signature = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], signature)
    for offset in range(0, size, LINE_BYTES):
        address = cgutils.pointer_add(builder, start, offset, pointer)
        builder.call(fetch, [address, number(0), number(2), number(1)])  # to read, into the second cache, data


@_intrinsic
def announce(typing_context, out, at):  # type: ignore[no-untyped-def]
    """Fetch the line where row `at` of `out` begins: a store that has to look up its page holds up all those after."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target = arrayobj.make_array(signature.args[0])(context, builder, arguments[0])
        row_bytes = cgutils.unpack_tuple(builder, target.strides, 2)[0]
        prefetch(builder, cgutils.pointer_add(builder, target.data, builder.mul(row_bytes, arguments[1])), LINE_BYTES)
        return context.get_dummy_value()

    return types.none(out, types.int64), generate


@_intrinsic
def fetch(typing_context, address, size):  # type: ignore[no-untyped-def]
    """Fetch the lines of `size` bytes at an address."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        start = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        lines = builder.udiv(
            builder.add(arguments[1], ir.Constant(ir.IntType(64), LINE_BYTES - 1)),
            ir.Constant(ir.IntType(64), LINE_BYTES),
        )
        with cgutils.for_range(builder, lines) as loop:
            offset = builder.mul(loop.index, ir.Constant(ir.IntType(64), LINE_BYTES))
            prefetch(builder, cgutils.pointer_add(builder, start, offset), LINE_BYTES)
        return context.get_dummy_value()

    return types.none(types.uint64, types.int64), generate


@inlined()
def put(out, at, row, whole_lines):  # type: ignore[no-untyped-def]
    """out[at] = row."""
    if whole_lines:
        _stream_row(out, at, row)
    else:
        for j in range(row.shape[0]):
            out[at, j] = row[j]


def whole_lines(out: np.ndarray) -> bool:
    """Whether every row of `out` [S, D] consists of whole cache lines, so that it may be written past the cache."""
    return bool(out.strides[0] % LINE_BYTES == 0 and out.ctypes.data % LINE_BYTES == 0)
