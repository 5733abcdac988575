"""A sweep spread over ranks comes to the bits of one process, whatever becomes of a rank on the way."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.ranks import on_ranks
from tests.train.conftest import plans_for
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.cache.roster import Roster
from thresher.train.division import Work, division, work
from thresher.train.files import WEIGHTS, read_config
from thresher.train.fit import Fit
from thresher.train.metrics import METRICS
from thresher.train.plan import RunPlan
from thresher.train.run import RunResult, train
from thresher.train.state import latest_position

SWEEP: dict[str, dict[str, Any]] = {
    "sae": {"kind": "sae", "firing": "topk", "k": 3},
    "batch": {"kind": "transcoder", "firing": "batchtopk", "k": 2.5},
    "clt": {"kind": "clt", "firing": "jumprelu", "sparsity": 3e-3},
}
"""Five dictionaries, of unlike cost."""


def sweep(cache: CacheReader) -> list[RunPlan]:
    plain = {"kernels": "plain"}  # a new process loads them in a fifth of the time
    return [plan for label, settings in SWEEP.items() for plan in plans_for(cache, label, plain, **settings)]


def bits(folder: Path) -> dict[str, tuple[bytes, str, Any]]:
    """What came of every run: weights, metrics, and what its config.json says of the outcome."""
    found = {}
    for path in sorted(folder.iterdir()):
        training = read_config(path)["training"]
        told = {key: training[key] for key in ("finished", "steps", "rows", "final", "held_out")}
        found[path.name] = ((path / WEIGHTS).read_bytes(), (path / METRICS).read_text(), told)
    return found


def weights(folder: Path) -> dict[str, tuple[Any, ...]]:
    """The same of runs that were stopped between: means over log intervals begin anew where they go on."""
    held_out = {name: told["held_out"] for name, (_, _, told) in bits(folder).items()}
    return {name: (found[0], held_out[name]["fvu"], held_out[name]["l0"]) for name, found in bits(folder).items()}


@pytest.fixture(scope="module")
def whole(cache: CacheReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep from one process."""
    out = tmp_path_factory.mktemp("whole")
    train(sweep(cache), cache, out=out, device="cpu", console=Console(quiet=True))
    return out


def spread(cache: CacheReader, out: Path, console: Console, **settings: Any) -> Callable[[Roster], list[RunResult]]:
    return lambda roster: train(sweep(cache), cache, out=out, device="cpu", console=console, roster=roster, **settings)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_come_to_the_bits_of_one_process(
    cache: CacheReader, whole: Path, tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Console(file=io.StringIO(), width=200)
    first, *others = on_ranks(size, spread(cache, tmp_path, told))
    names = [plan.name for plan in sweep(cache)]
    assert [result.name for result in first] == names
    assert {result.status for result in first} == {"trained"}
    assert sorted(result.name for results in others for result in results) == sorted(set(names) - of_first(told, first))
    assert bits(tmp_path) == bits(whole)
    assert "All 5 dictionaries" in told.file.getvalue()
    assert capsys.readouterr().out.count(f" of {size}: ") == size - 1


def of_first(told: Console, results: Sequence[RunResult]) -> set[str]:
    """Names in the table of the pass that rank 0 ran itself."""
    table = told.file.getvalue().split("All 5")[0]
    return {result.name for result in results if result.name in table}


def test_a_rank_without_a_share_says_so_and_ends_well(
    cache: CacheReader, tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    (plan,) = plans_for(cache, "clt", {"steps": 3}, **SWEEP["clt"])
    outcomes = on_ranks(
        2, lambda roster: train([plan], cache, out=tmp_path, device="cpu", console=console, roster=roster)
    )
    assert [[result.name for result in results] for results in outcomes] == [["clt"], []]
    assert "Rank 1 of 2: no dictionary is left for it to train." in capsys.readouterr().out


def test_what_is_finished_is_reused_and_what_is_left_is_divided(
    cache: CacheReader, whole: Path, tmp_path: Path, console: Console
) -> None:
    train(sweep(cache)[:2], cache, out=tmp_path, device="cpu", console=console)
    first, second = on_ranks(2, spread(cache, tmp_path, console))
    assert [result.status for result in first] == ["reused", "reused", "trained", "trained", "trained"]
    assert second
    assert bits(tmp_path) == bits(whole)


def test_a_dictionary_that_fails_on_another_rank_is_named_by_rank_0(
    cache: CacheReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, told = Fit.step, Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(
        Fit, "step", lambda self, *given: real(self, *given) * (math.nan if self.plan.name == "t-L01" else 1.0)
    )
    plans = plans_for(cache, "t", {"steps": 4}, kind="transcoder", firing="topk", k=3)
    first, _ = on_ranks(2, lambda roster: train(plans, cache, out=tmp_path, device="cpu", console=told, roster=roster))
    assert {result.name: result.status for result in first} == {"t-L00": "trained", "t-L01": "failed"}
    table = told.file.getvalue().split("All 2 dictionaries")[1]
    assert ["failed" in line for line in table.splitlines() if "t-L0" in line] == [False, True]


def test_units_stay_together_and_the_costliest_is_alone() -> None:
    pieces = [Work("a", "one", 4), Work("b", "two", 3), Work("c", "two", 3), Work("d", "three", 1)]
    assert division(pieces, 2) == {"b": 0, "c": 0, "a": 1, "d": 1}


def test_cost_is_what_is_left_to_do(cache: CacheReader, tmp_path: Path, console: Console) -> None:
    (plan,) = plans_for(cache, "clt", {"steps": 40}, **SWEEP["clt"])
    (before,) = work([plan], [40], tmp_path)
    assert before == Work("clt", "run clt", 40 * 256 * plan.spec.row_work * 2)
    (tmp_path / "clt" / "checkpoints").mkdir(parents=True)
    record = {"version": 2, "step": 30, "position": 30 * 256}
    (tmp_path / "clt" / "checkpoints" / "step-00000030.json").write_text(json.dumps(record))
    (after,) = work([plan], [40], tmp_path)
    assert after.cost == before.cost // 4


def test_an_unfinished_run_needs_resume_on_every_number_of_ranks(
    cache: CacheReader, whole: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Fit.step

    def full(self: Fit, *arguments: Any) -> torch.Tensor:
        if self.plan.name == "clt" and self.done == 20:
            raise UserError("the disk is full")
        time.sleep(0.01)  # so that the other rank is still at work
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "step", full)
        outcomes = on_ranks(2, spread(cache, tmp_path, console))
    (failed,) = (rank for rank in (0, 1) if str(outcomes[rank]) == "the disk is full")
    assert isinstance(outcomes[1 - failed], (UserError, Interrupted))
    assert not any(read_config(path)["training"]["finished"] for path in tmp_path.iterdir())
    refusal, other = on_ranks(2, spread(cache, tmp_path, console))
    assert "Add --resume" in str(refusal)
    assert isinstance(other, Interrupted)
    first, *_ = on_ranks(4, spread(cache, tmp_path, console, resume=True))
    assert [result.status for result in first] == ["trained"] * 5
    assert weights(tmp_path) == weights(whole)


HARMED = """
import os, signal, sys, time
from pathlib import Path
from rich.console import Console
from tests.train.test_ranks import sweep
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.cache.progress import Bounds
from thresher.cache.roster import Roster, meet
from thresher.train.fit import Fit
from thresher.train.run import train

cache, out, harm = CacheReader.open(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
reached = out.with_name("reached")
step = Fit.step

def watched(self, *arguments):
    if roster.world.restarts == 0 and self.done == 20:
        if roster.world.rank == 1:
            while not reached.exists():
                time.sleep(0.01)
            if harm == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        reached.touch()
        while not roster.stopping:
            time.sleep(0.01)
    return step(self, *arguments)

Fit.step = watched
met = meet("train", "")
try:
    with Roster(met.world, met._store, beat_s=0.2, grace_s=6.0, bounds=Bounds(2.0, 60.0), again="") as roster:
        resume = roster.world.restarts > 0
        train(sweep(cache), cache, out=out, device="cpu", console=Console(), roster=roster, resume=resume)
except (Interrupted, UserError) as error:
    sys.exit(str(error))
"""


def torchrun(folder: Path, cache: CacheReader, restarts: int, harm: str) -> subprocess.CompletedProcess[str]:
    """The sweep on two ranks into `folder`/runs; in the first attempt the second rank dies or hangs at its step 20."""
    script = folder / "harmed.py"
    script.write_text(HARMED)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    root = str(Path(__file__).parent.parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    line = [sys.executable, *launch, str(script), str(cache.path), str(folder / "runs"), harm]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, timeout=120)
    if harm == "kill":
        assert f"exitcode: -{int(signal.SIGKILL)}" in done.stderr, done.stderr
    else:
        assert done.stderr.count("Rank 1 of 2 hangs: it has made no progress for ") == 1, done.stderr
    return done


@pytest.mark.parametrize("harm", ["kill", pytest.param("hang", marks=pytest.mark.long)])  # tests/cache/test_hanging.py
def test_the_others_save_and_end_when_a_rank_comes_to_harm_and_any_number_of_ranks_goes_on(
    cache: CacheReader, whole: Path, tmp_path: Path, console: Console, harm: str
) -> None:
    done = torchrun(tmp_path, cache, 0, harm)
    assert done.returncode != 0
    assert "Training stopped at step" in done.stderr
    runs = tmp_path / "runs"
    assert not any(read_config(path)["training"]["finished"] for path in runs.iterdir())
    assert {latest_position(path)[0] for path in runs.iterdir()} == {15, 21}
    first, *_ = on_ranks(3, spread(cache, runs, console, resume=True))
    assert [result.status for result in first] == ["trained"] * 5
    assert weights(runs) == weights(whole)


@pytest.mark.long
@pytest.mark.parametrize("harm", ["kill", "hang"])
def test_torchrun_starts_anew_after_harm_and_comes_to_the_same_bits(
    cache: CacheReader, whole: Path, tmp_path: Path, harm: str
) -> None:
    done = torchrun(tmp_path, cache, 1, harm)
    assert done.returncode == 0, done.stderr
    assert "All 5 dictionaries" in done.stdout
    assert weights(tmp_path / "runs") == weights(whole)
