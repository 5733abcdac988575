"""How well batches are mixed: pairs of rows from one context that share a batch, against a perfect shuffle.

Rows of one context resemble one another, so a batch with many of them says less about the whole: its gradient's
variance grows by 1 + 2ρ · pairs / B, where ρ is the correlation of two rows of one context.
"""

from typing import NamedTuple

import numpy as np

from thresher.cache.order import ReadOrder


class Mixing(NamedTuple):
    """Same-context pairs in an average batch."""

    pairs: float
    """Counted."""
    ideal: float
    """Expected under a perfect shuffle of the same rows."""

    @property
    def excess(self) -> float:
        """Pairs beyond those of a perfect shuffle, as a ratio: 1 is perfect."""
        return self.pairs / self.ideal


def measured(order: ReadOrder, context_N: np.ndarray, batch_rows: int, batches: int, start: int = 0) -> Mixing:
    """Count the pairs in `batches` batches from position `start` on; `context_N` is the context of every stored row."""
    total = sum(_pairs(context_N[order.rows(start + i * batch_rows, batch_rows)]) for i in range(batches))
    n = len(context_N)
    ideal = _pairs(context_N) * batch_rows * (batch_rows - 1) / (n * (n - 1))
    return Mixing(total / batches, ideal)


def expected_pairs(
    rows: int, per_context: int, batch_rows: int, group_chunks: int, chunk_rows: int, shard_rows: int
) -> float:
    """Pairs in an average batch of an order, for `per_context` rows of each context, all of them in one shard.

    ½B(k − 1) · [(b − 1)/(S − 1) + (B − b)(S/C − 1)/((n − 1)(S − 1))] with b = B/G rows of each chunk: those of the same
    chunk, then those of other chunks of the same shard.
    """
    of_chunk, chunks = batch_rows / group_chunks, rows // chunk_rows
    same = (of_chunk - 1) / (shard_rows - 1)
    others = (batch_rows - of_chunk) * (shard_rows / chunk_rows - 1) / ((chunks - 1) * (shard_rows - 1))
    return 0.5 * batch_rows * (per_context - 1) * (same + others)


def _pairs(context: np.ndarray) -> float:
    """Pairs of rows with equal context."""
    counts = np.bincount(context).astype(np.float64)
    return float((counts * (counts - 1)).sum() / 2)
