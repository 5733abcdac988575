"""Faults seen in other evaluators, put in on purpose: the plain loops of test_reference.py must notice each of them."""

import numpy as np
import pytest
import torch

from tests.evaluate.test_reference import INS, MEANS, OUTS, by_loops
from thresher.cache.layout import Contexts
from thresher.evaluate import masks, metrics, passes, rounds, run, splice, verdict
from thresher.evaluate.run import Replacement


def swapped_kl(monkeypatch, kit):
    """KL(patched ‖ clean)."""
    right = passes.score_tokens

    def score(logits_NV, target_N, clean):
        logq, logp = logits_NV.double().log_softmax(-1), clean.p.double().log()
        return right(logits_NV, target_N, clean)._replace(kl=metrics.kl_divergence(logq, logp))

    monkeypatch.setattr(passes, "score_tokens", score)


def unshifted_accuracy(monkeypatch, kit):
    """The prediction at a position compared with the token that stands there."""
    make, right, current = rounds.make_batch, passes.score_tokens, {}

    def batch(*arguments):
        made = make(*arguments)
        current["tokens"], current["at"] = made.token[made.score], 0
        return made

    def score(logits_NV, target_N, clean):  # runs of a batch come in order, for every arm anew
        at, tokens = current["at"], current["tokens"]
        here = tokens[at : at + len(logits_NV)]
        current["at"] = (at + len(here)) % len(tokens)
        return right(logits_NV, target_N, clean)._replace(correct=(logits_NV.argmax(-1) == here).double())

    monkeypatch.setattr(rounds, "make_batch", batch)
    monkeypatch.setattr(passes, "score_tokens", score)


def mean_of_ratios(monkeypatch, kit):
    """Every document weighs the same, however long."""
    right = verdict.unit_sums

    def per_unit(segment_sums, unit_of_segment):
        sums = right(segment_sums, unit_of_segment)
        return sums / sums[:, :1]

    monkeypatch.setattr(verdict, "unit_sums", per_unit)


def mask_of_targets(monkeypatch, kit):
    """S taken over the positions that are predicted."""
    right = masks.score_mask

    def shifted(contexts):
        out = np.roll(right(contexts), 1, axis=1) & masks.patch_mask(contexts)
        out[:, -1] = False
        return out

    monkeypatch.setattr(masks, "score_mask", shifted)


def dropped_encoder_bias(monkeypatch, kit):
    """An encoder written anew, without its bias."""
    monkeypatch.setattr(kit.Random, "pre", lambda self, source, x_ND: (x_ND.double() @ self.enc[source]).relu())


def special_positions_zeroed(monkeypatch, kit):
    """The zero arm alone also overwrites first and special positions."""
    right = splice.constant_edits

    def edits(values, patch_BT):
        everywhere = all(not bool(value.any()) for value in values.values())
        return right(values, torch.ones_like(patch_BT) if everywhere else patch_BT)

    monkeypatch.setattr(splice, "constant_edits", edits)


def stale_inputs(monkeypatch, kit):
    """Constants of the clean pass reported as cascade."""

    decode, last = splice.decode_all, {}

    def remember(dictionaries, codes):
        last.setdefault("yhats", decode(dictionaries, codes))  # those of P come before those of other positions
        return decode(dictionaries, codes)

    def edits(dictionaries, patch_BT, **_):
        return splice.constant_edits(last.pop("yhats"), patch_BT)

    monkeypatch.setattr(splice, "decode_all", remember)
    monkeypatch.setattr(splice, "cascade_edits", edits)


MUTATIONS = {
    swapped_kl: "kl",
    unshifted_accuracy: "acc_drop",
    mean_of_ratios: "ce",
    mask_of_targets: "ce",
    dropped_encoder_bias: "ce",
    special_positions_zeroed: "ce_zero",
    stale_inputs: "ce",
}


@pytest.fixture(scope="module")
def case(kit):
    """Text with special tokens in the middle of rows and documents of unequal length, and numbers by plain loops."""
    contexts = kit.contexts(rows=5, n_layers=2)
    keep = contexts.keep.copy()
    keep[1, 5] = keep[2, 8] = 2
    contexts = Contexts(contexts.token_id, contexts.document_id, keep)
    target, dictionary = kit.TinyTarget(n_layers=2), kit.Random(INS, OUTS, means=MEANS)
    return target, contexts, dictionary, by_loops(target, contexts, dictionary, "cascade")[1]


def unlike(case, scan):
    """Keys in which the evaluation and the loops differ."""
    target, contexts, dictionary, expected = case
    own = Replacement("r", (dictionary,), {})
    found = scan([own], target, contexts, protocols=("cascade",), batch_contexts=8).find("r", "cascade").metrics
    return {key for key, value in expected.items() if found[key] != pytest.approx(value, rel=1e-9, abs=1e-11)}


def test_without_a_fault_nothing_differs(case, scan):
    assert not unlike(case, scan)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_each_fault_shows(case, scan, kit, monkeypatch, mutate):
    monkeypatch.setattr(run, "check_causality", lambda *_: None)
    mutate(monkeypatch, kit)
    assert MUTATIONS[mutate] in unlike(case, scan)


def test_a_centred_residual_shows(kit, scan, monkeypatch):
    """A reconstruction that is off by a constant is off: forgetting the residual's mean would call it perfect."""

    class Shifted(kit.Identity):
        def decode(self, destination, codes):
            return super().decode(destination, codes) + 1.0

    site = "L02.mlp_out"
    target, contexts = kit.TinyTarget(), kit.contexts()

    def fvu():
        own = [Replacement("r", (Shifted([site], [site]),), {})]
        return scan(own, target, contexts, protocols=("cascade",)).find("r", "cascade").metrics["fvu"]

    honest = fvu()
    right = metrics.ReconstructionSums.add
    monkeypatch.setattr(
        metrics.ReconstructionSums, "add", lambda self, y, yhat: right(self, y, yhat + (y - yhat).mean(0))
    )
    assert fvu() == pytest.approx(0.0, abs=1e-12)
    assert honest > 0.1
