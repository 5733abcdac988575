"""Compiled loops over rows on several threads, as many as PyTorch's operators would use in the caller.

Rows are cut into pieces that do not depend on the number of threads; who does a piece does not matter to the bits,
since every row has one owner. Numba's own parallel loops are left out: their threading layers may not be entered from
two threads at once, which is what happens when several dictionaries step side by side.

The threads wait on a lock, not in a busy loop, so that they take no core from others between calls.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import torch

_PIECES = 32
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def over_rows(rows: int, piece: Callable[[int, int], object], cost: int) -> None:
    """Call piece(first, stop) so that all rows are covered; `cost` in multiply-adds decides whether threads pay."""
    threads = min(torch.get_num_threads(), 1 + cost // _WORTH_A_THREAD)
    if threads <= 1 or rows < 2:
        piece(0, rows)
        return
    pieces = min(rows, _PIECES)
    bounds = [rows * part // pieces for part in range(pieces + 1)]
    turns = count()

    def work() -> None:
        while (turn := next(turns)) < pieces:
            piece(bounds[turn], bounds[turn + 1])

    helpers: list[Future[None]] = [_executor().submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            helper.result()


_WORTH_A_THREAD = 1 << 20  # a tenth of a millisecond, several times what waking a thread takes


def _executor() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), "thresher-rows")
            os.register_at_fork(after_in_child=_forget)
        return _pool


def _forget() -> None:
    """A forked process has no threads; it makes its own."""
    global _pool
    _pool = None
