"""Sums over rows at every column, in float64: Σx and Σx², a few rows at a time, one after the other.

Adding rows one by one loads and stores two float64 sums for every element of 2 or 4 bytes. Here the sums of 32 columns
stay in registers while some rows pass by. That walks across rows, which the processor does not foresee, so the rows
after them are fetched meanwhile. At each column the order of additions is that of the rows, and the square of a
float32 is exact in float64: the bits are those of the plain loop `add_plain`, however rows were cut into calls.

The vectors are written out, since LLVM does not vectorise a loop over so many rows: any two might overlap.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np import arrayobj

from thresher.cache.kernels.lines import inlined, prefetch

COLUMNS = 32
"""Sums in registers at a time: eight of AVX-512 for either power, so that no addition waits for the one before."""

_intrinsic: Any = intrinsic  # the type checker does not know that the first argument is not given in calls
_INDEX = ir.IntType(64)
_FLOATS, _DOUBLES = ir.VectorType(ir.FloatType(), COLUMNS), ir.VectorType(ir.DoubleType(), COLUMNS)


@_intrinsic
def bits_of(typing_context, value):  # type: ignore[no-untyped-def]
    """The 32 bits of a float32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@_intrinsic
def float_of(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 with these 32 bits."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def wide(value):  # type: ignore[no-untyped-def]
    """An element of x, a float32 or the bit pattern of a bfloat16, as float32."""
    raise NotImplementedError


@overload(wide, inline="always")
def _wide_of(value):  # type: ignore[no-untyped-def]
    if value == types.uint16:
        return lambda value: float_of(np.uint32(value) << np.uint32(16))
    return lambda value: value


@inlined(fastmath={"contract"})
def add_plain(x, rows, first, stop, sums, column):  # type: ignore[no-untyped-def]
    """Add x and x² of rows[first:stop] of x [R, D] to `sums` [2, D] from a column on: the specification."""
    for k in range(first, stop):
        for j in range(column, x.shape[1]):
            value = np.float64(wide(x[rows[k], j]))
            sums[0, j] += value
            sums[1, j] += value * value


@inlined()
def add_rows(x, rows, first, stop, sums):  # type: ignore[no-untyped-def]
    """`add_plain` at all columns; fetches as many rows after `stop`."""
    _add_columns(x, rows, first, stop, sums)
    add_plain(x, rows, first, stop, sums, x.shape[1] // COLUMNS * COLUMNS)


@inlined(fastmath={"contract"})
def add_squares(x, rows, stop, sums):  # type: ignore[no-untyped-def]
    """Add x² of rows[:stop] of x [R, D] to `sums` [1, D]."""
    _add_square_columns(x, rows, 0, stop, sums)
    for k in range(stop):
        for j in range(x.shape[1] // COLUMNS * COLUMNS, x.shape[1]):
            value = np.float64(wide(x[rows[k], j]))
            sums[0, j] += value * value


def _column_sums(powers: tuple[int, ...], *, ahead: bool) -> Any:
    """A function to add x to these powers, of rows[first:stop], to `sums` [len(powers), D], at whole vectors."""

    def add(typing_context, x, rows, first, stop, sums):  # type: ignore[no-untyped-def]
        assert x.layout == rows.layout == sums.layout == "C", "addresses are taken to follow from the shape"

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            x, rows, sums = (arrayobj.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 1, 4))
            width = cgutils.unpack_tuple(builder, x.shape, 2)[1]
            last = builder.sub(cgutils.unpack_tuple(builder, rows.shape, 1)[0], _INDEX(1))
            first, stop = arguments[2:4]
            fetched = COLUMNS * signature.args[0].dtype.bitwidth // 8

            def row_at(k: ir.Value, column: ir.Value) -> ir.Value:
                row = builder.load(builder.gep(rows.data, [k]))
                return builder.gep(x.data, [builder.add(builder.mul(row, width), column)])

            count = builder.sub(stop, first)
            vectors, passes = _vectors(builder, sums.data, width, len(powers)), cgutils.for_range(builder, count)
            with vectors as (column, totals), passes as passing:
                value = _widened(builder, row_at(builder.add(first, passing.index), column))
                for power, total in zip(powers, totals, strict=True):
                    _add(builder, total, value, power)
                if ahead:
                    k = builder.add(stop, passing.index)
                    k = builder.select(builder.icmp_signed("<", k, last), k, last)
                    prefetch(builder, row_at(k, column), fetched)
            return context.get_dummy_value()

        return types.none(x, rows, types.int64, types.int64, sums), generate

    return _intrinsic(add)


_add_columns, _add_square_columns = _column_sums((1, 2), ahead=True), _column_sums((2,), ahead=False)


@contextmanager
def _vectors(builder: Any, sums: ir.Value, width: ir.Value, count: int) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
    """A loop over vectors of columns: the first column, and places in registers for the sums, put back at the end."""
    with cgutils.for_range(builder, builder.udiv(width, _INDEX(COLUMNS))) as loop:
        column = builder.mul(loop.index, _INDEX(COLUMNS))
        starts = [builder.gep(sums, [builder.add(builder.mul(width, _INDEX(i)), column)]) for i in range(count)]
        places = [builder.bitcast(start, _DOUBLES.as_pointer()) for start in starts]
        totals = [cgutils.alloca_once_value(builder, builder.load(place, align=8)) for place in places]
        yield column, totals
        for place, total in zip(places, totals, strict=True):
            builder.store(builder.load(total), place, align=8)


def _widened(builder: Any, start: ir.Value) -> ir.Value:
    """A vector of float32, or of bit patterns of bfloat16, as float64."""
    stored = start.type.pointee
    value = builder.load(builder.bitcast(start, ir.VectorType(stored, COLUMNS).as_pointer()), align=2)
    if isinstance(stored, ir.IntType):
        bits = ir.VectorType(ir.IntType(32), COLUMNS)
        value = builder.bitcast(builder.shl(builder.zext(value, bits), ir.Constant(bits, [16] * COLUMNS)), _FLOATS)
    return builder.fpext(value, _DOUBLES)


def _add(builder: Any, total: ir.Value, value: ir.Value, power: int) -> None:
    """Add a vector, or its square; whether that is fused is the same to the bits."""
    fused = ("contract",)
    if power == 2:
        value = builder.fmul(value, value, flags=fused)
    builder.store(builder.fadd(builder.load(total), value, flags=fused), total)
