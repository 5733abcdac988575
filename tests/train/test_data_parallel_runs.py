"""Whole runs of ranks that share the rows of every batch: as one process trains, whatever happens to one of them.

Ranks are threads here (tests/groups.py).
"""

import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console

from tests.groups import ThreadGroup, data_meshes
from tests.ranks import on_ranks
from tests.train.conftest import plans_for
from tests.train.test_exact import assert_same_end
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.cache.roster import Roster
from thresher.cache.world import World
from thresher.train.division import cells_for
from thresher.train.files import WEIGHTS, read_config
from thresher.train.fit import Fit
from thresher.train.mesh import Mesh, ParallelConfig, cell_of
from thresher.train.plan import RunPlan
from thresher.train.run import RunResult, train
from thresher.train.state import checkpoint_steps
from thresher.train.views import Inputs

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

SWEEP: dict[str, dict[str, Any]] = {
    "batch": {"kind": "clt", "firing": "batchtopk", "k": 2.5},
    "relu": {"kind": "clt", "firing": "relu", "sparsity": 3e-3},
}
STEPS = 20


def sweep(cache: CacheReader, **settings: Any) -> list[RunPlan]:
    """Batches of 250 rows, which three or four ranks cannot share evenly."""
    base = {"kernels": "plain", "batch_rows": 250, "steps": STEPS, "checkpoint_every": 7, "log_every": 5} | settings
    return [plan for label, dictionary in SWEEP.items() for plan in plans_for(cache, label, base, **dictionary)]


@pytest.fixture
def together(
    cache: CacheReader, console: Console, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[list[RunResult]]]:
    """Train the sweep on so many ranks that share all its dictionaries; what each rank returns or ends with."""

    def run(size: int, out: Path, plans: list[RunPlan] | None = None, **settings: Any) -> list[Any]:
        meshes = data_meshes(size)

        class Formed:
            def __init__(self, roster: Roster, *_: Any) -> None:
                self.mesh = meshes[roster.world.rank]

            def __enter__(self) -> Mesh:
                return self.mesh

            def __exit__(self, *_: object) -> None:
                for group in (self.mesh.data, self.mesh.everyone):
                    if isinstance(group, ThreadGroup) and _[0] is not None:
                        group.meeting.leave()

        monkeypatch.setattr("thresher.train.run.formed", Formed)

        def work(roster: Roster) -> list[RunResult]:
            chosen, parallel = plans or sweep(cache), ParallelConfig(data=size)
            return train(
                chosen, cache, out=out, device="cpu", console=console, roster=roster, parallel=parallel, **settings
            )

        return on_ranks(size, work)

    return run


@pytest.fixture(scope="module")
def alone(cache: CacheReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep from one process."""
    return train_alone(cache, tmp_path_factory.mktemp("alone"))


def train_alone(cache: CacheReader, out: Path) -> Path:
    train(sweep(cache), cache, out=out, device="cpu", console=Console(quiet=True))
    return out


def assert_close_end(left: Path, right: Path) -> None:
    """Both sweeps took the same rows and came to the same weights but for rounding."""
    for name in SWEEP:
        one, other = (read_config(out / name)["training"] for out in (left, right))
        assert (one["steps"], one["rows"]) == (other["steps"], other["rows"]) == (STEPS, STEPS * 250)
        for key in ("fvu", "l0", "dead"):
            assert one["final"][key] == pytest.approx(other["final"][key], rel=1e-3)
        assert one["held_out"]["fvu"] == pytest.approx(other["held_out"]["fvu"], rel=1e-3)
        weights, others = (safetensors.torch.load_file(out / name / WEIGHTS) for out in (left, right))
        for key, tensor in weights.items():
            torch.testing.assert_close(others[key], tensor, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")


def stop_on(rank: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask one rank to stop once the first dictionary has so many steps."""
    real = Fit.step

    def step_and_stop(self: Fit, *given: Any) -> torch.Tensor:
        norm = real(self, *given)
        if self.mesh.data.index == rank and self.done == step:
            self.agreement._flag.requested = True
        return norm

    monkeypatch.setattr(Fit, "step", step_and_stop)


def assert_stopped(ended: list[Any], step: int) -> None:
    """All ranks did at the same step; one that ends first may become the reason of another."""
    for error in ended:
        assert isinstance(error, (Interrupted, UserError))
        assert f"Training stopped at step {step} with 2 runs saved" in str(error)


def test_ranks_train_what_one_process_trains(alone: Path, tmp_path: Path, together: Callable[..., Any]) -> None:
    results = together(3, tmp_path)
    assert [[(r.name, r.status) for r in own] for own in results] == [[(name, "trained") for name in SWEEP]] * 3
    assert_close_end(alone, tmp_path)
    lines = [(path / name / "metrics.jsonl").read_text().count("\n") for path in (alone, tmp_path) for name in SWEEP]
    assert lines == [STEPS // 5] * 4  # one rank writes


def test_what_cannot_be_shared_is_refused_and_a_process_alone_shares_nothing() -> None:
    told, parallel = Console(file=io.StringIO(), width=200), ParallelConfig(data=2, latents=2)
    assert cells_for(parallel, ["e2e"], World(), told) == 1
    assert "this one trains alone" in told.file.getvalue()
    assert cells_for(parallel, [], World(rank=1, size=8), told) == 2
    assert [cell_of(World(rank=rank, size=8), parallel) for rank in range(8)] == [0] * 4 + [1] * 4
    with pytest.raises(UserError, match="2 × 2 = 4, but 6 processes were started"):
        cells_for(parallel, [], World(size=6), told)
    with pytest.raises(UserError, match="'e2e' is trained through the language model"):
        cells_for(parallel, ["e2e"], World(size=4), told)


def test_all_stop_when_one_is_asked_to_and_go_on_bit_for_bit(
    cache: CacheReader, tmp_path: Path, together: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    together(2, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_on(1, 11, patch)
        ended = together(2, tmp_path / "parts")
    assert_stopped(ended, 11)
    assert {name: checkpoint_steps(tmp_path / "parts" / name)[-1] for name in SWEEP} == dict.fromkeys(SWEEP, 11)
    together(2, tmp_path / "parts", resume=True)
    assert_same_end(sweep(cache), tmp_path / "whole", tmp_path / "parts")


def test_another_number_of_ranks_goes_on(
    alone: Path, tmp_path: Path, together: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, step in ((2, 6), (4, 12)):
        with monkeypatch.context() as patch:
            stop_on(size - 1, step, patch)
            assert_stopped(together(size, tmp_path, resume=True), step)
    together(1, tmp_path, resume=True)
    assert_close_end(alone, tmp_path)


def test_what_is_not_finite_on_one_rank_is_set_aside_on_all_and_the_others_go_on(
    alone: Path, tmp_path: Path, together: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Fit.step

    def poisoned(self: Fit, inputs: Any, *given: Any) -> torch.Tensor:
        if self.plan.name == "batch" and self.done == 8 and self.mesh.data.index == 1:
            inputs = Inputs([x * math.nan for x in inputs.xs], inputs.ys)
        return real(self, inputs, *given)

    monkeypatch.setattr(Fit, "step", poisoned)
    results = together(2, tmp_path)
    assert [[r.status for r in own] for own in results] == [["failed", "trained"]] * 2
    failed = read_config(tmp_path / "batch")["training"]
    assert (failed["steps"], failed["failed"]) == (8, "step 9: the loss or its gradient is not finite")
    saved = safetensors.torch.load_file(tmp_path / "batch/checkpoints/step-00000008.safetensors")
    assert all(bool(t.isfinite().all()) for name, t in saved.items() if "threshold" not in name)


@pytest.mark.parametrize("place", ["thresher.train.parts._sums", "thresher.train.fit.losses"])
def test_lack_of_memory_on_one_rank_sets_the_run_aside_on_all(
    tmp_path: Path, together: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, place: str, cache: CacheReader
) -> None:
    module, name = place.rsplit(".", 1)
    real = getattr(__import__(module, fromlist=[name]), name)
    taken: dict[Any, int] = {}

    def exhausted(coder: Any, *given: Any) -> Any:
        taken[coder] = taken.get(coder, 0) + 1
        if (
            coder.label == "batch"
            and taken[coder] == 4
            and min(id(one) for one in taken if one.label == "batch") == id(coder)
        ):
            raise MemoryError("no room")
        return real(coder, *given)

    monkeypatch.setattr(place, exhausted)
    plans = [
        plan for label, d in SWEEP.items() for plan in plans_for(cache, label, {"steps": 8}, **(d | {"dead_after": 1}))
    ]
    results = together(2, tmp_path, plans)
    assert [[r.status for r in own] for own in results] == [["failed", "trained"]] * 2
    assert "ran out of memory" in read_config(tmp_path / "batch")["training"]["failed"]


def test_an_error_of_one_rank_ends_the_job_with_its_reason_and_checkpoints_are_whole(
    alone: Path, tmp_path: Path, together: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Fit.step

    def full(self: Fit, *given: Any) -> torch.Tensor:
        if self.mesh.data.index == 1 and self.done == 9:
            raise UserError("the disk is full")
        return real(self, *given)

    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "step", full)
        first, second = together(2, tmp_path)
    assert time.monotonic() - began < 30
    assert str(second) == "the disk is full"
    assert isinstance(first, UserError)
    assert "Rank 1 of 2 ended: the disk is full." in str(first)
    assert "What was saved before is whole" in str(first)
    assert [checkpoint_steps(tmp_path / name) for name in SWEEP] == [[7], [7]]
    together(2, tmp_path, resume=True)
    assert_close_end(alone, tmp_path)
