"""Real processes that share dictionaries over gloo: 1, 2 and 4 of them, and one that is killed.

One interpreter loads and compiles everything once, in the job of one process, and forks the ranks of all others.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_data_parallel_runs import SWEEP, assert_close_end
from thresher.cache.reader import CacheReader
from thresher.train.state import checkpoint_steps

JOBS = """
import hashlib, json, os, signal, socket, sys, time
from pathlib import Path
import torch
from torch.distributed import TCPStore
from rich.console import Console
from tests.train.test_data_parallel_runs import sweep
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.cache.roster import Roster
from thresher.cache.world import World
from thresher.train.fit import Fit
from thresher.train.mesh import ParallelConfig
from thresher.train.run import train

def rank_of(folder, runs, rank, size, data, port, killed):
    told, began = {}, time.monotonic()
    deployed, step = Fit.deployed, Fit.step

    def noted(self):
        bits = b"".join(t.numpy().tobytes() for _, t in sorted(self.checkpoint().tensors.items()))
        told[self.plan.name] = [hashlib.sha256(bits).hexdigest(), self.mesh.data.collectives]
        return deployed(self)

    def watched(self, *given):
        if killed and rank == 1 and self.done == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *given)

    Fit.deployed, Fit.step = noted, watched
    try:
        store = TCPStore("127.0.0.1", port, size, rank == 0, wait_for_workers=False) if size > 1 else None
        with Roster(World(rank=rank, size=size), store, beat_s=0.2, patience_s=5.0 if killed else 60.0) as roster:
            cache = CacheReader.open(Path(sys.argv[1]))
            train(sweep(cache), cache, out=runs, device="cpu", console=Console(quiet=True), roster=roster,
                  parallel=ParallelConfig(data=data), resume=True)
    except (Interrupted, UserError) as error:
        told["error"] = str(error)
    told["seconds"] = time.monotonic() - began
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))

def job(name, runs, size, data=None, killed=False):
    folder = out / name
    folder.mkdir()
    if size == 1:
        rank_of(folder, out / runs / "runs", 0, 1, 1, 0, False)
        return [0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            rank_of(folder, out / runs / "runs", rank, size, data or size, port, killed)
            os._exit(0)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]

out = Path(sys.argv[2])
ended = {f"{size}": job(f"{size}", f"{size}", size) for size in (1, 2, 4)}
ended["pairs"] = job("pairs", "pairs", 4, data=2)
ended["killed"] = job("killed", "killed", 2, killed=True)
ended["after"] = job("after", "killed", 2)
(out / "ended.json").write_text(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def jobs(cache: CacheReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What became of all jobs, a folder each."""
    out = tmp_path_factory.mktemp("jobs")
    script = out / "jobs.py"
    script.write_text(JOBS)
    root = str(Path(__file__).parent.parent.parent)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([root, *sys.path]),
    }
    line = [sys.executable, "-W", "ignore", str(script), str(cache.path), str(out)]
    subprocess.run(line, check=True, env=environment, timeout=500)
    return out


def told(jobs: Path, name: str, rank: int) -> dict[str, Any]:
    return dict(json.loads((jobs / name / f"rank-{rank}.json").read_text()))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_train_what_one_process_trains(jobs: Path, size: int) -> None:
    assert json.loads((jobs / "ended.json").read_text())[str(size)] == [0] * size
    assert_close_end(jobs / "1" / "runs", jobs / str(size) / "runs")
    every = [told(jobs, str(size), rank) for rank in range(size)]
    assert all(one.keys() == {*SWEEP, "seconds"} for one in every)
    for name in SWEEP:
        assert len({tuple(one[name]) for one in every}) == 1  # the same bits after as many collectives
    assert (every[0]["relu"][1] > 0) == (size > 1)


def test_cells_train_a_share_of_the_sweep_each_with_the_bits_of_one_cell_alone(jobs: Path) -> None:
    assert json.loads((jobs / "ended.json").read_text())["pairs"] == [0] * 4
    every = [told(jobs, "pairs", rank) for rank in range(4)]
    assert [sorted(one.keys() - {"seconds"}) for one in every] == [["batch"], ["batch"], ["relu"], ["relu"]]
    alone = told(jobs, "2", 0)
    assert all(one[name][0] == alone[name][0] for one in every for name in SWEEP if name in one)


def test_the_others_end_with_the_name_of_a_rank_that_is_killed_and_go_on_exactly(jobs: Path) -> None:
    ended = json.loads((jobs / "ended.json").read_text())
    assert ended["killed"] == [0, int(signal.SIGKILL)]
    said = told(jobs, "killed", 0)
    assert "Rank 1 of 2 has died or hangs" in said["error"]
    assert "What was saved before is whole" in said["error"]
    assert said["seconds"] < 60
    assert ended["after"] == [0, 0]
    for name in SWEEP:
        ours, others = (jobs / folder / "runs" / name for folder in ("killed", "2"))
        file = f"checkpoints/step-{max(checkpoint_steps(ours)):08d}.safetensors"
        assert (ours / file).read_bytes() == (others / file).read_bytes()
