"""Eight dictionaries from one stream of batches, against the same eight one after another.

    python benchmarks/sweep.py [--cache PATH] [--steps 200] [--repeats 3]

All have the bundled model's shape (D = 128, F = 1024, 2048 rows per step). Without `--cache`, part of the bundled text
is harvested first. Whole stages are timed, `thresher.train.run.train` from opening a run directory to its last
checkpoint, thresholds and held-out check included; sweeps and single runs alternate. Wall time decides, since on a
CPU small dictionaries of a sweep step side by side (train/crew.py): on a machine that others use, the ratio of minima
says more than the median. CPU seconds stand beside it. The weights that come out must be the same bits.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from thresher.cache.process import prepare_process
from thresher.cache.reader import CacheReader
from thresher.harvest.corpus import DataConfig
from thresher.harvest.run import HarvestConfig, harvest
from thresher.harvest.target import TargetConfig
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.plan import RunPlan, plan_runs
from thresher.train.run import train

BAR = 0.8
QUIET = Console(quiet=True)
CASES: dict[str, list[dict[str, Any]]] = {
    "8 transcoders of one layer, BatchTopK": [{"layers": (1,), "k": k} for k in (4, 8, 12, 16, 20, 24, 28, 32)],
    "2 transcoders of each of 4 layers, BatchTopK": [{"layers": (i,), "k": k} for i in range(4) for k in (16, 32)],
    "8 SAEs of one layer, TopK": [
        {"kind": "sae", "writes": "mlp_out", "layers": (1,), "firing": "topk", "k": 16, "aux": aux}
        for aux in (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07)
    ],
}


class Cost(NamedTuple):
    """Of one way to train all eight."""

    wall: float
    """Seconds."""
    cpu: float
    """CPU seconds of all threads."""


def plans(settings: Sequence[dict[str, Any]], reader: CacheReader, steps: int) -> list[RunPlan]:
    """One plan for each of the settings."""
    config = TrainConfig(batch_rows=2048, steps=steps, lr=2e-3, calibrate_rows=50_000, heldout_rows=10_000)
    return [
        plan
        for index, one in enumerate(settings)
        for plan in plan_runs(f"d{index}", DictionaryConfig(n_latents=1024, **one), config, reader.sites, {})
    ]


def timed(groups: Sequence[Sequence[RunPlan]], reader: CacheReader, out: Path) -> Cost:
    """Train every group by a stage of its own."""
    wall, cpu = time.perf_counter(), time.process_time()
    for group in groups:
        results = train(group, reader, out=out, device="cpu", console=QUIET)
        assert all(result.status == "trained" for result in results)
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def same_weights(some: Sequence[RunPlan], left: Path, right: Path) -> bool:
    """Whether both sides hold the same bits."""
    name = "weights.safetensors"
    return all((left / p.name / name).read_bytes() == (right / p.name / name).read_bytes() for p in some)


def harvested(folder: Path) -> CacheReader:
    """A cache of part of the bundled text, all layers."""
    harvest(
        TargetConfig(),
        DataConfig(context=256, test_fraction=0.1, validation_fraction=0.05, max_tokens=400_000),
        HarvestConfig(sites=("mlp_in", "mlp_out")),
        path=folder / "cache.zarr",
        console=QUIET,
    )
    return CacheReader.open(folder / "cache.zarr")


def measure(name: str, reader: CacheReader, steps: int, repeats: int, folder: Path, table: Table) -> bool:
    """One row of the table; whether it meets the bar."""
    eight = plans(CASES[name], reader, steps)
    pairs, same = [], True
    for turn in range(repeats):
        out = folder / f"{name[:2]}{len(table.rows)}-{turn}"
        shared = timed([eight], reader, out / "sweep")
        alone = timed([[plan] for plan in eight], reader, out / "alone")
        same &= same_weights(eight, out / "sweep", out / "alone")
        pairs.append((shared, alone))
    ratios = sorted(shared.wall / alone.wall for shared, alone in pairs)
    cpu = statistics.median(shared.cpu / alone.cpu for shared, alone in pairs)
    shared_s, alone_s = (statistics.median(pair[side].wall for pair in pairs) for side in (0, 1))
    ratio = statistics.median(ratios)
    best = min(shared.wall for shared, _ in pairs) / min(alone.wall for _, alone in pairs)
    met = ratio <= BAR and same
    table.add_row(
        name, f"{shared_s:.1f}", f"{alone_s:.1f}", f"{ratio:.2f}", f"{ratios[0]:.2f}–{ratios[-1]:.2f}", f"{best:.2f}",
        f"{cpu:.2f}", "same" if same else "DIFFER", "met" if met else "MISSED",
    )  # fmt: skip
    return met


def main() -> None:
    """Print one line per case, and whether the bar is met."""
    if prepare_process():  # as the command line does, which has not loaded torch by then
        os.execv(sys.executable, [sys.executable, *sys.argv])
    parser = argparse.ArgumentParser(description="A sweep of eight dictionaries against eight single runs.")
    parser.add_argument("--cache", type=Path, help="A cache with mlp_in and mlp_out of four layers of width 128.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="Cases whose names contain this.")
    arguments = parser.parse_args()
    where = f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table(title=f"Eight dictionaries, N × D × F = 2048 × 128 × 1024, {arguments.steps} steps, {where}")
    columns = ("sweep s", "alone s", "ratio", "spread", "of minima", "CPU ratio", "weights", f"≤ {BAR}")
    for column in ("dictionaries", *columns):
        table.add_column(column, justify="left" if column == "dictionaries" else "right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reader = CacheReader.open(arguments.cache) if arguments.cache else harvested(folder)
        timed([plans(CASES[next(iter(CASES))], reader, 5)], reader, folder / "warm")  # compiles, fills the page cache
        wanted = [case for case in CASES if arguments.only in case]
        met = [measure(case, reader, arguments.steps, arguments.repeats, folder, table) for case in wanted]
    Console(width=140).print(table)
    print(f"Bar: a sweep takes at most {BAR} of the time of single runs: {'met' if all(met) else 'MISSED'}.")


if __name__ == "__main__":
    main()
