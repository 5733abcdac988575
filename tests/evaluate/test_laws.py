"""Laws that hold whatever the weights: perfect, zero and mean dictionaries, order and cut of the text, causality."""

import numpy as np
import pytest
import torch

from thresher.cache.layout import Contexts
from thresher.evaluate.arms import zero_label
from thresher.evaluate.metrics import clean_scores, score_tokens
from thresher.evaluate.run import Replacement
from thresher.evaluate.splice import (
    PROTOCOLS,
    cascade_edits,
    constant_edits,
    decode_all,
    encode_clean,
    recording_edits,
    settled,
)

INS = ("L00.mlp_in", "L01.mlp_in", "L02.mlp_in")
OUTS = ("L00.mlp_out", "L01.mlp_out", "L02.mlp_out")


def one(name, *dictionaries, **facts):
    return Replacement(name, dictionaries, facts)


def numbers(results, name, protocol):
    return {key: value for key, value in results.find(name, protocol).metrics.items() if value is not None}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_identity_dictionary_changes_nothing_in_float64(kit, scan, protocol):
    sets = [
        one("outs", *[kit.Identity([s], [s]) for s in OUTS]),
        one("stream", *[kit.Identity([f"L{i:02d}.resid_post"], [f"L{i:02d}.resid_post"]) for i in range(3)]),
    ]
    results = scan(sets, kit.TinyTarget(), kit.contexts(), protocols=(protocol,))
    for name in ("outs", "stream"):
        found = results.find(name, protocol).metrics
        assert (found["delta"], found["kl"], found["agree"], found["fvu"]) == (0, 0, 1, 0)
        assert found["recovered_zero"] == found["recovered_mean"] == 1
        assert (found["acc_drop"], found["ppl_ratio"]) == (0, 1)
    assert all(check["passed"] and check["delta"] == check["kl"] == 0 for check in results.checks)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_identity_dictionary_changes_less_than_a_millionth_in_float32(kit, scan, protocol):
    target = kit.TinyTarget(dtype=torch.float32)
    results = scan([one("a", *[kit.Identity([s], [s]) for s in OUTS])], target, kit.contexts(), protocols=(protocol,))
    found = results.find("a", protocol).metrics
    assert max(abs(found["delta"]), abs(found["kl"])) <= 1e-6


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_exact_transcoders_and_exact_clt_equal_clean(kit, scan, protocol):
    target = kit.TinyTarget()
    sets = [one("plt", *[kit.Exact(target, [i]) for i in range(3)]), one("clt", kit.Exact(target, range(3)))]
    results = scan(sets, target, kit.contexts(), protocols=(protocol,))
    for name in ("plt", "clt"):
        found = results.find(name, protocol).metrics
        assert max(abs(found["delta"]), abs(found["kl"]), found["fvu"]) < 1e-12


def test_adding_the_errors_back_equals_clean(kit, scan):
    target = kit.TinyTarget()
    sets = [
        one("sae", *[kit.Random([s], [s], seed=i) for i, s in enumerate(OUTS)]),
        one("clt", kit.Random(INS, OUTS, seed=5)),
    ]
    results = scan(sets, target, kit.contexts(), protocols=("cascade",), arms=("error_added",))
    assert results.find("clt", "cascade").metrics["kl"] > 0.01
    assert [check["name"] for check in results.checks] == ["error_added: sae", "error_added: clt"]
    for check in results.checks:
        assert max(abs(check["delta"]), abs(check["kl"])) < 1e-12
        assert check["agree"] == 1


def test_zero_dictionary_recovers_nothing_against_zero_and_mean_dictionary_against_mean(kit, scan):
    means = {site: torch.randn(8, generator=torch.Generator().manual_seed(i)) for i, site in enumerate(OUTS)}
    sets = [
        one("zero", *[kit.Constant(s, torch.zeros(8), means={s: means[s]}) for s in OUTS]),
        one("mean", *[kit.Constant(s, means[s], means={s: means[s]}) for s in OUTS]),
    ]
    results = scan(sets, kit.TinyTarget(), kit.contexts())
    for protocol in PROTOCOLS:
        assert results.find("zero", protocol).metrics["delta"] > 0.1
        for name in ("zero", "mean"):
            found = [row for row in results.rows if row.name == name and row.protocol == protocol]
            assert {row.kind for row in found} == {"replacement", "baseline"}
            assert len({row.metrics["delta"] for row in found}) == 1
        assert numbers(results, "zero", protocol)["recovered_zero"] == 0
    for row in results.rows:
        if row.name == "mean" and row.metrics["recovered_mean"] is not None:
            assert row.metrics["recovered_mean"] == 0


def test_constants_coincide_under_cascade_and_clean_input(kit, scan):
    sets = [one("c", *[kit.Constant(s, torch.full((8,), 0.3)) for s in OUTS])]
    results = scan(sets, kit.TinyTarget(), kit.contexts())
    cascade, clean_input = (results.find("c", p).metrics["delta"] for p in ("cascade", "clean_input"))
    assert cascade == clean_input


def test_slice_mean_predictor_has_fvu_one(kit, scan):
    target, contexts = kit.TinyTarget(), kit.contexts()
    acts = target.record(torch.from_numpy(contexts.token_id).long(), target.sites([OUTS[1]]))[OUTS[1]]
    mean = acts[torch.from_numpy(contexts.keep == 1)].mean(0)
    results = scan([one("mean", kit.Constant(OUTS[1], mean))], target, contexts, protocols=("cascade",))
    assert results.find("mean", "cascade").metrics["fvu"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "far"])
def test_protocols_agree_on_a_single_site(kit, scan, kind):
    reads = {"sae": OUTS[1], "transcoder": INS[1], "far": "L00.resid_pre"}[kind]
    results = scan([one("x", kit.Random([reads], [OUTS[1]]))], kit.TinyTarget(), kit.contexts())
    first, *others = (numbers(results, "x", protocol) for protocol in PROTOCOLS)
    for other in others:
        assert other == pytest.approx({key: first[key] for key in other}, abs=1e-12)


def test_single_site_does_not_lean_on_clean_input(kit, scan):
    sets = [one("x", kit.Random([INS[1]], [OUTS[1]]))]
    both = scan(sets, kit.TinyTarget(), kit.contexts())
    alone = scan(sets, kit.TinyTarget(), kit.contexts(), protocols=("single_site",))
    assert numbers(alone, "x", "single_site") == pytest.approx(numbers(both, "x", "single_site"), abs=1e-13)


def test_cascade_equals_clean_input_when_only_the_last_site_errs(kit, scan):
    target = kit.TinyTarget()
    parts = [kit.Exact(target, [0]), kit.Exact(target, [1]), kit.Random([INS[2]], [OUTS[2]])]
    results = scan([one("x", *parts)], target, kit.contexts())
    cascade, clean_input = (numbers(results, "x", p) for p in ("cascade", "clean_input"))
    assert clean_input["delta"] == pytest.approx(cascade["delta"], abs=1e-12)
    assert abs(cascade["delta"]) > 1e-3


def test_batch_split_changes_nothing(kit, scan):
    target, contexts = kit.TinyTarget(), kit.contexts(rows=7)
    sets = [one("clt", kit.Random(INS, OUTS)), one("sae", *[kit.Random([s], [s]) for s in OUTS])]
    first, *others = (scan(sets, target, contexts, batch_contexts=b, single_site_share=0.5) for b in (1, 3, 7))
    for other in others:
        for a, b in zip(first.rows, other.rows, strict=True):
            assert {k: v for k, v in b.metrics.items() if v is not None} == pytest.approx(
                {k: v for k, v in a.metrics.items() if v is not None}, abs=1e-11
            )
            assert (a.intervals["delta"] or ()) == pytest.approx(b.intervals["delta"] or (), abs=1e-11)


def test_order_of_rows_changes_nothing(kit, scan):
    target, contexts = kit.TinyTarget(), kit.contexts()
    sets = [one("clt", kit.Random(INS, OUTS))]
    turned = Contexts(*(array[::-1].copy() for array in contexts))
    a, b = (numbers(scan(sets, target, c), "clt", "cascade") for c in (contexts, turned))
    assert a == pytest.approx(b, abs=1e-11)


def test_appended_padding_changes_nothing(kit, scan):
    target, short = kit.TinyTarget(), kit.contexts(length=9)
    padding = ((0, 0), (0, 3))
    padded = Contexts(
        np.pad(short.token_id, padding, constant_values=5),
        np.pad(short.document_id, padding, constant_values=-1),
        np.pad(short.keep, padding),
    )
    sets = [one("clt", kit.Random(INS, OUTS))]
    a, b = (numbers(scan(sets, target, c), "clt", "cascade") for c in (short, padded))
    assert a == pytest.approx(b, abs=1e-11)


def test_text_given_twice_changes_numbers_not_at_all_and_shrinks_intervals(kit, scan):
    target, contexts = kit.TinyTarget(), kit.contexts(rows=8)
    later = contexts.document_id + (contexts.document_id >= 0) * 1000
    double = Contexts(
        np.concatenate([contexts.token_id] * 2),
        np.concatenate([contexts.document_id, later]).astype(np.int32),
        np.concatenate([contexts.keep] * 2),
    )
    sets = [one("clt", kit.Random(INS, OUTS))]
    a, b = (scan(sets, target, c, resamples=1000).find("clt", "cascade") for c in (contexts, double))
    for key in ("delta", "kl", "fvu", "l0", "agree"):
        assert b.metrics[key] == pytest.approx(a.metrics[key], abs=1e-11)
    width_a, width_b = (row.intervals["delta"].high - row.intervals["delta"].low for row in (a, b))
    assert 0.5 < width_b / width_a < 0.9  # about 1/√2


def test_changing_a_token_changes_nothing_before_it_or_in_another_row(kit):
    """Scores of a cascade with token 6 of row 0 replaced, position by position."""
    target, contexts = kit.TinyTarget(), kit.contexts(rows=2)
    patch_BT = torch.from_numpy(contexts.keep == 1)
    dictionaries = [kit.Random(INS, OUTS)]

    def scores(tokens_BT):
        clean_BTV = target.logits(tokens_BT)
        logits_BTV = target.logits(tokens_BT, cascade_edits(dictionaries, patch_BT))
        following = tokens_BT.roll(-1, dims=1).flatten()
        return score_tokens(logits_BTV.flatten(0, 1), following, clean_scores(clean_BTV.flatten(0, 1))).stacked()

    before_BT = torch.from_numpy(contexts.token_id).long()
    after_BT = before_BT.clone()
    after_BT[0, 6] = (after_BT[0, 6] + 1) % target.n_vocab
    before, after = (scores(tokens).view(2, 12, 4) for tokens in (before_BT, after_BT))
    torch.testing.assert_close(after[0, :5], before[0, :5], rtol=0, atol=1e-13)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-13)
    assert (after[0, 6:] - before[0, 6:]).abs().max() > 1e-3


def test_every_arm_keeps_the_live_value_outside_the_mask(kit):
    """With nothing to patch, zeros and a cascade leave the model as it is, although both would ruin it."""
    target, contexts = kit.TinyTarget(), kit.contexts(rows=2)
    tokens_BT = torch.from_numpy(contexts.token_id).long()
    none_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
    zeros = {site: torch.zeros(8) for site in OUTS}
    assert torch.equal(target.logits(tokens_BT, constant_edits(zeros, none_BT)), target.logits(tokens_BT))
    live = target.logits(tokens_BT, cascade_edits([kit.Random(INS, OUTS)], none_BT))
    assert torch.equal(live, target.logits(tokens_BT))


def test_baselines_are_shared_by_replacements_of_the_same_sites(kit, scan):
    target = kit.TinyTarget()
    sets = [one(f"r{i}", kit.Random(INS, OUTS, seed=i)) for i in range(3)]
    results = scan(sets, target, kit.contexts(rows=4), protocols=("cascade",), batch_contexts=4)
    tried = 2 * (1 + 3)  # causality, before and after a change: the bare model, and each cascade
    assert target.passes == tried + 1 + 1 + 2 + 3  # clean, identity, zero and mean, one cascade each
    assert sum(label.startswith("zero|") for label in results.segments.arms) == 1
    assert zero_label(OUTS) in results.segments.arms


def test_runs_of_other_caches_get_their_own_mean_ablation(kit, scan):
    sets = [
        one("a", kit.Random([INS[0]], [OUTS[0]])),
        one("b", kit.Random([INS[0]], [OUTS[0]], means={OUTS[0]: torch.ones(8)})),
    ]
    results = scan(sets, kit.TinyTarget(), kit.contexts(), protocols=("cascade",))
    means = [row for row in results.rows if row.name == "mean"]
    assert len(means) == 2
    assert means[0].metrics["delta"] != means[1].metrics["delta"]
    a, b = (results.find(name, "cascade").metrics["ce_mean"] for name in "ab")
    assert [row.metrics["ce"] for row in means] == [a, b]


@pytest.mark.parametrize("kind", ["transcoders", "saes", "clt"])
def test_what_a_cascade_shares_with_the_clean_pass_changes_nothing(kit, kind):
    """All before the first write: the first transcoder, SAE or CLT source; no encoder of theirs runs again."""
    dictionaries = {
        "transcoders": [
            kit.Random([read], [write], seed=i) for i, (read, write) in enumerate(zip(INS, OUTS, strict=True))
        ],
        "saes": [kit.Random([site], [site], seed=i) for i, site in enumerate(OUTS)],
        "clt": [kit.Random(INS, OUTS)],
    }[kind]
    target, contexts = kit.TinyTarget(), kit.contexts(rows=3)
    tokens_BT, patch_BT = torch.from_numpy(contexts.token_id).long(), torch.from_numpy(contexts.keep == 1)
    clean: dict[str, torch.Tensor] = {}
    sites = dict.fromkeys(site for d in dictionaries for site in (*d.reads, *d.writes))
    target.logits(tokens_BT, recording_edits(list(sites), patch_BT, clean))
    codes = encode_clean(dictionaries, clean)
    known = settled(dictionaries, list(clean), codes, decode_all(dictionaries, codes))
    assert list(known.codes) == [(0, 0)]
    assert list(known.values) == [OUTS[0]]
    seen: dict[bool, list[tuple[int, int, torch.Tensor]]] = {True: [], False: []}

    def logits(shared):
        def watch(i, s, found):
            seen[shared].append((i, s, found.l0()))

        edits = cascade_edits(dictionaries, patch_BT, observe=watch, **({"known": known} if shared else {}))
        return target.logits(tokens_BT, edits)

    torch.testing.assert_close(logits(True), logits(False), rtol=0, atol=1e-13)
    assert [(i, s) for i, s, _ in seen[True]] == [(i, s) for i, s, _ in seen[False]]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(seen[True], seen[False], strict=True))
