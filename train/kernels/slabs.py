"""Sums of weighted table rows where rows are wanted hundreds of times: AuxK's products, on a CPU.

They read a table of a few MB again and again, in no order. So the columns are taken in slabs, and a slab of the table
is copied together first: it then lies in the second-level cache, without gaps that would put many rows into the same
cache sets and each into a page of its own. A slab of a sum stays in vector registers while the rows pass by. (Where a
row is wanted a few times, as by the codes themselves, whole rows from memory are faster: kernels/cpu_bags.py.)

`plain_bags` and `plain_dots` say what is computed. Slabs and groups have one owner each and entries a fixed order: the
same bits for any number of threads.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj
from numpy.typing import NDArray

from thresher.cache.kernels.cpu_pool import over_rows
from thresher.cache.kernels.jit import compiled

_LINES = 8  # of 64 bytes in a slab's row: sums and a row to multiply with fit the 32 registers of AVX-512
_GROUPS = 4  # parts of the groups, so that threads find work when slabs are few
_WORD = ir.IntType(64)


def plain_bags(out: Any, table: Any, offsets: Any, index: Any, weights: Any) -> None:
    """out[group] += Σ weights · table[index] over the group's entries, offsets[group] to offsets[group + 1]."""
    for group in range(out.shape[0]):
        entries = slice(offsets[group], offsets[group + 1])
        out[group] += weights[entries] @ table[index[entries]]


def plain_dots(table: Any, w: Any, offsets: Any, index: Any) -> Any:
    """[A]: table[index] · w[group] of every entry."""
    groups = np.repeat(np.arange(w.shape[0]), np.diff(offsets))
    return (table[index] * w[groups]).sum(1)


def bags(out: NDArray[Any], table: NDArray[Any], offsets: NDArray[Any], index: NDArray[Any], weights: Any) -> None:
    """`plain_bags`; out [groups, D], table [rows, D], index [A] int64."""
    packed = _packed(table)

    def piece(slab: int, first: int, stop: int) -> None:
        _bags(slab, first, stop, packed[slab], out, offsets, index, weights)

    _over_slabs(packed, out.shape[0], index.shape[0], piece)


def bags_and_dots(
    out: NDArray[Any], table: NDArray[Any], w: NDArray[Any], offsets: NDArray[Any], index: NDArray[Any], weights: Any
) -> NDArray[Any]:
    """`plain_bags` and `plain_dots` in one pass over the table; w [groups, D]."""
    packed = _packed(table)
    parts = np.empty((packed.shape[0], index.shape[0]), table.dtype)

    def piece(slab: int, first: int, stop: int) -> None:
        _bags_and_dots(slab, first, stop, packed[slab], out, w, offsets, index, weights, parts[slab])

    _over_slabs(packed, out.shape[0], index.shape[0], piece)
    return parts.sum(0)


def _over_slabs(packed: NDArray[Any], groups: int, entries: int, piece: Callable[[int, int, int], None]) -> None:
    """Call piece(slab, first, stop) for every slab and part of the groups."""
    bounds = [groups * part // _GROUPS for part in range(_GROUPS + 1)]
    jobs = [(slab, part) for slab in range(packed.shape[0]) for part in range(_GROUPS)]

    def work(first: int, stop: int) -> None:
        for slab, part in jobs[first:stop]:
            piece(slab, bounds[part], bounds[part + 1])

    over_rows(len(jobs), work, entries * packed.shape[0] * _LINES * 16)


def _packed(table: NDArray[Any]) -> NDArray[Any]:
    """[slabs, rows · columns of a slab] from the start of a cache line, with zeros beyond the last column."""
    columns = _LINES * 64 // table.itemsize
    slabs, rows = -(-table.shape[1] // columns), table.shape[0]
    memory = np.empty((slabs * rows + 1) * columns, table.dtype)
    start = -memory.ctypes.data % 64 // table.itemsize
    packed = memory[start : start + slabs * rows * columns].reshape(slabs, rows, columns)

    def piece(first: int, stop: int) -> None:
        for slab in range(first, stop):
            _pack(table, slab * columns, packed[slab])

    over_rows(slabs, piece, table.size)
    return packed.reshape(slabs, -1)


@compiled()
def _pack(table, left, packed):  # type: ignore[no-untyped-def]
    width = min(packed.shape[1], table.shape[1] - left)
    for row in range(table.shape[0]):
        packed[row, :width] = table[row, left : left + width]
        packed[row, width:] = 0


def _tile(with_dots: bool) -> Any:
    def add(typing_context, total, packed, index, weights, first, stop):  # type: ignore[no-untyped-def]
        given = (total, packed, index, weights, types.int64, types.int64)
        return types.void(*given), _generate

    def add_and_dot(typing_context, total, packed, index, weights, first, stop, w, dots):  # type: ignore[no-untyped-def]
        given = (total, packed, index, weights, types.int64, types.int64, w, dots)
        return types.void(*given), _generate

    made: Any = intrinsic
    return made(add_and_dot if with_dots else add)


class _Vectors:
    """A flat array in generated code, as numbers and as vectors of a cache line."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: ir.Value) -> None:
        self.builder, self.bytes = builder, kind.dtype.bitwidth // 8
        self.data = arrayobj.make_array(kind)(context, builder, value).data
        self.lanes = 64 // self.bytes
        self.number = context.get_data_type(kind.dtype)
        self.kind = ir.VectorType(self.number, self.lanes)

    def place(self, at: ir.Value) -> ir.Value:
        """Pointer to a number."""
        return self.builder.gep(self.data, [at])

    def one(self, at: ir.Value) -> ir.Value:
        """A number."""
        return self.builder.load(self.place(at))

    def lines(self, at: ir.Value | int) -> list[ir.Value]:
        """Pointers to a slab's vectors."""
        start = self.builder.add(_WORD(0), _WORD(at)) if isinstance(at, int) else at
        steps = [self.builder.add(start, _WORD(line * self.lanes)) for line in range(_LINES)]
        return [self.builder.bitcast(self.place(step), self.kind.as_pointer()) for step in steps]

    def load(self, place: ir.Value) -> ir.Value:
        """A vector."""
        return self.builder.load(place, align=self.bytes)


def _generate(context: Any, builder: Any, signature: Any, arguments: Any) -> ir.Value:
    """total += Σ weights · packed[index] over entries first to stop; with two more arguments also
    dots[entry] = packed[index] · w."""
    arrays = [
        _Vectors(context, builder, kind, value) if isinstance(kind, types.Array) else value
        for kind, value in zip(signature.args, arguments, strict=True)
    ]
    total, packed, index, weights, first, stop = arrays[:6]
    ends = total.lines(0)
    sums = [cgutils.alloca_once_value(builder, total.load(place)) for place in ends]
    w_lines = [arrays[6].load(place) for place in arrays[6].lines(0)] if len(arrays) > 6 else []
    with cgutils.for_range(builder, builder.sub(stop, first)) as passing:
        entry = builder.add(first, passing.index)
        row = builder.mul(index.one(entry), _WORD(_LINES * packed.lanes))
        weight = _everywhere(builder, weights.one(entry), packed.kind)
        chains: list[ir.Value] = []
        for line, place in enumerate(packed.lines(row)):
            value = packed.load(place)
            builder.store(_fused(builder, value, weight, builder.load(sums[line])), sums[line])
            if w_lines:
                chains.append(_fused(builder, value, w_lines[line], chains.pop(0) if len(chains) == 2 else None))
        if w_lines:
            builder.store(_total(builder, builder.fadd(*chains)), arrays[7].place(entry))
    for place, line in zip(ends, sums, strict=True):
        builder.store(builder.load(line), place, align=total.bytes)
    return context.get_dummy_value()


def _fused(builder: Any, left: ir.Value, right: ir.Value, addend: ir.Value | None) -> ir.Value:
    product = builder.fmul(left, right, flags=("contract",))
    return product if addend is None else builder.fadd(product, addend, flags=("contract",))


def _everywhere(builder: Any, number: ir.Value, kind: ir.VectorType) -> ir.Value:
    """A number in all lanes."""
    empty, word = ir.Constant(kind, ir.Undefined), ir.IntType(32)
    first = builder.insert_element(empty, number, word(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(word, kind.count), [0] * kind.count))


def _total(builder: Any, value: ir.Value) -> ir.Value:
    """The sum of all lanes: halves are added until one is left."""
    word = ir.IntType(32)
    while (lanes := value.type.count) > 1:
        empty, half = ir.Constant(value.type, ir.Undefined), ir.VectorType(word, lanes // 2)
        low = builder.shuffle_vector(value, empty, ir.Constant(half, list(range(lanes // 2))))
        high = builder.shuffle_vector(value, empty, ir.Constant(half, list(range(lanes // 2, lanes))))
        value = builder.fadd(low, high)
    return builder.extract_element(value, word(0))


_add, _add_and_dot = _tile(False), _tile(True)


@compiled()
def _bags(slab, first, stop, packed, out, offsets, index, weights):  # type: ignore[no-untyped-def]
    total = np.empty(_LINES * 64 // packed.itemsize, packed.dtype)
    left = slab * total.shape[0]
    width = min(total.shape[0], out.shape[1] - left)
    for group in range(first, stop):
        total[:width] = out[group, left : left + width]
        total[width:] = 0
        _add(total, packed, index, weights, offsets[group], offsets[group + 1])
        out[group, left : left + width] = total[:width]


@compiled()
def _bags_and_dots(slab, first, stop, packed, out, w, offsets, index, weights, dots):  # type: ignore[no-untyped-def]
    total = np.empty(_LINES * 64 // packed.itemsize, packed.dtype)
    beside = np.zeros_like(total)
    left = slab * total.shape[0]
    width = min(total.shape[0], out.shape[1] - left)
    for group in range(first, stop):
        total[:width] = out[group, left : left + width]
        total[width:] = 0
        beside[:width] = w[group, left : left + width]
        _add_and_dot(total, packed, index, weights, offsets[group], offsets[group + 1], beside, dots)
        out[group, left : left + width] = total[:width]
