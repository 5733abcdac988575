"""Baselines in the table: neurons and affine maps stand beside the dictionaries, and are never taken for one."""

import pytest
import torch

from thresher.evaluate.run import Replacement
from thresher.evaluate.splice import PROTOCOLS
from thresher.evaluate.store import Store

INS, OUTS = [f"L{i:02d}.mlp_in" for i in range(3)], [f"L{i:02d}.mlp_out" for i in range(3)]
NEURONS = 32
"""Of a TinyTarget's MLP."""


def transcoders(kit):
    parts = tuple(kit.Random([a], [b], seed=i) for i, (a, b) in enumerate(zip(INS, OUTS, strict=True)))
    return Replacement("transcoders", parts, {"kind": "transcoder"}, content="t")


def clt(kit):
    return Replacement("clt", (kit.Random(INS, OUTS),), {"kind": "clt"}, content="c")


def sae(kit):
    return Replacement("sae", tuple(kit.Identity([b], [b]) for b in OUTS), {"kind": "sae"}, content="s")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_neurons_are_the_model_and_fewer_lose_more(kit, scan, protocol):
    results = scan([clt(kit)], kit.TinyTarget(), kit.contexts(), neurons=(1, 8, NEURONS))
    few, some, every = (results.find(f"neurons k={k}", protocol) for k in (1, 8, NEURONS))
    assert every.metrics["delta"] == pytest.approx(0.0, abs=1e-12)
    assert every.metrics["kl"] == pytest.approx(0.0, abs=1e-12)
    assert every.metrics["fvu"] == pytest.approx(0.0, abs=1e-20)
    assert few.metrics["kl"] > some.metrics["kl"] > 0
    assert few.metrics["fvu"] > some.metrics["fvu"] > 0
    assert [row.cost for row in (some,)] == [{"l0": 8.0, "active_per_mlp": 8.0, "active_parameters": 8.0 * 3 * 16}]
    assert some.kind == "baseline"
    assert some.sites == tuple(OUTS)
    assert some.positions["ce"]


def test_neurons_under_single_site_are_one_mlp_at_a_time(kit, scan):
    results = scan([clt(kit)], kit.TinyTarget(), kit.contexts(), neurons=(4,))
    row = results.find("neurons k=4", "single_site")
    assert [site["site"] for site in row.per_site] == OUTS
    assert row.metrics["delta"] == pytest.approx(sum(site["delta"] for site in row.per_site) / 3)
    assert row.metrics["recovered_zero"] is not None


def test_the_affine_baseline_is_fitted_on_training_text_for_what_is_computed_from_elsewhere(kit, scan):
    target, held_out = kit.TinyTarget(), kit.contexts(rows=12)
    training = kit.contexts(rows=40, seed=9)
    results = scan([transcoders(kit), clt(kit), sae(kit)], target, held_out, training=training)
    affine = [row for row in results.rows if row.name == "affine" and row.protocol == "cascade"]
    assert len(affine) == 1  # transcoders and CLT share it, and an SAE has none
    (row,) = affine
    assert row.reads == tuple(INS)
    assert row.sites == tuple(OUTS)
    assert 0 < row.metrics["fvu"] < 1
    assert row.metrics["kl"] < results.find("zero", "cascade").metrics["kl"]
    assert not row.cost
    assert not row.front
    assert results.provenance["training"]["tokens"] > 100


def test_without_training_text_there_is_no_affine_map_and_no_outlier(kit, scan):
    results = scan([clt(kit)], kit.TinyTarget(), kit.contexts())
    assert not [row for row in results.rows if row.name == "affine"]
    assert "typical" not in results.find("clt", "cascade").per_site[0]["slices"]


def test_outliers_of_the_norm_are_set_apart(kit, scan):
    training, held_out = kit.contexts(rows=40, seed=9), kit.contexts(rows=12)
    row = scan([clt(kit)], kit.TinyTarget(), held_out, training=training).find("clt", "cascade")
    for site in row.per_site:
        patched = sum(row.positions["tokens"])
        assert site["slices"]["typical"]["tokens"] > 0
        assert site["slices"]["typical"]["fvu"] > 0
        assert patched > 0


def test_baselines_take_no_part_in_fronts_pairs_or_checks(kit, scan):
    contexts, training = kit.contexts(), kit.contexts(rows=40, seed=9)
    alone = scan([clt(kit), transcoders(kit)], kit.TinyTarget(), contexts)
    beside = scan([clt(kit), transcoders(kit)], kit.TinyTarget(), contexts, neurons=(8,), training=training)
    assert alone.pairs == beside.pairs
    assert alone.hypervolumes == beside.hypervolumes
    assert alone.matched == beside.matched
    names = {row.name for row in beside.rows if row.kind == "replacement"}
    assert names == {"clt", "transcoders"}
    for name in names:
        assert alone.find(name, "cascade").front == beside.find(name, "cascade").front
        assert alone.find(name, "cascade").chance == beside.find(name, "cascade").chance


def test_more_neurons_than_there_are_is_a_note(kit, scan):
    results = scan([clt(kit)], kit.TinyTarget(), kit.contexts(), neurons=(NEURONS + 1,))
    assert any("33 neurons" in note for note in results.notes)


def test_baselines_are_kept_too(kit, scan, tmp_path):
    target, training = kit.TinyTarget(), kit.contexts(rows=40, seed=9)
    settings = {"neurons": (8,), "training": training, "store": Store(tmp_path)}
    first = scan([clt(kit)], target, kit.contexts(), **settings)
    target.passes = 0
    second = scan([clt(kit)], target, kit.contexts(), **settings)
    assert target.passes == 2 * 2  # causality alone: what was learned from training rows is kept as well
    for protocol in PROTOCOLS:
        for name in ("affine", "neurons k=8"):
            assert first.find(name, protocol).metrics == second.find(name, protocol).metrics


def test_other_training_text_makes_another_affine_map(kit, scan, tmp_path):
    store = Store(tmp_path)
    rows = [
        scan([clt(kit)], kit.TinyTarget(), kit.contexts(), training=kit.contexts(rows=20, seed=seed), store=store)
        for seed in (9, 10)
    ]
    a, b = (results.find("affine", "cascade").metrics["delta"] for results in rows)
    assert a != b
    assert torch.tensor([a, b]).isfinite().all()
