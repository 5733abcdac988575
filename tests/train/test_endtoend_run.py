"""Training through the language model as a stage: it learns, goes on exactly, and stands or falls as a group."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.ranks import on_ranks
from tests.train import tiny
from tests.train.conftest import plans_for
from tests.train.test_profile import traces
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.cache.roster import Roster
from thresher.train.endtoend import feed
from thresher.train.endtoend.group import Group
from thresher.train.files import load_run, read_config
from thresher.train.run import RunResult, train
from thresher.train.stages import STAGES
from thresher.train.state import checkpoint_steps, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def tensors(results: list[RunResult]) -> list[dict[str, Tensor]]:
    found = [load_checkpoint(result.path) for result in results]
    return [one.tensors for one in found if one is not None]


def same(left: list[RunResult], right: list[RunResult]) -> None:
    pairs = list(zip(tensors(left), tensors(right), strict=True))
    assert len(pairs) == len(left)
    for a, b in pairs:
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert torch.equal(tensor, b[name]), name
    for a, b in zip(left, right, strict=True):
        weights = [load_run(one.path).dictionary.state_dict() for one in (a, b)]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
        lines = [[json.loads(line) for line in (one.path / "metrics.jsonl").read_text().splitlines()] for one in (a, b)]
        assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
        assert lines[0][-1] == lines[1][-1]  # the one before covers steps since the stop alone


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real, sent = Group.step, []

    def interrupted(self: Group) -> list[Tensor]:
        norms = real(self)
        if self.fits[0].done == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return norms

    monkeypatch.setattr(Group, "step", interrupted)


KINDS: dict[str, dict[str, Any]] = {
    "cascade": {"kind": "transcoder", "firing": "batchtopk", "k": 2.5},
    "clean_input": {"kind": "clt", "firing": "topk", "k": 3},
    "single_site": {"kind": "sae", "firing": "jumprelu", "sparsity": 1e-3, "writes": "mlp_out"},
}


PER_TOKEN = {"kind": "sae", "writes": "mlp_out", "normalise": "per_token", "firing": "topk", "k": 3, "k_anneal": 6}
RELU = {"kind": "transcoder", "firing": "relu", "penalty": "lp", "p_start": 4, "p_updates": 3, "sparsity": 1e-3}


OTHERS = [("cascade", RELU | {"resample": 4}), ("clean_input", RELU), ("cascade", PER_TOKEN)]


@pytest.mark.parametrize(("mode", "kind"), [*KINDS.items(), *OTHERS])
def test_resume_equals_uninterrupted(
    mode: str, kind: dict[str, Any], go: Any, tmp_path: Path, tiny_target: Any, monkeypatch: Any
) -> None:
    averaging = {"optimiser": "signum"} if mode == "cascade" else {}
    plans = tiny.plans_for(tiny_target, "g", {"mode": mode, **averaging}, **kind)
    whole = go(plans, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted, match=r"stopped at step 7 .*--resume"):
            go(plans, tmp_path / "parts")
    with pytest.raises(UserError, match="Add --resume"):
        go(plans, tmp_path / "parts")
    same(whole, go(plans, tmp_path / "parts", resume=True))
    assert [result.status for result in go(plans, tmp_path / "parts")] == ["reused"] * len(plans)


def test_a_group_goes_on_from_a_step_that_all_have_saved(
    go: Any, tmp_path: Path, tiny_target: Any, monkeypatch: Any
) -> None:
    plans = tiny.plans_for(tiny_target, "g", **KINDS["cascade"])
    whole = go(plans, tmp_path / "whole")

    class Killed(Exception):  # noqa: N818
        pass

    saved = []

    def killed(path: Path, checkpoint: Any, **how: Any) -> None:
        save_checkpoint(path, checkpoint, **how)
        saved.append(path.name)
        if len(saved) == 3:  # both after step 5, one after step 10
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("thresher.train.jobs.save_checkpoint", killed)
        with pytest.raises(Killed):
            go(plans, tmp_path / "killed")
    assert [checkpoint_steps(tmp_path / "killed" / plan.name) for plan in plans] == [[5, 10], [5]]
    same(whole, go(plans, tmp_path / "killed", resume=True))


def test_a_group_that_was_finished_in_part_comes_out_again(go: Any, tmp_path: Path, tiny_target: Any) -> None:
    plans = tiny.plans_for(tiny_target, "g", **KINDS["cascade"])
    whole, again = go(plans, tmp_path / "whole"), go(plans, tmp_path / "again")
    config = read_config(again[1].path)
    config["training"]["finished"] = False
    from thresher.train.files import write_config

    write_config(again[1].path, config)
    found = go(plans, tmp_path / "again", resume=True)
    assert [result.status for result in found] == ["trained", "trained"]
    same(whole, found)


def test_a_run_belongs_to_its_company(go: Any, tmp_path: Path, tiny_target: Any) -> None:
    plans = tiny.plans_for(tiny_target, "g", **KINDS["cascade"])
    go(plans[:1], tmp_path)
    with pytest.raises(UserError, match="together"):
        go(plans, tmp_path)


def test_one_that_fails_sets_its_group_aside_and_no_other(
    go: Any, tmp_path: Path, tiny_target: Any, monkeypatch: Any
) -> None:
    through = {"objective": "kl", "mode": "clean_input"}
    bad, good, local = (
        tiny.plans_for(tiny_target, label, way, **KINDS["cascade"])
        for label, way in (("bad", through), ("good", through), ("local", {"objective": "local"}))
    )
    real = Group.step

    def poisoned(self: Group) -> list[Tensor]:
        if self.fits[0].plan.group == "bad" and self.fits[0].done == 6:
            with torch.no_grad():
                self.fits[1].coder.encoder(0).W_enc[0, 0] = torch.inf
            before = [p.clone() for p in self.fits[0].coder.parameters()]
            norms = real(self)
            assert all(torch.equal(*pair) for pair in zip(before, self.fits[0].coder.parameters(), strict=True))
            return norms
        return real(self)

    monkeypatch.setattr(Group, "step", poisoned)
    results = go([*bad, *good, *local], tmp_path)
    assert [result.status for result in results] == ["failed"] * 2 + ["trained"] * 4
    for result in results[:2]:
        assert "step 7" in read_config(result.path)["training"]["failed"]
        assert checkpoint_steps(result.path)[-1] == 6


def test_a_trace_names_the_stages(go: Any, tmp_path: Path, tiny_target: Any) -> None:
    plans = tiny.plans_for(tiny_target, "g", {"steps": 4}, **KINDS["cascade"], dead_after=100)
    go(plans, tmp_path, profile=True)
    ((_, events),) = traces(tmp_path).items()
    spans = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert spans >= set(STAGES) - {"read"}


def test_no_memory_for_one_is_none_for_its_group(go: Any, tmp_path: Path, tiny_target: Any, monkeypatch: Any) -> None:
    plans = tiny.plans_for(tiny_target, "g", **KINDS["cascade"])
    monkeypatch.setattr(Group, "step", lambda self: (_ for _ in ()).throw(MemoryError("all gone")))
    for result in go(plans, tmp_path):
        assert result.status == "failed"
        assert "ran out of memory" in result.metrics["failed"]
    assert feed.short_of_memory(MemoryError())


def test_training_lowers_its_own_loss_and_its_threshold_holds_on_the_path_it_was_trained_on(
    go: Any, tmp_path: Path, tiny_target: Any, tiny_cache: CacheReader
) -> None:
    settings = {"steps": 60, "mode": "cascade", "lr": 3e-2, "calibrate_rows": 1000, "log_every": 10}
    plans = tiny.plans_for(tiny_target, "g", settings, kind="transcoder", firing="batchtopk", k=4, n_latents=64)
    results = go(plans, tmp_path)
    from thresher.train.metrics import curves

    for result in results:
        kl = curves(result.path)["kl"]
        assert kl[-1] < 0.5 * kl[0]
        assert {"kl", "ce", "ce_clean", "fvu", "l0", "dead"} <= result.metrics["final"].keys()
        assert result.metrics["settings"]["objective"] == "kl"
    # Under the frozen rule, on the patched stream: L0 is k there, as it was in training.
    from thresher.evaluate.splice import cascade_edits

    dictionaries = [load_run(result.path).dictionary for result in results]
    contexts = tiny_cache.contexts("train")
    patch, seen = torch.from_numpy(contexts.keep == 1), {}
    edits = cascade_edits(dictionaries, patch, observe=lambda i, s, codes: seen.update({i: codes.l0().double().mean()}))
    tiny_target.logits(torch.from_numpy(contexts.token_id).long(), edits)
    assert [float(seen[i]) for i in range(2)] == pytest.approx([4.0, 4.0], rel=0.02)


def test_dictionaries_of_a_group_are_trained_by_one_rank(
    go: Any, tiny_cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    end = {"steps": 2, "objective": "kl", "batch_rows": 64}
    plans = [
        plan
        for label in ("one", "two")
        for plan in plans_for(tiny_cache, label, end, kind="transcoder", firing="topk", k=3)
    ]
    groups = {label: {plan.name for plan in plans if plan.group == label} for label in ("one", "two")}
    assert all(len(names) > 1 for names in groups.values())
    go(plans, tmp_path / "alone")

    def on_its_own_model(roster: Roster) -> list[RunResult]:
        """As processes have it: ranks that are threads would put their hooks into one model."""
        spread = tmp_path / "spread"
        own = tiny.gpt2()
        return train(plans, tiny_cache, out=spread, device="cpu", console=console, target=own, roster=roster)

    outcomes = on_ranks(2, on_its_own_model)
    assert {result.name for result in outcomes[1]} in groups.values(), outcomes
    assert [path.read_bytes() for path in sorted((tmp_path / "spread").glob("*/weights.safetensors"))] == [
        path.read_bytes() for path in sorted((tmp_path / "alone").glob("*/weights.safetensors"))
    ]
