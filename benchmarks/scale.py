"""A sweep of the bundled model's dictionaries spread over processes, against the same sweep in one.

    python benchmarks/scale.py [--cache PATH] [--steps 200] [--repeats 3] [--processes 2] [--device cpu] [--data]

Sixteen dictionaries (N × D × F = 2048 × 128 × 1024: two transcoders and two SAEs of each of four layers) are trained
through torchrun by one process and by several, alternately, every process on one thread (on CUDA on a GPU of its own).
Timed on rank 0, from the moment when all processes are warm until it has the whole outcome. The efficiency is the time
of one process over `processes` times that of several: 1 is ideal. Nothing is exchanged while they train, so what is
lost is what one process does once and each of several does for itself (reading, decoding), an uneven division, and
what cores share. The weights that come out must be the same bits.

With `--data`, two larger dictionaries (N × D × F = 8192 × 128 × 2048) are trained one after the other, each by all
processes, which share the rows of its batches: what is lost then is the exchange of gradients and the update, which
every process makes for itself. Weights must be the same but for rounding: the largest difference is shown, in units of
the largest weight.

On a machine with several GPUs: `python benchmarks/scale.py --device auto --processes 8`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table

from thresher.cache.process import prepare_process
from thresher.cache.reader import CacheReader
from thresher.cache.roster import meet
from thresher.harvest.corpus import DataConfig
from thresher.harvest.run import HarvestConfig, harvest
from thresher.harvest.target import TargetConfig
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.mesh import ParallelConfig
from thresher.train.plan import RunPlan, plan_runs
from thresher.train.run import train

BAR = 0.8
QUIET = Console(quiet=True)
SETTINGS: list[dict[str, Any]] = [
    {"k": 16},
    {"k": 32},
    {"kind": "sae", "writes": "mlp_out", "firing": "topk", "k": 16},
    {"kind": "sae", "writes": "mlp_out", "firing": "topk", "k": 32},
]


def plans(reader: CacheReader, steps: int, shared: bool) -> list[RunPlan]:
    """A set of four for each of the settings; of those to be shared one each of two."""
    rows, width = (8192, 2048) if shared else (2048, 1024)
    config = TrainConfig(batch_rows=rows, steps=steps, lr=2e-3, calibrate_rows=50_000, heldout_rows=10_000)
    made = [
        plan_runs(f"d{index}", DictionaryConfig(n_latents=width, **one), config, reader.sites, {})
        for index, one in enumerate(SETTINGS)
    ]
    return [made[1][0], made[3][0]] if shared else [plan for four in made for plan in four]


def work(cache: Path, out: Path, steps: int, device: str, data: int, shared: bool) -> None:
    """What every process does: warm up by itself, then its share; rank 0 writes the seconds into `out`/seconds.json."""
    reader = CacheReader.open(cache)
    with meet("warm", "") as roster:
        warm = out / f"warm-{roster.world.rank}"
        train(plans(reader, 3, shared)[:: 1 if shared else 4], reader, out=warm, device=device, console=QUIET)
        if roster.world.speaks:
            roster.wait()
    began = time.perf_counter()
    with meet("train", "") as roster:
        runs, parallel = out / "runs", ParallelConfig(data=data)
        train(
            plans(reader, steps, shared),
            reader,
            out=runs,
            device=device,
            console=QUIET,
            roster=roster,
            parallel=parallel,
        )
    if roster.world.speaks:
        (out / "seconds.json").write_text(json.dumps(time.perf_counter() - began))


def timed(processes: int, cache: Path, out: Path, steps: int, device: str, shared: bool) -> float:
    """Seconds of the sweep on so many processes; `shared`: which train every dictionary together."""
    out.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__, "--worker"]
    given = ["--cache", str(cache), "--out", str(out), "--steps", str(steps), "--device", device]
    given += ["--data", "--processes", str(processes)] if shared else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, *given], check=True, env=environment, stdout=subprocess.DEVNULL)
    return float(json.loads((out / "seconds.json").read_text()))


def weights(out: Path) -> dict[str, bytes]:
    """By run, the bytes of its weights."""
    return {path.parent.name: path.read_bytes() for path in out.glob("runs/*/weights.safetensors")}


def difference(one: Path, other: Path) -> float:
    """The largest difference of weights, in units of the largest weight of the same tensor."""
    found = [0.0]
    for path in one.glob("runs/*/weights.safetensors"):
        mine = safetensors.torch.load_file(path)
        others = safetensors.torch.load_file(other / "runs" / path.parent.name / path.name)
        for name, tensor in mine.items():
            apart, size = (tensor.double() - others[name].double()).abs().max(), tensor.double().abs().max()
            found.append(float(apart / size.clamp_min(1e-30)))
    return max(found)


def harvested(folder: Path) -> Path:
    """A cache of part of the bundled text, all layers."""
    data = DataConfig(context=256, test_fraction=0.1, validation_fraction=0.05, max_tokens=400_000)
    path = folder / "cache.zarr"
    harvest(TargetConfig(), data, HarvestConfig(sites=("mlp_in", "mlp_out")), path=path, console=QUIET)
    return path


def main() -> None:
    """Print one line per pair of measurements, and whether the bar is met."""
    if prepare_process():  # as the command line does, which has not loaded torch by then
        os.execv(sys.executable, [sys.executable, *sys.argv])
    parser = argparse.ArgumentParser(description="A sweep on several processes against one.")
    parser.add_argument("--cache", type=Path, help="A cache with mlp_in and mlp_out of four layers of width 128.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", action="store_true", help="All processes share every dictionary's batches.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.cache, given.out, given.steps, given.device, given.processes if given.data else 1, given.data)
        return
    count = given.processes
    what = "2 shared dictionaries" if given.data else "16 dictionaries"
    table = Table(title=f"{what}, {given.steps} steps, {given.device}, torch {torch.__version__}")
    for column in ("pair", "1 process s", f"{count} processes s", "efficiency", "weights"):
        table.add_column(column, justify="right")
    found, same = [], True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = given.cache or harvested(folder)
        for turn in range(given.repeats):
            one, several = folder / f"one-{turn}", folder / f"several-{turn}"
            alone = timed(1, cache, one, given.steps, given.device, given.data)
            spread = timed(count, cache, several, given.steps, given.device, given.data)
            equal = weights(one) == weights(several)
            same &= equal
            told = f"{difference(one, several):.1e}" if given.data else "same" if equal else "DIFFER"
            found.append(alone / (count * spread))
            cells = f"{turn + 1}", f"{alone:.1f}", f"{spread:.1f}", f"{found[-1]:.2f}", told
            table.add_row(*cells)
    Console(width=100).print(table)
    middle = statistics.median(found)
    if given.data:
        print(f"Median {middle:.2f} of ideal.")
        return
    met = "met" if middle >= BAR and same else "MISSED"
    print(f"Bar: at least {BAR} of ideal: median {middle:.2f}, {met}.")


if __name__ == "__main__":
    main()
