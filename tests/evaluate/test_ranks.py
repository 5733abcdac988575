"""An evaluation spread over ranks comes to the numbers of one process."""

import numpy as np
import pytest
from rich.console import Console

from tests.evaluate.test_store import numbers, same, sets
from tests.ranks import on_ranks
from thresher.cache.errors import UserError
from thresher.evaluate import rounds
from thresher.evaluate.results import to_json
from thresher.evaluate.run import EvaluateConfig, contribute, evaluate
from thresher.evaluate.store import Store

CONFIG = EvaluateConfig(tokens=0, batch_contexts=2, resamples=100, neurons=(2,), training_tokens=64)


def spread(kit, folder, *, seeds=(1, 2, 3), content=True, targets=None):
    """`evaluate` on rank 0 and `contribute` on the others, each with a model of its own."""
    contexts, training = kit.contexts(rows=6), kit.contexts(rows=6, seed=5)

    def work(roster):
        target, given = kit.TinyTarget(), sets(kit, *seeds, content=content)
        if targets is not None:
            targets[roster.world.rank] = target
        if not roster.world.speaks:
            return contribute(given, target, contexts, CONFIG, roster=roster, store=Store(folder), training=training)
        return evaluate(
            given, target, contexts, CONFIG, console=Console(quiet=True), provenance={}, training=training,
            store=Store(folder), roster=roster,
        )  # fmt: skip

    return work


@pytest.fixture
def alone(kit):
    return evaluate(
        sets(kit, 1, 2, 3), kit.TinyTarget(), kit.contexts(rows=6), CONFIG, console=Console(quiet=True), provenance={},
        training=kit.contexts(rows=6, seed=5),
    )  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_come_to_the_numbers_of_one_process(kit, alone, tmp_path, size):
    targets = {}
    first, *others = on_ranks(size, spread(kit, tmp_path, targets=targets))
    assert others == [None] * (size - 1)
    same(first, alone)
    assert to_json(first) == to_json(alone)
    passes = [targets[rank].passes for rank in range(size)]
    assert max(passes) < 2 * min(passes), passes


def test_what_was_measured_is_not_measured_again_on_any_rank(kit, alone, tmp_path):
    on_ranks(2, spread(kit, tmp_path))
    targets = {}
    first, _ = on_ranks(2, spread(kit, tmp_path, targets=targets))
    same(first, alone)
    tried = 2 * 4  # the check of causality: twice for the bare model and for each of three replacements
    assert [targets[rank].passes for rank in (0, 1)] == [tried, tried]


def test_sums_without_a_key_are_measured_by_rank_0(kit, alone, tmp_path):
    first, _ = on_ranks(2, spread(kit, tmp_path, content=False))
    assert numbers(first) == numbers(alone)
    assert all(np.array_equal(first.segments.arms[label], alone.segments.arms[label]) for label in alone.segments.arms)


def test_a_rank_that_fails_ends_the_evaluation_and_the_next_one_goes_on(kit, alone, tmp_path, monkeypatch):
    divided = rounds._share

    def full(ledgers, work, batches, roster):
        if roster.world.speaks:
            return divided(ledgers, work, batches, roster)
        raise UserError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "_share", full)
        first, second = on_ranks(2, spread(kit, tmp_path))
    assert isinstance(first, UserError)
    assert str(first).startswith("Rank 1 of 2 ended: out of memory.")
    assert str(second) == "out of memory"
    same(on_ranks(2, spread(kit, tmp_path))[0], alone)
