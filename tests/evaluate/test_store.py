"""What was measured once is not measured again, and an interrupted evaluation ends where it would have ended."""

import os
import signal

import numpy as np
import pytest
import torch

from thresher.cache.interrupts import Interrupted
from thresher.cache.layout import Contexts
from thresher.evaluate.results import to_json
from thresher.evaluate.run import Replacement
from thresher.evaluate.store import Store

INS, OUTS = [f"L{i:02d}.mlp_in" for i in range(3)], [f"L{i:02d}.mlp_out" for i in range(3)]
TRIED = 2
"""Passes of the causality check for the bare model, and as many for each replacement."""


def sets(kit, *seeds, content=True):
    return [
        Replacement(f"r{seed}", (kit.Random(INS, OUTS, seed=seed),), {}, content=f"weights-{seed}" if content else None)
        for seed in seeds
    ]


def numbers(results):
    """Everything that was measured, without what a run of the program calls itself."""
    found = to_json(results)
    return {key: found[key] for key in ("rows", "pairs", "checks", "protocols", "masks")}


def same(a, b):
    assert numbers(a) == numbers(b)
    for label in a.segments.arms:
        assert np.array_equal(a.segments.arms[label], b.segments.arms[label])


def test_a_second_evaluation_runs_no_pass(kit, scan, tmp_path):
    target, contexts = kit.TinyTarget(), kit.contexts()
    first = scan(sets(kit, 1, 2), target, contexts, store=Store(tmp_path))
    target.passes = 0
    second = scan(sets(kit, 1, 2), target, contexts, store=Store(tmp_path))
    assert target.passes == TRIED * 3
    same(first, second)


def test_adding_a_run_evaluates_one_run(kit, scan, tmp_path):
    target, contexts = kit.TinyTarget(), kit.contexts(rows=4)
    settings = {"protocols": ("cascade",), "batch_contexts": 4}
    scan(sets(kit, 1, 2), target, contexts, store=Store(tmp_path), **settings)
    target.passes = 0
    grown = scan(sets(kit, 1, 2, 3), target, contexts, store=Store(tmp_path), **settings)
    assert target.passes == TRIED * 4 + 1 + 1  # the clean pass and the new cascade
    same(grown, scan(sets(kit, 1, 2, 3), kit.TinyTarget(), contexts, **settings))


@pytest.mark.parametrize("change", ["weights", "text", "target", "protocols", "damage"])
def test_what_changed_is_measured_again(kit, scan, tmp_path, change):
    target, contexts = kit.TinyTarget(), kit.contexts(rows=4)
    settings = {"protocols": ("cascade",), "batch_contexts": 4}
    scan(sets(kit, 1), target, contexts, store=Store(tmp_path), **settings)
    own = sets(kit, 1)
    if change == "weights":
        own = [own[0]._replace(content="others", dictionaries=(kit.Random(INS, OUTS, seed=5),))]
    elif change == "text":
        token_id = contexts.token_id.copy()
        token_id[0, 3] += 1
        contexts = Contexts(token_id, contexts.document_id, contexts.keep)
    elif change == "target":
        target.down[1] = target.down[1] * 1.5
        target.name = "another"  # of the identity
    elif change == "protocols":
        settings["protocols"] = ("cascade", "clean_input")
    else:
        for path in tmp_path.glob("*.npz"):
            path.write_bytes(path.read_bytes()[:-40])
    same(
        scan(own, target, contexts, store=Store(tmp_path), **settings),
        scan(own, target, contexts, **settings),
    )


def test_sums_without_a_content_hash_are_not_kept(kit, scan, tmp_path):
    target, contexts = kit.TinyTarget(), kit.contexts(rows=4)
    scan(sets(kit, 1, content=False), target, contexts, store=Store(tmp_path))
    target.passes = 0
    scan(sets(kit, 1, content=False), target, contexts, store=Store(tmp_path))
    assert target.passes > TRIED * 2


class Stopping:
    """Sends a signal to this process at a given pass."""

    def __init__(self, target, at, number):
        self.target, self.at, self.number = target, at, number

    def __getattr__(self, name):
        return getattr(self.target, name)

    def logits(self, tokens, edits=None):
        if self.target.passes == self.at:
            os.kill(os.getpid(), self.number)
        return self.target.logits(tokens, edits)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_an_interrupted_evaluation_resumes_to_the_same_bits(kit, scan, tmp_path, number, share):
    contexts = kit.contexts(rows=10)
    whole = kit.TinyTarget()
    expected = scan(sets(kit, 1, 2), whole, contexts)
    stopped = kit.TinyTarget()
    with pytest.raises(Interrupted, match="goes on from there"):
        scan(sets(kit, 1, 2), Stopping(stopped, int(share * whole.passes), number), contexts, store=Store(tmp_path))
    resumed = kit.TinyTarget()
    same(scan(sets(kit, 1, 2), resumed, contexts, store=Store(tmp_path)), expected)
    assert stopped.passes + resumed.passes == whole.passes + TRIED * 3
    assert not list(tmp_path.glob("*.part.npz"))


def test_a_run_added_after_an_interruption_starts_from_the_first_batch(kit, scan, tmp_path):
    contexts = kit.contexts(rows=10)
    with pytest.raises(Interrupted):
        scan(sets(kit, 1), Stopping(kit.TinyTarget(), 20, signal.SIGINT), contexts, store=Store(tmp_path))
    same(
        scan(sets(kit, 1, 2), kit.TinyTarget(), contexts, store=Store(tmp_path)),
        scan(sets(kit, 1, 2), kit.TinyTarget(), contexts),
    )


def test_other_batches_do_not_go_on_from_half_done_ones(kit, scan, tmp_path):
    contexts = kit.contexts(rows=10)
    with pytest.raises(Interrupted):
        scan(sets(kit, 1), Stopping(kit.TinyTarget(), 20, signal.SIGINT), contexts, store=Store(tmp_path))
    settings = {"batch_contexts": 3}
    same(
        scan(sets(kit, 1), kit.TinyTarget(), contexts, store=Store(tmp_path), **settings),
        scan(sets(kit, 1), kit.TinyTarget(), contexts, **settings),
    )


def test_a_tensor_comes_back_as_it_was(tmp_path):
    from thresher.evaluate.ledger import Ledger
    from thresher.evaluate.metrics import ReconstructionSums, TargetSums

    ledger = Ledger("a", "key", 3)
    y = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    ledger.truth["site|x", "patched"] = TargetSums()
    ledger.truth["site|x", "patched"].add(y)
    ledger.reconstruction["site|x", "first"] = ReconstructionSums()
    ledger.reconstruction["site|x", "first"].add(y, 0.9 * y)
    ledger.count("total_l0", torch.arange(5))
    Store(tmp_path).put(ledger, 2, whole=False)
    other = Ledger("a", "key")
    Store(tmp_path).take_up(other, 2, 9, torch.device("cpu"))
    assert other.done == 3
    for name, value in ledger.arrays().items():
        assert np.array_equal(other.arrays()[name], value)
