"""Real processes that share latents over gloo: two are stopped by a signal, four go on and end the run.

One interpreter loads everything once and forks the ranks of both jobs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.train.test_latent_runs import assert_close_end, sweep
from thresher.cache.reader import CacheReader
from thresher.train.run import train

JOBS = """
import json, os, signal, socket, sys
from pathlib import Path
import torch
from rich.console import Console
from tests.train.test_latent_runs import sweep
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.cache.roster import meet
from thresher.train.fit import Fit
from thresher.train.mesh import ParallelConfig
from thresher.train.run import train

out, step = Path(sys.argv[2]), Fit.step

def rank_of(name, runs, rank, parallel, stopped):
    told = []

    def watched(self, *given):
        if stopped and rank == 1 and self.done == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *given)

    Fit.step = watched
    try:
        with meet("train", "") as roster:
            cache = CacheReader.open(Path(sys.argv[1]))
            train(sweep(cache), cache, out=out / runs, device="cpu", console=Console(quiet=True), roster=roster,
                  parallel=parallel, resume=True)
    except (Interrupted, UserError) as error:
        told.append(str(error))
    (out / f"{name}-{rank}.json").write_text(json.dumps(told))

def job(name, runs, parallel, stopped=False):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children, size = [], parallel.data * parallel.latents
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            rank_of(name, runs, rank, parallel, stopped)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * size, name

job("stopped", "four", ParallelConfig(latents=2), stopped=True)
job("four", "four", ParallelConfig(data=2, latents=2))
"""


@pytest.fixture(scope="module")
def jobs(cache: CacheReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What became of all jobs, a folder each."""
    out = tmp_path_factory.mktemp("jobs")
    train(sweep(cache), cache, out=out / "alone", device="cpu", console=Console(quiet=True))
    script = out / "jobs.py"
    script.write_text(JOBS)
    root = str(Path(__file__).parent.parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    line = [sys.executable, "-W", "ignore", str(script), str(cache.path), str(out)]
    subprocess.run(line, check=True, env=environment, timeout=300)
    return out


def told(jobs: Path, name: str, ranks: int) -> list[list[str]]:
    return [json.loads((jobs / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]


def test_a_signal_to_one_stops_both_and_twice_as_many_go_on_with_half_the_rows_each(jobs: Path) -> None:
    assert all("--resume" in message for (message,) in told(jobs, "stopped", 2))
    assert told(jobs, "four", 4) == [[]] * 4
    assert_close_end(jobs / "alone", jobs / "four")
