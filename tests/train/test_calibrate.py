"""The search for a value of given rank in a stream too long to keep."""

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thresher.train.calibrate import HeldOut, RankSearch, difference


def searched(blocks: Sequence[Tensor], k: float) -> tuple[float, int]:
    """What the search finds, and how often it wanted to see the blocks."""
    search = RankSearch(k)
    for shows in range(1, 4):
        for block in blocks:
            search.add(block)
        found = search.result()
        if found is not None:
            return found, shows
    raise AssertionError("the search needs more than three passes")


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
    rank = int(Fraction(str(k)) * rows * len(blocks))
    positive = torch.cat(blocks).flatten()
    positive = positive[positive > 0].sort(descending=True).values
    found, _ = searched(blocks, k)
    if rank == 0:
        assert found == float("inf")
    elif rank > positive.shape[0]:
        assert found == 0.0
    else:
        assert found == positive[rank - 1].item()


def test_blocks_of_one_distribution_are_read_once() -> None:
    assert searched(blocks_of(0, 4000, [1.0] * 10), 2.0)[1] == 1


def test_what_is_kept_does_not_grow_with_the_values() -> None:
    sizes = set()
    for count in (10, 4000):
        search = RankSearch(2.0)
        for block in blocks_of(0, count, [1.0, 1.0, 1.0]):
            search.add(block)
        sizes.add(sum(part.nbytes for part in vars(search).values() if isinstance(part, Tensor)))
    assert len(sizes) == 1
    assert sizes.pop() < 8 << 20


def sparse_block(rows: int, positives: int, seed: int) -> Tensor:
    """Exactly so many positive values, uniform over [0.5, 1.5), among 12 columns of negative ones."""
    rng = torch.Generator().manual_seed(seed)
    flat = -torch.ones(rows * 12)
    flat[torch.randperm(rows * 12, generator=rng)[:positives]] = 0.5 + torch.rand(positives, generator=rng)
    return flat.reshape(rows, 12)


def test_a_first_block_with_fewer_positive_values_than_wanted_costs_few_passes() -> None:
    blocks = [sparse_block(1000, 3990, 0), *(sparse_block(1000, 4050, seed) for seed in range(1, 5))]
    found, shows = searched(blocks, 4.0)
    assert found == torch.cat(blocks).flatten().sort(descending=True).values[20_000 - 1].item()
    assert shows <= 3


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.02, 1e3, 1e30])
def test_a_first_block_of_any_other_scale_costs_few_passes(scale: float) -> None:
    (first, *others) = blocks_of(3, 500, [1.0] * 5)
    blocks = [first * scale, *others]
    found, shows = searched(blocks, 2.0)
    assert found == torch.cat(blocks).flatten().sort(descending=True).values[5000 - 1].item()
    assert shows <= 3


def test_a_value_far_below_the_first_window_takes_three_passes() -> None:
    blocks = [torch.tensor([[8.0, -1.0]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[0.001, -1.0]])]
    assert searched(blocks, 1.0) == (torch.tensor(0.001).item(), 3)


@pytest.mark.parametrize(("k", "expected"), [(1.0, 3.0), (2.0, 2.0), (2.5, 2.0), (3.0, 2.0), (3.5, 1.0), (4.0, 0.0)])
def test_ties_count_as_often_as_they_occur(k: float, expected: float) -> None:
    """Two rows hold 3, 3, then four times 2, then one 1."""
    block = torch.tensor([[2.0, 3.0, 2.0, 0.0], [3.0, 2.0, 1.0, 2.0]])
    assert searched([block], k)[0] == expected


def test_neighbouring_floats_are_told_apart() -> None:
    one = torch.ones(())
    steps = [one]
    for _ in range(9):
        steps.append(torch.nextafter(steps[-1], 2 * one))
    block = torch.stack(steps).reshape(1, 10)
    assert [searched([block], k)[0] for k in (1.0, 5.0, 10.0)] == [steps[i].item() for i in (9, 5, 0)]


@pytest.mark.parametrize("value", [1e-45, 1e-38, 0.7, 1.0, 3e38])
def test_values_all_equal_are_their_own_threshold(value: float) -> None:
    block = torch.full((50, 12), value)
    for k in (0.5, 3.0, 12.0):
        assert searched([block, block], k) == (block[0, 0].item(), 1)


def test_with_fewer_positive_values_than_the_rank_everything_positive_fires() -> None:
    assert searched([sparse_block(100, 350, 0), sparse_block(100, 399, 1)], 4.0)[0] == 0.0
    assert searched([sparse_block(100, 450, 0), sparse_block(100, 349, 1)], 4.0)[0] == 0.0


def test_no_positive_value_means_that_everything_positive_fires() -> None:
    assert searched([-torch.rand(20, 12)], 1.0)[0] == 0.0


def test_a_frozen_rule_that_fires_more_than_training_did_is_named() -> None:
    check = HeldOut("validation", 100, [0.1, 0.1], [3.1, 30.0])
    assert difference(check, [3.0, 29.0]) is None
    said = difference(check, [3.0, 20.0])
    assert said is not None
    assert "30 where training ended at 20 (source 1)" in said
    assert "source 0" not in said
    assert difference(HeldOut("test", 9, [0.0], [0.0]), [0.05]) is None  # next to nothing is not much more than nothing
