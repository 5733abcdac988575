"""Sums of weighted table rows, a few columns at a time, in vector registers.

A processor adds rows as fast as it can fetch them, unless the sum itself passes through the cache with every row. So
columns are taken in tiles: a tile of the sum stays in registers while the rows pass by, and the tile of a row some
entries ahead is fetched meanwhile, since the rows come in no order that the processor could foresee.

Slabs of columns that stay in the second-level cache for all entries, so that a table row is read from memory once, were
measured and lose: rows are then read in short pieces far apart, and the third-level cache serves whole rows as fast.

Matrices are flat here, with the distance of their rows beside them. At each column additions follow the order of the
entries; a dot adds lane by lane and then the lanes in a fixed order: the same bits, however rows are divided among
threads. The plain forms of both loops are `bags_plain` and `dots_plain`.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from thresher.cache.kernels.jit import compiled
from thresher.cache.kernels.lines import LINE_BYTES, prefetch

LINES = 8
"""Cache lines in a wide tile: sums, a row to multiply with and addends fit the 32 registers of AVX-512."""

ADD, REPLACE, STREAM = 0, 1, 2
"""What to do with the numbers that are there: keep, drop, and drop without fetching them (`out` in cache lines)."""


class Start(NamedTuple):
    """What sums begin with where the numbers that are there are dropped."""

    place: np.ndarray
    """[groups] int32: the row that a group's sum begins with, -1 for 0; empty: all begin with 0."""
    values: np.ndarray
    """The rows, flat: numbers, or bit patterns of bfloat16 (uint16)."""
    factor: Any
    """A sum begins with this times its row."""


_AHEAD = 8  # entries
_FUSED = ("contract",)
_INDEX = ir.IntType(64)
_intrinsic: Any = intrinsic  # the type checker does not know that the first argument is not given in calls


class _Flat:
    """A flat array in generated code."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: ir.Value) -> None:
        array = arrayobj.make_array(kind)(context, builder, value)
        (self.size,) = cgutils.unpack_tuple(builder, array.shape, 1)
        self.builder, self.data = builder, array.data
        self.bytes = kind.dtype.bitwidth // 8
        self.vector = ir.VectorType(array.data.type.pointee, LINE_BYTES // self.bytes)

    def at(self, position: ir.Value, line: int = 0) -> ir.Value:
        """Pointer to a number, or to one some lines further on."""
        return self.builder.gep(self.data, [self.builder.add(position, _INDEX(line * self.vector.count))])

    def one(self, position: ir.Value) -> ir.Value:
        """A number."""
        return self.builder.load(self.at(position))

    def line(self, position: ir.Value, line: int) -> ir.Value:
        """A vector."""
        place = self.builder.bitcast(self.at(position, line), self.vector.as_pointer())
        return self.builder.load(place, align=self.bytes)

    def put(self, value: ir.Value, position: ir.Value, line: int, past_the_cache: bool) -> None:
        """Store a vector; past the cache if it is a whole cache line."""
        place = self.builder.bitcast(self.at(position, line), self.vector.as_pointer())
        store = self.builder.store(value, place, align=LINE_BYTES if past_the_cache else self.bytes)
        if past_the_cache:
            store.set_metadata("nontemporal", self.builder.module.add_metadata([ir.IntType(32)(1)]))


class _Tile(NamedTuple):
    """Which of the functions to make."""

    lines: int
    past_the_cache: bool
    dots: bool


def _bag(tile: _Tile) -> Any:
    one, places = types.int64, (types.int64, types.int64)

    def bag(  # type: ignore[no-untyped-def]
        typing_context, out, at, begun, begun_at, table, stride, column, index, weights, first, stop
    ):
        signature = types.float64(out, one, begun, one, table, *places, index, weights, *places)
        return signature, lambda *given: _generate(tile, *given)

    def bag_dots(  # type: ignore[no-untyped-def]
        typing_context, out, at, begun, begun_at, table, stride, column, index, weights, first, stop,
        w, w_at, dots, norms, group,
    ):  # fmt: skip
        entries = (table, *places, index, weights, *places)
        signature = types.float64(out, one, begun, one, *entries, w, one, dots, norms, one)
        return signature, lambda *given: _generate(tile, *given)

    return _intrinsic(bag_dots if tile.dots else bag)


def _generate(tile: _Tile, context: Any, builder: Any, signature: Any, arguments: Any) -> ir.Value:
    given = [
        _Flat(context, builder, kind, value) if isinstance(kind, types.Array) else value
        for kind, value in zip(signature.args, arguments, strict=True)
    ]
    out, at, begun, begun_at, table, stride, column, index, weights, first, stop, *beside = given
    sums = [cgutils.alloca_once_value(builder, begun.line(begun_at, line)) for line in range(tile.lines)]
    w_lines = [beside[0].line(beside[1], line) for line in range(tile.lines)] if tile.dots else []
    last = builder.sub(index.size, _INDEX(1))

    def row(entry: ir.Value) -> ir.Value:
        return builder.add(builder.mul(index.one(entry), stride), column)

    with cgutils.for_range(builder, builder.sub(stop, first)) as passing:
        entry = builder.add(first, passing.index)
        ahead = builder.add(entry, _INDEX(_AHEAD))
        ahead = builder.select(builder.icmp_signed("<", ahead, last), ahead, last)
        prefetch(builder, table.at(row(ahead)), tile.lines * LINE_BYTES)
        start, weight = row(entry), _everywhere(builder, weights.one(entry), out.vector)
        products: list[ir.Value] = []
        for line in range(tile.lines):
            value = table.line(start, line)
            builder.store(_fused(builder, value, weight, builder.load(sums[line])), sums[line])
            if tile.dots:
                chain = products.pop(0) if len(products) == 2 else None
                products.append(_fused(builder, value, w_lines[line], chain))
        if tile.dots:
            place = beside[2].at(entry)
            builder.store(builder.fadd(builder.load(place), _total(builder, products)), place)
    totals = [builder.load(place) for place in sums]
    for line, total in enumerate(totals):
        out.put(total, at, line, tile.past_the_cache)
    if tile.dots:
        place = beside[3].at(beside[4])
        builder.store(builder.fadd(builder.load(place), _squares(builder, w_lines)), place)
    return _squares(builder, totals)


def _squares(builder: Any, vectors: list[ir.Value]) -> ir.Value:
    """Σ of the squares of all lanes, a float64."""
    total: ir.Value | None = None
    for value in vectors:
        total = _fused(builder, value, value, total)
    result = _total(builder, [total])
    return result if isinstance(result.type, ir.DoubleType) else builder.fpext(result, ir.DoubleType())


def _fused(builder: Any, left: ir.Value, right: ir.Value, addend: ir.Value | None) -> ir.Value:
    product = builder.fmul(left, right, flags=_FUSED)
    return product if addend is None else builder.fadd(product, addend, flags=_FUSED)


def _everywhere(builder: Any, number: ir.Value, vector: ir.VectorType) -> ir.Value:
    """A number in all lanes."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, undefined, lanes)


def _total(builder: Any, vectors: list[ir.Value]) -> ir.Value:
    """The sum of all lanes: halves are added until one is left."""
    value = vectors[0]
    for other in vectors[1:]:
        value = builder.fadd(value, other)
    while (lanes := value.type.count) > 1:
        undefined = ir.Constant(value.type, ir.Undefined)
        mask = ir.VectorType(ir.IntType(32), lanes // 2)
        low = builder.shuffle_vector(value, undefined, ir.Constant(mask, list(range(lanes // 2))))
        high = builder.shuffle_vector(value, undefined, ir.Constant(mask, list(range(lanes // 2, lanes))))
        value = builder.fadd(low, high)
    return builder.extract_element(value, ir.IntType(32)(0))


@_intrinsic
def _begin(typing_context, values, at, factor, row):  # type: ignore[no-untyped-def]
    """row = factor · values from `at` on: a function that is called would count references, as in cache/kernels/lines.

    Numbers, or bit patterns of bfloat16.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kinds = signature.args
        values, row = (_Flat(context, builder, kinds[i], arguments[i]) for i in (0, 3))
        with cgutils.for_range(builder, row.size) as loop:
            value = values.one(builder.add(arguments[1], loop.index))
            if isinstance(value.type, ir.IntType):
                bits = ir.IntType(32)
                value = builder.bitcast(builder.shl(builder.zext(value, bits), bits(16)), ir.FloatType())
            builder.store(builder.fmul(arguments[2], value), row.at(loop.index))
        return context.get_dummy_value()

    return types.none(values, types.int64, factor, row), generate


_wide, _wide_stream, _line = (_bag(_Tile(*tile, False)) for tile in ((LINES, False), (LINES, True), (1, False)))
_dots, _dots_stream, _dots_line = (_bag(_Tile(*tile, True)) for tile in ((LINES, False), (LINES, True), (1, False)))


@compiled(forceinline=True)
def bags_plain(  # type: ignore[no-untyped-def]
    group, left, right, out, out_stride, begun, begun_at, table, stride, offsets, index, weights
):
    """Columns left to right of out[group] = `begun` + Σ weights · table[index] over its entries; `begun` may be `out`.

    Returns Σ of the squares of what was written.
    """
    squares = 0.0
    for j in range(left, right):
        total = begun[begun_at + j]
        for entry in range(offsets[group], offsets[group + 1]):
            total += weights[entry] * table[index[entry] * stride + j]
        out[group * out_stride + j] = total
        squares += np.float64(total) * np.float64(total)
    return squares


@compiled(forceinline=True)
def dots_plain(group, left, right, table, stride, offsets, index, w, w_stride, dots, norms):  # type: ignore[no-untyped-def]
    """dots[entry] += table[index] · w[group] over columns left to right; norms[group] += ‖w[group]‖² there."""
    for j in range(left, right):
        value = w[group * w_stride + j]
        norms[group] += np.float64(value) * np.float64(value)
        for entry in range(offsets[group], offsets[group + 1]):
            dots[entry] += table[index[entry] * stride + j] * value


@compiled(forceinline=True, fastmath={"contract", "reassoc", "nsz"})
def _along(row, w, at):  # type: ignore[no-untyped-def]
    """row · w, in float64."""
    total = 0.0
    for j in range(row.shape[0]):
        total += np.float64(row[j]) * np.float64(w[at + j])
    return total


@compiled()
def bags(first, stop, width, out, out_at, table, stride, offsets, index, weights, how, start, squares, sums):  # type: ignore[no-untyped-def]
    """`bags_plain` for groups first to stop at all columns; `start` is a `Start`.

    What it returns is added to `squares`, and the sum of each group's weights goes to `sums`, unless those are empty.
    """
    line, row, clean = LINE_BYTES // table.itemsize, np.zeros(width, out.dtype), True
    place, values, factor = start
    for group in range(first, stop):
        at, low, high, j, total = group * out_at, offsets[group], offsets[group + 1], 0, 0.0
        begun = place[group] if place.shape[0] else -1
        if begun >= 0:
            _begin(values, begun * width, factor, row)
            clean = False
        elif not clean:
            for i in range(width):
                row[i] = 0
            clean = True
        while j + LINES * line <= width:
            if how == STREAM:
                total += _wide_stream(out, at + j, row, j, table, stride, j, index, weights, low, high)
            elif how == REPLACE:
                total += _wide(out, at + j, row, j, table, stride, j, index, weights, low, high)
            else:
                total += _wide(out, at + j, out, at + j, table, stride, j, index, weights, low, high)
            j += LINES * line
        while j + line <= width:
            if how == ADD:
                total += _line(out, at + j, out, at + j, table, stride, j, index, weights, low, high)
            else:
                total += _line(out, at + j, row, j, table, stride, j, index, weights, low, high)
            j += line
        if how == ADD:
            total += bags_plain(group, j, width, out, out_at, out, at, table, stride, offsets, index, weights)
        else:
            total += bags_plain(group, j, width, out, out_at, row, 0, table, stride, offsets, index, weights)
        if squares.shape[0]:
            squares[group] += total
        if sums.shape[0]:
            sums[group] = weights[low:high].sum()


@compiled()
def bags_and_dots(  # type: ignore[no-untyped-def]
    first, stop, width, out, out_at, table, stride, w, w_at, offsets, index, weights, how, start, squares, dots, norms,
    along,
):  # fmt: skip
    """`bags`, and `dots_plain` in the same pass over the table; along[group] = out[group] · w[group] of this pass."""
    line, row, clean = LINE_BYTES // table.itemsize, np.zeros(width, out.dtype), True
    place, values, factor = start
    for group in range(first, stop):
        at, high, low, j, total = group * out_at, offsets[group + 1], offsets[group], 0, 0.0
        begun = place[group] if place.shape[0] else -1
        if begun >= 0:
            _begin(values, begun * width, factor, row)
            clean = False
        elif not clean:
            for i in range(width):
                row[i] = 0
            clean = True
        while j + LINES * line <= width:
            o, p = at + j, group * w_at + j
            if how == STREAM:
                total += _dots_stream(
                    out, o, row, j, table, stride, j, index, weights, low, high, w, p, dots, norms, group
                )
            elif how == REPLACE:
                total += _dots(out, o, row, j, table, stride, j, index, weights, low, high, w, p, dots, norms, group)
            else:
                total += _dots(out, o, out, o, table, stride, j, index, weights, low, high, w, p, dots, norms, group)
            j += LINES * line
        while j + line <= width:
            o, p = at + j, group * w_at + j
            if how == ADD:
                total += _dots_line(
                    out, o, out, o, table, stride, j, index, weights, low, high, w, p, dots, norms, group
                )
            else:
                total += _dots_line(
                    out, o, row, j, table, stride, j, index, weights, low, high, w, p, dots, norms, group
                )
            j += line
        dots_plain(group, j, width, table, stride, offsets, index, w, w_at, dots, norms)
        if how == ADD:
            total += bags_plain(group, j, width, out, out_at, out, at, table, stride, offsets, index, weights)
        else:
            total += bags_plain(group, j, width, out, out_at, row, 0, table, stride, offsets, index, weights)
        squares[group] += total
        if not clean:
            along[group] += _along(row, w, group * w_at)
        for entry in range(low, high):  # the row's product with w is that of its terms
            along[group] += np.float64(weights[entry]) * np.float64(dots[entry])
