"""The search for a value of given rank in a stream too long to keep."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thresher.train.calibrate import RankSearch


def searched(blocks: Sequence[Tensor], k: float) -> tuple[float, int]:
    """What the search finds, and how often it wanted to see the blocks."""
    search = RankSearch(k)
    for shows in range(1, 60):
        for block in blocks:
            search.add(block)
        found = search.result()
        if found is not None:
            return found, shows
    raise AssertionError("the search does not end")


def blocks_of(seed: int, count: int, scales: Sequence[float]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 12, generator=rng) * scale for scale in scales]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, 30),
    st.floats(0.1, 5.0),
    st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5),
)
def test_the_value_is_exact_even_when_the_first_block_misleads(
    seed: int, rows: int, k: float, scales: list[float]
) -> None:
    blocks = blocks_of(seed, rows, scales)
    rank = int(k * rows * len(blocks))
    positive = torch.cat(blocks).flatten()
    positive = positive[positive > 0].sort(descending=True).values
    found, _ = searched(blocks, k)
    if rank == 0:
        assert found == float("inf")
    elif rank > positive.shape[0]:
        assert found == 0.0
    else:
        assert found == positive[rank - 1].item()


def test_blocks_of_one_distribution_are_read_once_and_little_is_kept() -> None:
    blocks = blocks_of(0, 4000, [1.0] * 10)
    search = RankSearch(2.0)
    for block in blocks:
        search.add(block)
    assert search.result() is not None
    assert sum(values.shape[0] for values in search.kept) < 0.2 * 2.0 * 40_000


def test_no_positive_value_means_that_everything_positive_fires() -> None:
    assert searched([-torch.rand(20, 12)], 1.0)[0] == pytest.approx(0.0)
