"""The stage as a whole, on a small real cache."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console

from tests.train.conftest import KINDS, RULES, plans_for, stop_at
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.train import run as stage
from thresher.train.files import load_run, read_config, write_config
from thresher.train.fit import Fit
from thresher.train.run import train


def test_every_kind_and_rule_learns_and_holds_its_sparsity_when_frozen(
    cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    plans = [
        plan
        for kind in KINDS
        for plan in plans_for(cache, kind, {"steps": 250}, kind=kind, firing="batchtopk", k=3, normalise="per_dim")
    ]
    for result in train(plans, cache, out=tmp_path, device="cpu", console=console):
        held_out = result.metrics["held_out"]
        assert result.status == "trained"
        assert held_out["split"] == "validation"
        assert max(held_out["fvu"]) < 0.65
        assert held_out["l0"] == pytest.approx([3.0] * len(held_out["l0"]), rel=0.15)


def test_the_frozen_threshold_is_the_value_of_rank_k_times_rows(
    cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    (plan, _) = plans_for(cache, "t", {"calibrate_rows": 4096}, kind="transcoder", firing="batchtopk", k=2.5)
    (result,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
    coder = load_run(result.path).dictionary
    rows = 4096
    values = torch.cat(
        [
            coder.encoder(0).preactivations(acts["L00.mlp_in"], coder.bias(0)).flatten()
            for acts in stage_passes(cache, rows)
        ]
    )
    expected = values.sort(descending=True).values[int(2.5 * rows) - 1]
    assert torch.equal(coder.encoder(0).rule.thresholds(), expected.expand(64))


def stage_passes(cache: CacheReader, rows: int) -> Any:
    from thresher.cache.interrupts import StopFlag
    from thresher.train.calibrate import passes

    return passes(cache, "train", ["L00.mlp_in"], rows, torch.device("cpu"), StopFlag())


def test_a_loaded_run_encodes_as_it_did_before_saving(cache: CacheReader, tmp_path: Path, console: Console) -> None:
    (plan,) = plans_for(cache, "clt", kind="clt", firing="batchtopk", k=2)
    (result,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
    run = load_run(result.path)
    dictionary = run.dictionary
    assert dictionary.name == "clt"
    assert dictionary.reads == ("L00.mlp_in", "L01.mlp_in")
    assert [list(dictionary.sources(j)) for j in range(2)] == [[0], [0, 1]]
    for site, mean in dictionary.means.items():
        assert mean.tolist() == pytest.approx(cache.statistics(site).mean.tolist(), rel=1e-5)
    fit = Fit(plan, cache, torch.device("cpu"))
    checkpoint = stage.load_checkpoint(result.path)
    assert checkpoint is not None
    fit.load(checkpoint)
    before = fit.deployed()
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dictionary.encoder(1).W_enc, before.encoder(1).W_enc)
    assert torch.equal(dictionary.encoder(0).tokens_since_fired, before.encoder(0).tokens_since_fired)
    codes = [dictionary.encode(i, x) for i in range(2)]
    torch.testing.assert_close(dictionary.decode(1, codes), before.decode(1, codes))
    assert run.config["cache"]["fingerprint"] == cache.fingerprint
    assert run.config["recipe"] == {"from": "test"}


def test_saved_saes_have_unit_rows(cache: CacheReader, tmp_path: Path, console: Console) -> None:
    plans = plans_for(cache, "sae", kind="sae", firing="topk", k=3)
    for result in train(plans, cache, out=tmp_path, device="cpu", console=console):
        norms = load_run(result.path).dictionary.decoder_norm(0)
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_auxk_revives_dead_latents(
    cache: CacheReader, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Fit.start

    def handicapped(self: Fit, reader: CacheReader) -> None:
        real(self, reader)
        with torch.no_grad():
            self.coder.encoder(0).b_enc[24:] -= 3.0  # two thirds of the latents lose every contest, at first

    monkeypatch.setattr(Fit, "start", handicapped)
    dead = {}
    for aux in (0.0, 1 / 32):
        (plan,) = plans_for(
            cache, f"aux{aux > 0}", {"steps": 250}, kind="sae", firing="topk", k=4, aux=aux, aux_k=None, pre_bias=True,
            n_latents=72, dead_after=10_000, layers=(0,),
        )  # fmt: skip
        (result,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
        dead[aux] = result.metrics["final"]["dead"]
    assert dead[0.0] > 0.3
    assert dead[1 / 32] < dead[0.0] / 2


def test_finished_runs_are_reused_and_metrics_grow_no_second_tail(
    cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    plans = plans_for(cache, "sae", kind="sae", **RULES["topk"])
    first = train(plans, cache, out=tmp_path, device="cpu", console=console)
    lines = (first[0].path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [10, 20, 30, 40]
    seen = Console(record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    again = train(plans, cache, out=tmp_path, device="cpu", console=seen)
    assert [result.status for result in again] == ["reused", "reused"]
    assert "Reusing 2 finished" in seen.export_text()
    assert (first[0].path / "metrics.jsonl").read_text() == lines
    assert again[0].metrics == first[0].metrics


def test_the_log_and_the_config_name_the_kernels(cache: CacheReader, tmp_path: Path) -> None:
    plans = plans_for(cache, "t", {"steps": 5}, kind="transcoder", firing="topk", k=2)
    console = Console(record=True, file=io.StringIO(), width=200)
    results = train(plans, cache, out=tmp_path, device="cpu", console=console)
    (line,) = (line for line in console.export_text().splitlines() if line.startswith("Kernels: "))
    used = read_config(results[0].path)["training"]["kernels"]
    assert {"decode", "update"} <= used.keys()
    for operation, names in used.items():
        assert f"{operation} {'/'.join(names)}" in line


def test_the_last_two_checkpoints_are_kept(cache: CacheReader, tmp_path: Path, console: Console) -> None:
    (plan,) = plans_for(cache, "clt", kind="clt", **RULES["topk"])
    (result,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
    names = sorted(file.name for file in (result.path / "checkpoints").iterdir())
    stems = ("step-00000030", "step-00000040")
    assert names == [f"{stem}.{kind}" for stem in stems for kind in ("json", "safetensors")]


def test_an_unfinished_run_needs_resume_and_another_recipe_is_refused(
    cache: CacheReader, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = plans_for(cache, "sae", kind="sae", **RULES["topk"])
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        with pytest.raises(Interrupted):
            train(plans, cache, out=tmp_path, device="cpu", console=console)
    with pytest.raises(UserError, match="Add --resume"):
        train(plans, cache, out=tmp_path, device="cpu", console=console)
    with pytest.raises(UserError, match="training has not finished"):
        load_run(tmp_path / "sae-L00")
    other = plans_for(cache, "sae", kind="sae", firing="topk", k=4)
    with pytest.raises(UserError, match=r"other settings \(dictionary.k: expected 4, got 3"):
        train(other, cache, out=tmp_path, device="cpu", resume=True, console=console)


def test_foreign_newer_and_damaged_run_directories_are_refused(
    cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    (plan,) = plans_for(cache, "clt", {"steps": 2}, kind="clt", **RULES["topk"])
    (result,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
    config = read_config(result.path)
    with pytest.raises(UserError, match="there is no such directory"):
        load_run(tmp_path / "nothing")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"architecture": "standard"}')
    with pytest.raises(UserError, match="not the config of a Thresher run"):
        load_run(tmp_path / "foreign")
    (result.path / "config.json").write_text(json.dumps({**config, "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        load_run(result.path)
    write_config(result.path, config)
    (result.path / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="no readable weights"):
        load_run(result.path)
    safetensors.torch.save_file({"W_enc.0": torch.zeros(2, 2)}, result.path / "weights.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        load_run(result.path)


def test_names_used_twice_unknown_devices_and_foreign_directories_are_refused(
    cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    (plan,) = plans_for(cache, "clt", kind="clt", **RULES["topk"])
    with pytest.raises(UserError, match="Several dictionaries"):
        train([plan, plan], cache, out=tmp_path, device="cpu", console=console)
    with pytest.raises(UserError, match="expected auto, cpu"):
        train([plan], cache, out=tmp_path, device="tpu!", console=console)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            train([plan], cache, out=tmp_path, device="cuda", console=console)
    (tmp_path / "clt").mkdir()
    (tmp_path / "clt" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no run of ours"):
        train([plan], cache, out=tmp_path, device="cpu", console=console)
