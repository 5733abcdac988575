"""A run is exact: interrupted or not, alone or in a sweep, first or second time, it ends with the same bits.

And what goes wrong with one dictionary stays with it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console

from tests.train.conftest import FURTHER, KINDS, RULES, plans_for, stop_at
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.train.files import load_run, read_config
from thresher.train.fit import Fit
from thresher.train.plan import RunPlan
from thresher.train.run import train


def everything(cache: CacheReader, **train_settings: Any) -> list[RunPlan]:
    """Every kind with every rule, and with BatchTopK in parts too; AuxK and schedules at work after a few steps."""
    ways: dict[str, dict[str, Any]] = {name: {} for name in RULES} | {"batchtopk-parts": {"micro_rows": 100}}
    rise = min(train_settings.get("steps", 40), 12)
    further = [
        plan
        for name, settings in FURTHER.items()
        for plan in plans_for(
            cache, name, train_settings, layers=None if settings["kind"] == "clt" else (1,),
            **(settings | ({"k_anneal": rise} if "k_anneal" in settings else {})),
        )
    ]  # fmt: skip
    return further + [
        plan
        for kind in KINDS
        for name, way in ways.items()
        for plan in plans_for(
            cache, f"{kind}-{name}", train_settings | way, layers=None if kind == "clt" else (1,), kind=kind,
            pre_bias=kind == "sae", **_warmed(RULES[name.removesuffix("-parts")], rise),
        )
    ]  # fmt: skip


def _warmed(rule: dict[str, Any], steps: int) -> dict[str, Any]:
    return rule | ({"penalty_warmup": steps} if "sparsity" in rule else {})


def assert_same_end(plans: list[RunPlan], left: Path, right: Path) -> None:
    """Weights, moments, thresholds, counters, cursor and schedules of every run agree bit for bit."""
    for plan in plans:
        step = plan.train.steps
        for file in ("weights.safetensors", f"checkpoints/step-{step:08d}.safetensors"):
            a, b = (safetensors.torch.load_file(side / plan.name / file) for side in (left, right))
            assert a.keys() == b.keys()
            for key in a:
                assert torch.equal(a[key], b[key]) or bool(a[key].isnan().all()), f"{plan.name} {file}: {key}"
        cursors = [json.loads((s / plan.name / f"checkpoints/step-{step:08d}.json").read_text()) for s in (left, right)]
        assert cursors[0] == cursors[1]
        lines = [(s / plan.name / "metrics.jsonl").read_text().splitlines() for s in (left, right)]
        a, b = (json.loads(side[-1]) for side in lines)
        for key in ("step", "rows", "lr", "threshold", "dead"):
            assert a[key] == b[key]


@pytest.mark.parametrize("kernels", ["plain", "fast"])
def test_resume_equals_uninterrupted_bit_for_bit_for_every_kind_and_rule(
    cache: CacheReader, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    plans = everything(cache, kernels=kernels, steps=17, checkpoint_every=6, decay="linear")
    train(plans, cache, out=tmp_path / "whole", device="cpu", console=console)
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        with pytest.raises(Interrupted, match="--resume"):
            train(plans, cache, out=tmp_path / "parts", device="cpu", console=console)
    assert not list((tmp_path / "parts").glob("*/weights.safetensors"))
    train(plans, cache, out=tmp_path / "parts", device="cpu", resume=True, console=console)
    assert_same_end(plans, tmp_path / "whole", tmp_path / "parts")
    revived = [json.loads((tmp_path / "whole" / p.name / "metrics.jsonl").read_text().splitlines()[-1]) for p in plans]
    assert any(line["aux"] > 0 for line in revived)  # else AuxK was not put to the test


def test_the_same_recipe_twice_gives_the_same_bits(cache: CacheReader, tmp_path: Path, console: Console) -> None:
    plans = everything(cache, steps=8)
    for side in ("once", "again"):
        train(plans, cache, out=tmp_path / side, device="cpu", console=console)
    assert_same_end(plans, tmp_path / "once", tmp_path / "again")


def test_a_run_goes_on_only_with_its_own_kernels_and_parts(
    cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    settings = {"steps": 2, "kernels": "plain", "micro_rows": 100}
    plans = plans_for(cache, "clt", settings, kind="clt", **RULES["topk"])
    (result,) = train(plans, cache, out=tmp_path, device="cpu", console=console)
    assert all(names == ["plain"] for names in result.metrics["kernels"].values())
    for other in ({"kernels": "fast"}, {"micro_rows": None}):
        changed = plans_for(cache, "clt", settings | other, kind="clt", **RULES["topk"])
        with pytest.raises(UserError, match=f"other settings .train.{next(iter(other))}: expected"):
            train(changed, cache, out=tmp_path, device="cpu", resume=True, console=console)


def test_a_member_of_a_sweep_comes_out_as_it_does_alone(cache: CacheReader, tmp_path: Path, console: Console) -> None:
    plans = [
        *plans_for(cache, "short", {"steps": 11}, kind="sae", **RULES["topk"]),
        *plans_for(cache, "long", {"steps": 25}, kind="sae", **RULES["batchtopk"]),
        *plans_for(cache, "wide", {"steps": 9, "batch_rows": 512}, kind="sae", **RULES["topk"]),
        *plans_for(cache, "clt", {"steps": 9}, kind="clt", **RULES["jumprelu"]),
    ]
    results = train(plans, cache, out=tmp_path / "sweep", device="cpu", console=console)
    assert [result.metrics["steps"] for result in results] == [11, 11, 25, 25, 9, 9, 9]
    for alone in (plans[2], plans[4], plans[6]):
        train([alone], cache, out=tmp_path / "alone", device="cpu", console=console)
        assert_same_end([alone], tmp_path / "sweep", tmp_path / "alone")


def test_a_diverging_run_is_set_aside_and_the_others_go_on(
    cache: CacheReader, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Fit.step

    def poisoned(self: Fit, inputs: Any, *others: Any) -> torch.Tensor:
        if self.plan.name == "sae-L01" and self.done == 7:
            inputs.xs[0][0, 0] = float("nan")
        return real(self, inputs, *others)

    monkeypatch.setattr(Fit, "step", poisoned)
    plans = plans_for(cache, "sae", kind="sae", **RULES["topk"])
    results = train(plans, cache, out=tmp_path, device="cpu", console=console)
    assert [result.status for result in results] == ["trained", "failed"]
    failed = read_config(tmp_path / "sae-L01")["training"]
    assert failed["steps"] == 7
    assert "step 8" in failed["failed"]
    saved = safetensors.torch.load_file(tmp_path / "sae-L01/checkpoints/step-00000007.safetensors")
    assert all(bool(t.isfinite().all()) for name, t in saved.items() if "threshold" not in name)
    with pytest.raises(UserError, match="it failed: step 8"):
        load_run(tmp_path / "sae-L01")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 16 bytes."),
        MemoryError("Unable to allocate 8.00 PiB for an array"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_run_out_of_memory_is_set_aside_gives_its_memory_back_and_goes_on_later(
    cache: CacheReader, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, sizes = Fit._gradients, []

    def exhausted(self: Fit, inputs: Any) -> Any:
        if self.plan.name == "sae-L00" and self.done == 4:
            raise error
        if self.plan.name == "sae-L01" and self.done == 5:
            sizes.append(sum(parameter.numel() for parameter in broken[0].coder.parameters()))
        if self.plan.name == "sae-L00":
            broken[:] = [self]
        return real(self, inputs)

    broken: list[Fit] = []
    plans = plans_for(cache, "sae", {"steps": 8}, kind="sae", **RULES["batchtopk"])
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_gradients", exhausted)
        results = train(plans, cache, out=tmp_path / "broken", device="cpu", console=console)
    assert [result.status for result in results] == ["failed", "trained"]
    assert "step 5 ran out of memory" in read_config(tmp_path / "broken/sae-L00")["training"]["failed"]
    assert (tmp_path / "broken/sae-L00/checkpoints/step-00000004.safetensors").exists()
    assert sizes == [0]
    train(plans, cache, out=tmp_path / "broken", device="cpu", resume=True, console=console)
    train(plans, cache, out=tmp_path / "whole", device="cpu", console=console)
    assert_same_end(plans, tmp_path / "whole", tmp_path / "broken")


def test_any_other_error_of_a_step_is_not_hidden(
    cache: CacheReader, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Fit, inputs: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Fit, "_gradients", broken)
    plans = plans_for(cache, "sae", {"steps": 8}, kind="sae", **RULES["topk"])
    with pytest.raises(RuntimeError, match="mat1"):
        train(plans, cache, out=tmp_path, device="cpu", console=console)
