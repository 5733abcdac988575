"""Sums of a few rows at a time have the bits of the plain loop."""

from typing import Any

import numpy as np
import pytest

from thresher.cache.kernels.jit import compiled
from thresher.cache.kernels.sums import COLUMNS, add_plain, add_rows, add_squares


@compiled()
def plainly(x, rows, cuts, sums):  # type: ignore[no-untyped-def]
    add_plain(x, rows, 0, rows.shape[0], sums, 0)


@compiled()
def together(x, rows, cuts, sums):  # type: ignore[no-untyped-def]
    for i in range(cuts.shape[0] - 1):
        add_rows(x, rows, cuts[i], cuts[i + 1], sums)


@compiled()
def squares(x, rows, cuts, sums):  # type: ignore[no-untyped-def]
    for i in range(cuts.shape[0] - 1):
        add_squares(x, rows[cuts[i] :], cuts[i + 1] - cuts[i], sums[1:])


def massive(kind: Any, width: int) -> np.ndarray:
    """40 rows of which every ninth is 2²⁰ times as large: as float32, or as bit patterns of bfloat16."""
    x = np.random.default_rng(width).normal(3.0, 1.0, (40, width)).astype(np.float32)
    x[::9] *= 2.0**20
    return x if kind == np.float32 else (x.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind", [np.float32, np.uint16])
@pytest.mark.parametrize("width", [1, 31, COLUMNS, 2 * COLUMNS, 3 * COLUMNS + 5])
def test_sums_are_those_of_rows_added_one_by_one_however_they_are_cut(kind: Any, width: int) -> None:
    x, rows = massive(kind, width), np.random.default_rng(1).permutation(40)[:29]
    value = x.astype(np.float64) if kind == np.float32 else (x.astype(np.uint32) << 16).view(np.float32).astype(float)
    want = np.ones((2, width))
    for row in rows:
        want += [value[row], value[row] ** 2]
    for cuts in ([0, 29], [0, 0, 1, 5, 5, 28, 29], list(range(30)), [*range(0, 29, 4), 29]):
        for add, first in ((plainly, 0), (together, 0), (squares, 1)):
            got = np.ones((2, width))
            add(x, rows, np.array(cuts), got)
            assert np.array_equal(got[first:], want[first:])
            assert first == 0 or (got[0] == 1).all()
