"""Numbers kept apart from the main ones: by position, by slice, other tools' definitions, and where a CLT writes."""

import numpy as np
import pytest
import torch

from thresher.cache.layout import Contexts
from thresher.evaluate.arms import Plan
from thresher.evaluate.clean_facts import site_facts
from thresher.evaluate.compat import COMPAT, batch_truth, compat
from thresher.evaluate.masks import bucket_edges, outside_mask, scored
from thresher.evaluate.metrics import ReconstructionSums, TargetSums, reconstruction_metrics
from thresher.evaluate.rounds import run_passes
from thresher.evaluate.run import Replacement
from thresher.evaluate.splice import cascade_edits

INS, OUTS = [f"L{i:02d}.mlp_in" for i in range(3)], [f"L{i:02d}.mlp_out" for i in range(3)]


def test_buckets_cover_every_position_once_and_widen():
    for length in (1, 2, 8, 9, 12, 256, 1024, 5000):
        edges = bucket_edges(length)
        widths = np.diff(np.append(edges, length))
        assert edges[0] == 0
        assert widths.sum() == length
        assert (widths > 0).all()
        assert (widths[: min(8, length)] == 1).all()
    assert len(bucket_edges(1024)) < 40


def test_loss_by_position_equals_loops_and_adds_up(kit, scan):
    target, contexts = kit.TinyTarget(), kit.contexts()
    clt = kit.Random(INS, OUTS)
    row = scan([Replacement("clt", (clt,), {})], target, contexts).find("clt", "cascade")
    tokens = torch.from_numpy(contexts.token_id).long()
    text = scored(contexts, 0)
    nll = -target.logits(tokens, cascade_edits([clt], torch.from_numpy(text.patch))).log_softmax(-1)
    clean = -target.logits(tokens).log_softmax(-1)
    places = row.positions
    columns = [places[key] for key in ("first", "last", "tokens", "ce", "delta")]
    for first, last, count, ce, delta in zip(*columns, strict=True):
        where = [(r, t) for r, t in zip(*np.nonzero(text.score), strict=True) if first <= t <= last]
        assert count == len(where)
        if where:
            own = np.mean([float(nll[r, t, tokens[r, t + 1]]) for r, t in where])
            base = np.mean([float(clean[r, t, tokens[r, t + 1]]) for r, t in where])
            assert ce == pytest.approx(own, abs=1e-9)
            assert delta == pytest.approx(own - base, abs=1e-9)
        else:
            assert ce is None
    weighted = sum(n * v for n, v in zip(places["tokens"], places["ce"], strict=True) if v is not None)
    assert weighted / sum(places["tokens"]) == pytest.approx(row.metrics["ce"], abs=1e-9)
    assert all(value is None or 0 < value < 16 for value in places["l0"])


def test_single_site_positions_use_the_rows_it_was_run_on(kit, scan):
    contexts = kit.contexts(rows=8)
    results = scan(
        [Replacement("clt", (kit.Random(INS, OUTS),), {})], kit.TinyTarget(), contexts, single_site_share=0.25
    )
    row = results.find("clt", "single_site")
    total = sum(row.positions["tokens"])
    assert total == results.protocols["single_site"]["scored_tokens"]
    known = [(n, d) for n, d in zip(row.positions["tokens"], row.positions["delta"], strict=True) if d is not None]
    assert sum(n * d for n, d in known) / total == pytest.approx(row.metrics["delta"], abs=1e-9)


def test_slices_equal_metrics_of_their_rows(kit):
    """First positions, all real ones, and those below a norm, each against the rows picked out by hand."""
    contexts = kit.contexts(rows=6)
    keep = contexts.keep.copy()
    keep[1, 5] = 2
    contexts = Contexts(contexts.token_id, contexts.document_id, keep)
    target, site = kit.TinyTarget(), OUTS[1]
    sae = kit.Random([site], [site])
    text = scored(contexts, 0)
    x_BTD = target.record(torch.from_numpy(contexts.token_id).long(), target.sites([site]))[site]
    norms = torch.linalg.vector_norm(x_BTD, dim=-1)
    limit = float(norms[torch.from_numpy(text.patch)].quantile(0.8))
    plan = Plan(("cascade",), (), 2, 0.5)
    own = Replacement("sae", (sae,), {})
    tally = run_passes(text, [own], target, plan, norms={site: limit})
    found = site_facts(tally, tally.own["sae"], site)
    outside = outside_mask(contexts)
    wanted = {
        "first": outside == 1,
        "all": contexts.keep > 0,
        "typical": text.patch & (norms <= limit).numpy(),
        None: text.patch,
    }
    assert (outside == 2).sum() == 1
    for name, mask in wanted.items():
        y_ND = x_BTD[torch.from_numpy(mask)]
        truth, sums = TargetSums(), ReconstructionSums()
        truth.add(y_ND)
        sums.add(y_ND, sae.decode(0, [sae.encode(0, y_ND)]))
        expected = reconstruction_metrics(truth, sums)
        got = found if name is None else found["slices"][name]
        for key in ("fvu", "fvu_uncentred", "offset_share", "cosine", "norm_ratio", "gamma"):
            assert got[key] == pytest.approx(expected[key], rel=1e-9), (name, key)


def reference_case(what):
    """The table of five cases: d = 64, four dimensions with mean 8σ."""
    rng = np.random.default_rng(0)
    y = rng.standard_normal((200_000 if what != "outliers" else 262_144, 64))
    y[:, :4] += 8
    if what == "offset":
        return y, y + 1.0
    if what == "mean x10":
        return 10 * y, np.broadcast_to(10 * y.mean(0), y.shape)
    if what == "mean":
        return y, np.broadcast_to(y.mean(0), y.shape)
    if what == "outliers":
        y[::128] *= 60
    return y, y + 0.5 * rng.standard_normal(y.shape)


@pytest.mark.parametrize(
    ("what", "fvu", "uncentred", "legacy", "second", "centred"),
    [
        ("mean", 1.0, 0.199, -0.004, 0.784, 0.0),
        ("noise", 0.25, 0.05, 0.741, 0.946, 0.75),
        ("offset", 1.002, 0.2, -0.038, 0.783, 1.0),
        ("mean x10", 1.0, 0.199, -0.004, 1.029, 0.0),
    ],
)
def test_other_tools_numbers_on_known_cases(what, fvu, uncentred, legacy, second, centred):
    """The definitions disagree as published comparisons of them do; batches of 256 rows for those that depend on it."""
    y, yhat = (torch.from_numpy(np.ascontiguousarray(a)) for a in reference_case(what))
    truth, sums, per_batch = TargetSums(), ReconstructionSums(), []
    for y_ND, yhat_ND in zip(y.split(256), yhat.split(256), strict=True):
        truth.add(y_ND)
        per_batch.append(compat(batch_truth(y_ND), sums.add(y_ND, yhat_ND)))
    ours = reconstruction_metrics(truth, sums)
    assert ours["fvu"] == pytest.approx(fvu, abs=6e-3)
    assert ours["fvu_uncentred"] == pytest.approx(uncentred, abs=3e-3)
    theirs = dict(zip(COMPAT, torch.stack(per_batch).mean(0).tolist(), strict=True))
    assert theirs["ev_legacy_token"] == pytest.approx(legacy, abs=0.012)
    assert theirs["fve_centred"] == pytest.approx(centred, abs=3e-3)
    assert theirs["ev_second_moment"] == pytest.approx(second, abs=4e-3)


def test_other_tools_numbers_stand_apart_with_their_batch(kit, scan):
    row = scan([Replacement("clt", (kit.Random(INS, OUTS),), {})], kit.TinyTarget(), kit.contexts()).find(
        "clt", "cascade"
    )
    for site in row.per_site:
        assert set(site["compat"]) == {*COMPAT, "batch"}
        assert site["compat"]["batch"] > 1
    assert not set(COMPAT) & set(row.metrics)


def test_a_clt_says_where_it_writes(kit, scan):
    results = scan(
        [Replacement("clt", (kit.Random(INS, OUTS),), {})], kit.TinyTarget(), kit.contexts(), protocols=("cascade",)
    )
    (norms,) = results.find("clt", "cascade").write_norms
    total = 3 * 3 + 2 * 2 + 1  # conftest: 1 + destination from every source that writes
    assert norms["share"][0] == pytest.approx([1 / total, 2 / total, 3 / total])
    assert norms["share"][2] == [None, None, pytest.approx(3 / total)]
    assert norms["reads"] == INS


def test_a_replacement_that_couples_tokens_is_refused(kit, scan):
    from thresher.cache.errors import UserError

    class Coupled(kit.Random):
        """Keeps the largest values of the whole batch, as batch-level top-k would at evaluation."""

        def encode(self, source, x_ND):
            z_NF = self.pre(source, x_ND)
            return kit.codes_of(z_NF * (z_NF >= z_NF.flatten().topk(min(20, z_NF.numel())).values[-1]))

    with pytest.raises(UserError, match=r"'coupled' in place is not causal.*frozen threshold"):
        scan([Replacement("coupled", (Coupled(INS, OUTS),), {})], kit.TinyTarget(), kit.contexts())
