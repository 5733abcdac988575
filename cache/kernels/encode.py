"""Rows of activations into a shard on a CPU: one pass over each row while it lies in the core's first cache.

A row is read once. It is checked, encoded, written to its stored place, and added to the float64 sums that statistics
and quality follow from. PyTorch needs about ten passes over a block for the same, and each costs more than the
arithmetic. The specification is `codec.encode_plain` and `stats.of_rows`; the codes here are the same bit for bit.

Memory decides the speed, so rows go four at a time through each step. Stored places are random, and a plain store would
first fetch the line that it is about to overwrite: rows of whole cache lines are written past the cache instead
(non-temporal stores, twice as fast). A store to a page that has to be looked up holds up all after it: four rows are
stored one after the other, so that they wait together, and the places of the next are announced before. Sums are
loaded and stored once for four rows (`sums`), while the next rows are fetched.

Sums take the rows one by one in their order, in float64, where the square of a float32 is exact. So they do not depend
on how the rows were cut into calls, nor on whether multiplication and addition are fused, and massive rows do not
cancel the others. Only ‖x‖² of a row is summed in float32, in an order that the compiler chooses.

All kernels take activations x [R, D] as float32, or bfloat16 as bit patterns (uint16), the rows to take [K] int64 and
their stored places [K] int64, and give the index into these of the first row that cannot be stored, or -1.
"""

from typing import Any

import numpy as np
from numba.extending import intrinsic

from thresher.cache.kernels.jit import compiled
from thresher.cache.kernels.lines import announce, inlined, put
from thresher.cache.kernels.sums import add_rows, add_squares, bits_of, float_of, wide

_intrinsic: Any = intrinsic  # the type checker does not know that the first argument is not given in calls

TOGETHER = 4
"""Rows that pass through each step together: with more, they and their sums outgrow the core's first cache."""

_ROUND = np.float32(1.5 * 2**23)  # x + this − this is x rounded to an integer, half to even, for |x| < 2²²
_PER_LEVEL = np.float32(1 / 127)
_SMALLEST = np.float32(2.0**-14)
_SIGN, _INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


@inlined(fastmath={"reassoc", "nsz", "contract"})
def _squares(row):  # type: ignore[no-untyped-def]
    """Σx², not finite as soon as an element is not."""
    total = np.float32(0)
    for j in range(row.shape[0]):
        x = wide(row[j])
        total += x * x
    return total


@inlined()
def _measure(x, row, norms):  # type: ignore[no-untyped-def]
    """Add ‖x‖ and ‖x‖² of a row; false when it is not finite."""
    square = np.float64(_squares(x[row]))
    norms[0] += np.sqrt(square)
    norms[1] += square
    return np.isfinite(square)


@inlined()
def _announce(out, at, stop):  # type: ignore[no-untyped-def]
    """Say where the next rows will go, while there is time."""
    for i in range(stop, min(stop + TOGETHER, at.shape[0])):
        announce(out, at[i])


@compiled()
def measure(x, sums, norms):  # type: ignore[no-untyped-def]
    """Add all rows of x: Σx and Σx² [2, D] to `sums`, Σ‖x‖ and Σ‖x‖² [2] to `norms`."""
    rows = np.arange(x.shape[0])
    for k in range(0, rows.shape[0], TOGETHER):
        stop = min(k + TOGETHER, rows.shape[0])
        for i in range(k, stop):
            if not _measure(x, i, norms):
                return i
        add_rows(x, rows, k, stop, sums)
    return -1


@compiled()
def copy_bf16(x, rows, at, out, whole_lines, sums, norms):  # type: ignore[no-untyped-def]
    """Store bit patterns as they are: out [S, D] uint16, sums [3, D] of which the third stays as it is, norms [2]."""
    for k in range(0, rows.shape[0], TOGETHER):
        stop = min(k + TOGETHER, rows.shape[0])
        for i in range(k, stop):
            if not _measure(x, rows[i], norms):
                return i
        for i in range(k, stop):
            put(out, at[i], x[rows[i]], whole_lines)
        _announce(out, at, stop)
        add_rows(x, rows, k, stop, sums)
    return -1


@inlined()
def _round_bf16(row, codes, error):  # type: ignore[no-untyped-def]
    """Round to the nearest bfloat16, half to even; `error` is what that changed."""
    for j in range(row.shape[0]):
        bits = bits_of(row[j])
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        code = np.uint32(np.uint32(bits + half) >> np.uint32(16))
        codes[j] = code
        error[j] = row[j] - float_of(code << np.uint32(16))


@compiled()
def round_bf16(x, rows, at, out, whole_lines, sums, norms):  # type: ignore[no-untyped-def]
    """Store float32 rows rounded to bfloat16: out [S, D] uint16, sums [3, D] Σx, Σx², Σe², norms [2]."""
    codes, each = np.empty((TOGETHER, x.shape[1]), np.uint16), np.arange(TOGETHER)
    error = np.empty((TOGETHER, x.shape[1]), np.float32)
    for k in range(0, rows.shape[0], TOGETHER):
        stop = min(k + TOGETHER, rows.shape[0])
        for i in range(k, stop):
            if not _measure(x, rows[i], norms):
                return i
            _round_bf16(x[rows[i]], codes[i - k], error[i - k])
        for i in range(k, stop):
            put(out, at[i], codes[i - k], whole_lines)
        _announce(out, at, stop)
        add_rows(x, rows, k, stop, sums)
        add_squares(error, each, stop - k, sums[2:])
    return -1


@inlined()
def _standardise(row, mean, inverse, v):  # type: ignore[no-untyped-def]
    """v = (x − μ) · (1/σ); gives the bits of max |v|, which order as integers, NaN above infinity above all."""
    top = np.uint32(0)
    for j in range(row.shape[0]):
        z = (wide(row[j]) - mean[j]) * inverse[j]
        v[j] = z
        top = max(top, np.uint32(bits_of(z) & _SIGN))  # Numba widens what operators give to 64 bits
    return top


@inlined()
def _half_bits(value):  # type: ignore[no-untyped-def]
    """The bits of a float32 ≥ 2⁻¹⁴ rounded to float16, half to even; 0x7C00 and more when it is too large."""
    bits = bits_of(value)
    bits += np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return (bits >> np.uint32(13)) - np.uint32(112 << 10)


@inlined()
def _quantise(v, scale, codes, error):  # type: ignore[no-untyped-def]
    """Integers nearest to v / s, half to even, and what is lost of v.

    The clip of the specification is left out: s ≥ max|v| / 127 · (1 − 2⁻¹¹), so |v / s| < 127.07 rounds to at most 127.
    """
    per_scale = np.float32(1) / scale
    for j in range(v.shape[0]):
        q = (v[j] * per_scale + _ROUND) - _ROUND
        codes[j] = np.int8(np.int32(q))
        error[j] = v[j] - q * scale


@compiled()
def store_int8z(x, rows, at, mean, inverse, out, scales, whole_lines, sums, norms, peak):  # type: ignore[no-untyped-def]
    """Store rows as int8z: out [S, D] int8, scales [S] bits of float16 (uint16).

    `mean`, `inverse` [D] float32 are μ and 1/σ; sums [3, D] Σx, Σx² and Σe² of the error of v; `peak` [1] float32 is
    raised to the largest |v|.
    """
    v, codes = np.empty(x.shape[1], np.float32), np.empty((TOGETHER, x.shape[1]), np.int8)
    error, each = np.empty((TOGETHER, x.shape[1]), np.float32), np.arange(TOGETHER)
    for k in range(0, rows.shape[0], TOGETHER):
        stop = min(k + TOGETHER, rows.shape[0])
        for i in range(k, stop):
            finite = _measure(x, rows[i], norms)
            top = _standardise(x[rows[i]], mean, inverse, v)
            largest = float_of(min(top, _INFINITE))
            half = _half_bits(max(largest * _PER_LEVEL, _SMALLEST))
            if not finite or half >= np.uint32(0x7C00):
                return i
            scales[at[i]] = half
            peak[0] = max(peak[0], largest)
            _quantise(v, float_of((half + np.uint32(112 << 10)) << np.uint32(13)), codes[i - k], error[i - k])
        for i in range(k, stop):
            put(out, at[i], codes[i - k], whole_lines)
        _announce(out, at, stop)
        add_rows(x, rows, k, stop, sums)
        add_squares(error, each, stop - k, sums[2:])
    return -1


@compiled()
def scatter(rows, at, out, whole_lines):  # type: ignore[no-untyped-def]
    """out[at[k]] = rows[k]: encoded rows [K, D] to their stored places."""
    for k in range(rows.shape[0]):
        put(out, at[k], rows[k], whole_lines)
