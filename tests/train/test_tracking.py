"""Training in Weights & Biases, offline, read back from what it wrote; and that nothing of it is needed without."""

import ast
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from tests.train.conftest import RULES, plans_for, stop_at
from tests.train.wandb_file import Logged, logged
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.train.files import read_config, weights_hash
from thresher.train.metrics import FILES
from thresher.train.run import train
from thresher.train.state import drop_checkpoints
from thresher.train.tracking import Labels, artifact_name, begin, begin_training, check_trial, point, trial

ROOT = Path(__file__).parents[2]
RECIPE = {"dictionary": {"firing": "topk", "k": 3}, "train": {"lr": 0.003}}


@pytest.fixture(scope="module")
def sweep(cache: CacheReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLT that was stopped after step 12 of 20, lost what was saved then, and went on from step 8."""
    out = tmp_path_factory.mktemp("tracked") / "my sweep"
    steps = {"steps": 20, "log_every": 4, "checkpoint_every": 8}
    (plan,) = plans_for(cache, "clt topk", steps, kind="clt", **RULES["topk"])
    plan = plan._replace(recipe=RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_PROJECT", raising=False)
        console = Console(quiet=True)
        stop_at(patch, 12)
        with pytest.raises(Interrupted):
            train([plan], cache, out=out, device="cpu", wandb="offline", console=console)
        drop_checkpoints(out / plan.name, after=8)
        train([plan], cache, out=out, device="cpu", wandb="offline", resume=True, console=console)
    return out


@pytest.fixture(scope="module")
def segments(sweep: Path) -> list[Logged]:
    return logged(sweep / "clt topk")


def test_every_line_of_the_log_is_a_point_over_steps_and_once(sweep: Path, segments: list[Logged]) -> None:
    lines = [json.loads(line) for line in (sweep / "clt topk" / "metrics.jsonl").read_text().splitlines()]
    points = [point for segment in segments for point in segment.history if "step" in point]
    assert [point["step"] for point in points] == [line["step"] for line in lines] == [4, 8, 12, 16, 20]
    for line, found in zip(lines, points, strict=True):
        assert found["train/fvu"] == line["fvu"]
        assert found["fvu/L01"] == line["fvu.L01"]
        assert found["optimiser/lr"] == line["lr"]
    for name in ("train/*", "optimiser/*", "fvu/*", "l0/*", "dead/*"):
        assert segments[0].metrics[name].step_metric == "step"
    assert segments[0].metrics["train/fvu"].summary.min


def test_a_run_that_goes_on_keeps_its_id_and_is_unfinished_in_between(segments: list[Logged]) -> None:
    first, second = segments
    assert first.run.run_id == second.run.run_id
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert second.run.resume


def test_the_run_is_called_and_grouped_and_told_its_recipe(segments: list[Logged], cache: CacheReader) -> None:
    run, config = segments[0].run, segments[0].config
    assert (run.project, run.display_name, run.run_group) == ("thresher", "clt topk", "my sweep")
    assert (run.job_type, list(run.tags)) == ("train", ["clt", "topk"])
    assert {table: config[table] for table in RECIPE} == RECIPE
    assert config["run"]["reads"] == ["L00.mlp_in", "L01.mlp_in"]
    assert config["cache"] == {"fingerprint": cache.fingerprint}


def test_the_summary_is_what_config_json_says(sweep: Path, segments: list[Logged]) -> None:
    training, summary = read_config(sweep / "clt topk")["training"], segments[-1].summary
    for key in ("fvu", "l0"):
        by_layer = training["held_out"][key]
        assert summary[f"held_out/{key}"] == sum(by_layer) / 2
        assert summary[f"held_out/{key}/L01"] == by_layer[1]
    assert (summary["status"], summary["rows"]) == ("finished", training["rows"])


def test_the_run_directory_is_an_artifact_that_rests_on_the_cache(
    sweep: Path, segments: list[Logged], cache: CacheReader
) -> None:
    path = sweep / "clt topk"
    (made,) = segments[-1].artifacts["dictionary"]
    about = json.loads(made.metadata)
    assert (made.name, made.use_after_commit) == ("clt_topk", False)
    assert (about["kind"], about["firing"], about["writes"]) == ("clt", "topk", ["L00.mlp_out", "L01.mlp_out"])
    assert about["weights_sha256"] == weights_hash(path) == segments[-1].summary["weights_sha256"]
    held = {entry.path: Path(entry.local_path) for entry in made.manifest.contents}
    assert held == {name: path / name for name in ("config.json", "weights.safetensors", "metrics.jsonl")}
    (used,) = segments[0].artifacts["cache"]
    assert used.use_after_commit
    assert used.name == f"cache-{cache.fingerprint[:12]}"
    assert {entry.path for entry in used.manifest.contents} == {"MANIFEST.json", "zarr.json", "identity.json"}
    assert "dictionary" not in segments[0].artifacts


def test_steps_that_were_done_without_wandb_are_told_when_it_comes_in(
    tmp_path: Path, cache: CacheReader, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan,) = plans_for(cache, "clt", {"steps": 6, "log_every": 2}, kind="clt", **RULES["topk"])
    stop_at(monkeypatch, 4)
    with pytest.raises(Interrupted):
        train([plan], cache, out=tmp_path, device="cpu", console=console)
    train([plan], cache, out=tmp_path, device="cpu", wandb="offline", resume=True, console=console)
    (segment,) = logged(tmp_path / "clt")
    assert [point["step"] for point in segment.history] == [2, 4, 6]


def test_a_run_that_fails_says_so(tmp_path: Path, cache: CacheReader, console: Console) -> None:
    (plan,) = plans_for(cache, "clt", {"steps": 3, "lr": 1e30, "warmup": 0, "clip": 1e30}, kind="clt", **RULES["topk"])
    (result,) = train([plan], cache, out=tmp_path, device="cpu", wandb="offline", console=console)
    assert result.status == "failed"
    (segment,) = logged(result.path)
    assert (segment.exit_code, segment.summary["status"]) == (1, "failed")
    assert "not finite" in segment.summary["failed"]
    assert "dictionary" not in segment.artifacts


def test_a_wandb_that_cannot_be_started_is_told_in_one_paragraph(
    tmp_path: Path, cache: CacheReader, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def broken(**settings: object) -> None:
        raise wandb.errors.CommError("no account\nat all")

    monkeypatch.setattr(wandb, "init", broken)
    (plan,) = plans_for(cache, "clt", {"steps": 3}, kind="clt", **RULES["topk"])
    with pytest.raises(UserError, match=r"could not be started in mode 'online' for run 'clt': no account at all\."):
        train([plan], cache, out=tmp_path, device="cpu", wandb="online", console=console)
    assert not (tmp_path / "clt").exists()


def test_disabled_nothing_of_wandb_is_imported(
    tmp_path: Path, cache: CacheReader, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    (plan,) = plans_for(cache, "clt", {"steps": 2, "log_every": 1}, kind="clt", **RULES["topk"])
    (result,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
    assert result.status == "trained"
    assert sorted(path.name for path in result.path.iterdir()) == sorted(["checkpoints", *FILES])
    for path in (path for room in ("train", "sharing", "commands") for path in sorted((ROOT / room).glob("*.py"))):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            named = [alias.name for alias in getattr(statement, "names", [])] + [getattr(statement, "module", "")]
            assert not any((name or "").startswith("wandb") for name in named), f"{path} imports wandb when imported"


def test_names_are_what_wandb_takes() -> None:
    assert artifact_name("topk/k=8 é-L00") == "topk_k_8__-L00"
    assert len(artifact_name("x" * 200)) == 128
    line = {"step": 3, "rows": 9, "lr": 0.1, "fvu": 0.5, "fvu.L00": 0.4, "l0.S1": 2.0, "penalty": None}
    assert point(line) == {
        "step": 3, "train/rows": 9, "optimiser/lr": 0.1, "train/fvu": 0.5, "fvu/L00": 0.4, "l0/S1": 2.0,
    }  # fmt: skip


def test_a_trial_of_an_agent_is_one_run_under_the_agents_id(
    tmp_path: Path, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "swp")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    assert trial() is None
    check_trial(["a", "b"])
    monkeypatch.setenv("WANDB_RUN_ID", "run7")
    assert trial() == "swp-run7"
    with pytest.raises(UserError, match=r"the recipe makes 2 dictionaries \(a, b\)"):
        check_trial(["a", "b"])
    check_trial(["a"])
    told: dict[str, Any] = {}
    monkeypatch.setattr("wandb.init", lambda **settings: told.update(settings) or MagicMock())
    path = tmp_path / "mine" / "swp-run7" / "clt"
    begin_training(path, read_config(sweep / "clt topk"), "online")
    assert (told["id"], told["resume"], told["group"]) == (None, None, "mine")
    assert not path.exists()


def test_its_files_go_where_the_run_is_though_its_service_was_started_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder / "run").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / folder)
        begin(Path("run"), Labels(folder, "group", "train", ()), {}, "offline", None).finish(failed=False)
        assert list((tmp_path / folder / "run").glob("wandb/offline-run-*/run-*.wandb"))
