"""Whole runs of ranks that share latents: as one process trains, whatever number of ranks goes on with them.

Ranks are threads here (tests/groups.py).
"""

import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console

from tests.groups import latent_meshes, side_by_side
from tests.train.conftest import plans_for, stop_at
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.train import run as running
from thresher.train.files import WEIGHTS, load_run, read_config
from thresher.train.fit import Fit
from thresher.train.mesh import Mesh
from thresher.train.plan import RunPlan
from thresher.train.run import RunResult, train
from thresher.train.state import checkpoint_steps

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

SWEEP: dict[str, dict[str, Any]] = {
    "sae": {"kind": "sae", "firing": "topk", "k": 3, "pre_bias": True, "normalise": "per_token", "layers": (1,)},
    "clt": {"kind": "clt", "firing": "batchtopk", "k": 2.5, "pool": "joint", "rank_by": "norm", "skip": True},
    "cross": {"kind": "crosscoder", "firing": "jumprelu", "sparsity": 3e-3, "preact": 1e-4},
}
STEPS, CLOSE = 9, {"rtol": 1e-4, "atol": 1e-5}
"""How close runs in float32 stay that sum in other orders, over so many steps."""


def sweep(cache: CacheReader) -> list[RunPlan]:
    base = {"kernels": "plain", "steps": STEPS, "checkpoint_every": 4, "log_every": 3}
    settings = {"n_latents": 50, "dead_after": 700}
    return [plan for label, kind in SWEEP.items() for plan in plans_for(cache, label, base, **(settings | kind))]


def together(
    cache: CacheReader, size: int, out: Path, data: int = 1, plans: list[RunPlan] | None = None, **settings: Any
) -> list[RunResult]:
    """Train the sweep on so many ranks; what the first one returns."""
    told = {"out": out, "device": "cpu", "console": Console(quiet=True)} | settings
    if size * data == 1:
        return train(plans or sweep(cache), cache, **told)

    def work(mesh: Mesh) -> list[RunResult]:
        return train(plans or sweep(cache), cache, roster=_Known(mesh), **told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "formed", _formed)
        first: list[RunResult] = side_by_side(work, latent_meshes(size, data))[0]
    return first


class _Known(running.Roster):
    """One rank alone for the roster, which has a mesh all the same."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh


@contextmanager
def _formed(roster: Any, *_: object) -> Any:
    yield roster.mesh if isinstance(roster, _Known) else Mesh()


def tensors(run: Path, name: str = WEIGHTS) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / name)


def header(file: Path) -> bytes:
    """What a safetensors file says of its tensors."""
    data = file.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def assert_close_end(left: Path, right: Path) -> None:
    """The same files, with the same tensors but for rounding."""
    assert sorted(path.name for path in left.iterdir()) == sorted(path.name for path in right.iterdir())
    for path in left.iterdir():
        ours, theirs = read_config(path)["training"], read_config(right / path.name)["training"]
        assert ours["held_out"]["l0"] == pytest.approx(theirs["held_out"]["l0"], rel=1e-2)
        assert ours["held_out"]["fvu"] == pytest.approx(theirs["held_out"]["fvu"], rel=1e-4)
        assert checkpoint_steps(path) == checkpoint_steps(right / path.name)
        last = f"checkpoints/step-{STEPS:08d}.safetensors"
        for file in (WEIGHTS, last):
            assert header(path / file) == header(right / path.name / file)
            found = tensors(right / path.name, file)
            for name, tensor in tensors(path, file).items():
                if "tokens_since_fired" not in name and not name.startswith("optimiser"):
                    torch.testing.assert_close(found[name], tensor, **CLOSE, equal_nan=True, msg=f"{path.name} {name}")


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The last rank is asked to stop when the first dictionary has done so many steps."""
    real = Fit.step

    def stepped(self: Fit, *given: Any) -> torch.Tensor:
        if self.done == step - 1 and self.mesh.everyone.index == self.mesh.everyone.size - 1:
            self.agreement._flag.requested = True
        return real(self, *given)

    monkeypatch.setattr(Fit, "step", stepped)


@pytest.fixture(scope="module")
def whole(cache: CacheReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep from one process."""
    out = tmp_path_factory.mktemp("whole")
    together(cache, 1, out)
    return out


@pytest.fixture(scope="module")
def in_three(cache: CacheReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep from three ranks."""
    out = tmp_path_factory.mktemp("three")
    assert {result.status for result in together(cache, 3, out)} == {"trained"}
    return out


@pytest.fixture(scope="module")
def stopped(cache: CacheReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep from three ranks, of which one was asked to stop."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Interrupted, match="--resume"):
            together(cache, 3, out)
    return out


def test_three_ranks_write_the_run_of_one_process(whole: Path, in_three: Path) -> None:
    assert_close_end(whole, in_three)
    assert load_run(in_three / "clt").dictionary.n_latents == 50


def test_a_stop_leaves_whole_checkpoints_alone(stopped: Path) -> None:
    for path in stopped.iterdir():
        assert checkpoint_steps(path) == [4, 6]
        assert [file.suffix for file in sorted((path / "checkpoints").iterdir())] == [".json", ".safetensors"] * 2


def test_resume_equals_uninterrupted_bit_for_bit_on_as_many_ranks(
    cache: CacheReader, in_three: Path, stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "runs")
    together(cache, 3, tmp_path / "runs", resume=True)
    for path in in_three.iterdir():
        for file in (WEIGHTS, f"checkpoints/step-{STEPS:08d}.safetensors"):
            assert (path / file).read_bytes() == (tmp_path / "runs" / path.name / file).read_bytes(), path.name


@pytest.mark.parametrize("goes_on", [(2, 2), (1, 1)])
def test_any_number_of_ranks_goes_on_from_a_checkpoint(
    cache: CacheReader, whole: Path, stopped: Path, tmp_path: Path, goes_on: tuple[int, int]
) -> None:
    shutil.copytree(stopped, tmp_path / "runs")
    latents, data = goes_on
    together(cache, latents, tmp_path / "runs", data, resume=True)
    assert_close_end(whole, tmp_path / "runs")


def test_a_run_of_one_process_is_gone_on_with_in_shares(
    cache: CacheReader, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Interrupted):
            together(cache, 1, tmp_path)
    together(cache, 2, tmp_path, resume=True)
    assert_close_end(whole, tmp_path)


def test_fine_tuning_takes_each_ranks_latents_of_the_parent(cache: CacheReader, whole: Path, tmp_path: Path) -> None:
    base = {"kernels": "plain", "steps": 3, "init_from": str(whole / "clt")}
    (plan,) = plans_for(cache, "child", base, n_latents=50, kind="clt", skip=True, firing="jumprelu", sparsity=3e-3)
    for size in (1, 3):
        together(cache, size, tmp_path / str(size), plans=[plan])
    left, right = (tensors(tmp_path / size / "child") for size in ("1", "3"))
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, **CLOSE, msg=name)


def test_a_gradient_that_is_not_finite_on_one_rank_sets_the_run_aside_on_all(
    cache: CacheReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Fit._gradients

    def broken(self: Fit, *given: Any) -> Any:
        found = real(self, *given)
        if self.done == 4 and self.mesh.latents.index == 1:
            self.coder.encoder(0).b_enc.grad.fill_(torch.nan)
        return found

    monkeypatch.setattr(Fit, "_gradients", broken)
    plans = [plan for plan in sweep(cache) if plan.name == "clt"]
    (result,) = together(cache, 2, tmp_path, plans=plans)
    assert result.status == "failed"
    assert "step 5: the loss or its gradient is not finite" in result.metrics["failed"]
    assert checkpoint_steps(tmp_path / "clt") == [4]


def test_what_cannot_be_shared_ends_the_job_before_any_step(cache: CacheReader, tmp_path: Path) -> None:
    (plan,) = plans_for(cache, "gm", kind="sae", firing="groupmax", k=2, n_latents=50, layers=(1,))
    with pytest.raises(UserError, match=r"parallel.latents is 3, but the dictionary has only 2 groups"):
        together(cache, 3, tmp_path, plans=[plan])
