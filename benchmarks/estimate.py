"""Whether training takes the memory and the time that `thresher estimate` says, at sizes that run here.

    python benchmarks/estimate.py [--case NAME] [--runs 3] [--steps 20] [--only memory]

Every run is a process of its own on one thread, on random rows from a cache of its own. Memory is the growth of its
resident memory, files left out, from before the training to its peak; what was imported and compiled before does not
count. The bar is on the median.

Time is the median of a dictionary's steps, all dictionaries together, against what follows from a product and a copy
timed in the same process (as under `--measure`). The model knows neither caches nor an interpreter nor how far a loop
falls short of a copy, so there is no bar; the ratio says what it leaves out on this machine.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from thresher.cache.contracts import Site
from thresher.cache.hardware import gpu
from thresher.cache.layout import Contexts
from thresher.cache.process import prepare_process
from thresher.cache.reader import CacheReader
from thresher.cache.writer import CacheWriter
from thresher.train.config import TrainConfig
from thresher.train.costs.layout import Layout
from thresher.train.costs.measure import measure
from thresher.train.costs.memory import Assumed, memory
from thresher.train.costs.sizes import sizes_of
from thresher.train.costs.work import step
from thresher.train.crew import give_back_freed_memory
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.fit import Fit
from thresher.train.plan import RunPlan, plan_runs
from thresher.train.run import train

BAR = 0.15
QUIET = Console(quiet=True)
WIDTH, LAYERS, CONTEXT = 256, 6, 128


class Case(NamedTuple):
    """What is trained."""

    layers: int
    dictionary: dict[str, Any]
    train: dict[str, Any]
    dead: float = 0.0
    """Share of latents that are dead from the first step on."""


CASES = {
    "SAE TopK": Case(1, {"kind": "sae", "writes": "mlp_out", "firing": "topk", "k": 32, "n_latents": 16384}, {}),
    "SAE BatchTopK, AuxK on a tenth": Case(
        1, {"kind": "sae", "writes": "mlp_out", "firing": "batchtopk", "k": 32, "n_latents": 16384}, {}, dead=0.1
    ),
    "6 transcoders JumpReLU": Case(
        6, {"firing": "jumprelu", "penalty": "target_l0", "sparsity": 1.0, "k": 16, "n_latents": 4096}, {}
    ),
    "transcoder, signum": Case(1, {"firing": "topk", "k": 32, "n_latents": 16384}, {"optimiser": "signum"}),
    "transcoder, muon": Case(1, {"firing": "topk", "k": 32, "n_latents": 8192}, {"optimiser": "muon"}),
    "crosscoder, 6 sites": Case(
        6, {"kind": "crosscoder", "writes": "mlp_out", "firing": "batchtopk", "k": 32, "n_latents": 8192}, {}
    ),
    "CLT, 6 layers": Case(6, {"kind": "clt", "firing": "batchtopk", "k": 16, "n_latents": 4096}, {}),
    "CLT, AuxK on a tenth": Case(6, {"kind": "clt", "firing": "topk", "k": 16, "n_latents": 4096}, {}, dead=0.1),
    "CLT, in parts of 512": Case(
        6, {"kind": "clt", "firing": "batchtopk", "k": 16, "n_latents": 4096}, {"micro_rows": 512}
    ),
}


def write_cache(path: Path, rows: int) -> None:
    """Random activations at mlp_in and mlp_out of all layers."""
    rng = torch.Generator().manual_seed(0)
    sites = [Site(f"L{layer:02d}.{tap}", layer, tap, WIDTH) for layer in range(LAYERS) for tap in ("mlp_in", "mlp_out")]
    count = rows // CONTEXT
    documents = np.repeat(np.arange(count, dtype=np.int32)[:, None], CONTEXT, 1)
    packed = Contexts(np.zeros((count, CONTEXT), np.int32), documents, np.ones((count, CONTEXT), np.uint8))
    made: dict[str, Any] = {"model": "random"}
    with CacheWriter.open(
        path, identity=made, sites=sites, contexts={"train": packed}, codec="bf16", seed=0, fvu_gate=1.0
    ) as writer:
        for split, index in writer.pending():
            shard = writer.shard(split, index)
            shape = (len(shard.contexts), CONTEXT, WIDTH)
            shard.add({site.name: torch.randn(shape, generator=rng) for site in sites})
            shard.commit()
        writer.finalize()


def plans(case: Case, reader: CacheReader, steps: int) -> list[RunPlan]:
    """The case on the sites of the cache."""
    base = {"batch_rows": 2048, "steps": steps, "log_every": 1000, "calibrate_rows": 4096, "heldout_rows": 2048}
    settings = {"dead_after": 1 << 40, "layers": tuple(range(case.layers)), **case.dictionary}
    return plan_runs("one", DictionaryConfig(**settings), TrainConfig(**(base | case.train)), reader.sites, {})


class Watch:
    """The resident memory of this process that is no file's, looked at every 2 ms."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self.first = self.peak = self._own()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def growth(self) -> int:
        """Bytes by which it grew at most; ends the watching."""
        self._over.set()
        self._thread.join()
        return self.peak - self.first

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.peak = max(self.peak, self._own())

    @staticmethod
    def _own() -> int:
        pages = Path("/proc/self/statm").read_text().split()
        return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


class Taken(NamedTuple):
    """By one run."""

    said: int
    taken: int
    """Bytes."""
    said_s: float
    taken_s: float
    """Of one step of all dictionaries."""


def work(name: str, cache: Path, steps: int) -> Taken:
    """Train a case in this process."""
    case, reader = CASES[name], CacheReader.open(cache)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        warm_up(plans(case, reader, 2)[0], reader, Path(folder))
        wanted = plans(case, reader, steps)
        sizes = {plan.name: sizes_of(plan.spec, plan.train) for plan in wanted}
        assumed, whole = Assumed(dead=case.dead), Layout(1, 1, 1)
        said = memory(wanted, sizes, reader.sites, whole, "cpu", codec="bf16", assumed=assumed)
        plan = wanted[0]
        rates = measure(torch.device("cpu"), plan.train.part_rows, plan.spec.d_in, plan.spec.n_latents)
        hardware = gpu("H100")._replace(kind="cpu", full=rates.full, bandwidth=rates.bandwidth)
        expected = sum(step(plan, sizes[plan.name], whole, hardware, assumed).total for plan in wanted)
        give_back_freed_memory()
        kill(case.dead)
        clock(seconds)
        watch = Watch()
        train(wanted, reader, out=Path(folder) / "runs", device="cpu", console=QUIET)
        grown = watch.growth()
    settled = seconds[len(wanted) * min(3, steps - 1) :]
    return Taken(said.total, grown, expected, statistics.median(settled) * len(wanted))


def warm_up(plan: RunPlan, reader: CacheReader, folder: Path) -> None:
    """Load and compile what a run of the kind needs, on a small one."""
    small = plan._replace(
        spec=dataclasses.replace(plan.spec, n_latents=256),
        train=dataclasses.replace(plan.train, batch_rows=128, micro_rows=None),
    )
    train([small], reader, out=folder / "warm", device="cpu", console=QUIET)


def kill(share: float) -> None:
    """Let that share of all latents be dead when a training begins."""
    real = Fit.start

    def started(self: Fit, *arguments: Any) -> None:
        real(self, *arguments)
        for source in range(len(self.coder.inputs)):
            counters = self.coder.encoder(source).tokens_since_fired
            counters[: int(share * counters.shape[0])] = 1 << 41

    Fit.start = started  # type: ignore[method-assign]


def clock(seconds: list[float]) -> None:
    """Note how long every step takes."""
    real = Fit.step

    def timed(self: Fit, *arguments: Any) -> torch.Tensor:
        began = time.perf_counter()
        out = real(self, *arguments)
        seconds.append(time.perf_counter() - began)
        return out

    Fit.step = timed  # type: ignore[method-assign]


def measured(name: str, cache: Path, steps: int) -> Taken:
    """A case in a process of its own."""
    command = [sys.executable, __file__, "--worker", str(cache), "--case", name, "--steps", str(steps)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    return Taken(*json.loads(done.stdout.splitlines()[-1]))


def tables(found: dict[str, list[Taken]], only: str | None) -> list[Table]:
    """Memory and time by case, medians."""
    out = []
    for what, unit, said_of, taken_of in (("memory", 1e6, 0, 1), ("time", 1e-3, 2, 3)):
        if only not in (None, what):
            continue
        title = f"{what.capitalize()} in {'MB' if what == 'memory' else 'ms a step'}, medians"
        table = Table(title=title, title_justify="left")
        ends = ("error", f"bar {BAR:.0%}") if what == "memory" else ("taken / said",)
        for column in ("case", "said", "taken", "lowest", "highest", *ends):
            table.add_column(column, justify="left" if column == "case" else "right")
        for name, runs in found.items():
            taken = sorted(run[taken_of] for run in runs)
            said, middle = statistics.median(run[said_of] for run in runs), statistics.median(taken)
            numbers = (f"{value / unit:,.0f}" for value in (said, middle, taken[0], taken[-1]))
            error = said / middle - 1
            last = (f"{error:+.1%}", "met" if abs(error) <= BAR else "MISSED") if what == "memory" else ()
            table.add_row(name, *numbers, *(last or (f"{middle / said:.2f}",)))
        out.append(table)
    return out


def main() -> None:
    if prepare_process():  # the workers inherit it
        os.environ["PYTHONWARNINGS"] = "ignore"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="may be given several times (default: all)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", choices=("memory", "time"))
    parser.add_argument("--json", action="store_true", help="said and taken by case and run, and no tables")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(work(given.case[0], given.worker, given.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache.zarr"
        write_cache(cache, 8192)
        cases = given.case or list(CASES)
        found = {name: [measured(name, cache, given.steps) for _ in range(given.runs)] for name in cases}
    if given.json:
        print(json.dumps([{"case": name} | run._asdict() for name, runs in found.items() for run in runs]))
        return
    for table in tables(found, given.only):
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
