"""What a dictionary comes to by the fast way, by the plain way, and by an independent dense trainer.

A model is harvested once. From the same rows in the same order and the same initial weights the same dictionaries are
trained three ways: `fast`, as `kernels = "fast"` does it; `plain`, ordinary autograd on dense tensors; `dense`, the
trainer of tests/train/dense.py, which shares no code with the others, neither for steps nor for thresholds and scores.
A seed decides initial weights and the order of rows.

What is compared is what a user keeps: FVU and L0 on held-out rows under the frozen rule, and the share of latents that
are dead at the end. The ways round differently, and training makes much of little, so single runs part; plain against
dense shows how far rounding alone takes them. A difference counts as noise when its mean over seeds is below the
standard deviation that seeds cause (of the two ways compared, pooled). AuxK has work to do: latents count as dead soon.

    python benchmarks/quality.py                              # 3 seeds; 35 minutes on 2 busy cores, 25 of them plain
    python benchmarks/quality.py --model DIR --text DIR       # another model, another text
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from thresher.cache.batches import Batches
from thresher.cache.interrupts import StopFlag
from thresher.cache.reader import CacheReader
from thresher.harvest.corpus import DataConfig
from thresher.harvest.run import harvest
from thresher.harvest.settings import HarvestConfig
from thresher.harvest.target import TargetConfig
from thresher.train.auxk import has_tiles
from thresher.train.calibrate import passes
from thresher.train.config import TrainConfig
from thresher.train.crew import Crew, Task
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.fit import Fit
from thresher.train.plan import RunPlan, plan_runs
from thresher.train.run import train

sys.path.append(str(Path(__file__).parents[1]))
from tests.train.dense import Batch, Dense, Rules, named, rate

QUIET, CPU = Console(quiet=True), torch.device("cpu")
N, CALIBRATE, HELD_OUT = 2048, 40_960, 16_384
TRAIN: dict[str, Any] = {"batch_rows": N, "lr": 2e-3, "calibrate_rows": CALIBRATE, "heldout_rows": HELD_OUT}
WAYS: dict[str, dict[str, Any]] = {
    "fast": {"kernels": "fast"},
    "plain": {"kernels": "plain"},
}
PAIRS = [("fast", "plain"), ("fast", "dense"), ("plain", "dense")]
COMMON: dict[str, Any] = {"kind": "transcoder", "n_latents": 1024, "k": 16, "dead_after": 5 * N}
CASES: dict[str, dict[str, Any]] = {
    "transcoder, TopK": {**COMMON, "firing": "topk"},
    "transcoder, BatchTopK": {**COMMON, "firing": "batchtopk"},
    "transcoder, JumpReLU": {**COMMON, "firing": "jumprelu", "penalty": "target_l0", "sparsity": 1.0, "theta": 2.0},
    "CLT of two layers, BatchTopK": {**COMMON, "kind": "clt", "firing": "batchtopk"},
}


class Score(NamedTuple):
    """What one run came to."""

    fvu: float
    """Held out, under the frozen rule; mean over layers."""
    dead: float
    """Share of latents dead at the end."""
    l0: float
    """Held out, under the frozen rule; mean over layers."""


METRICS = {"fvu": "FVU", "dead": "dead", "l0": "L0"}
Key = tuple[str, str, int]
"""Case, way, seed."""


def harvested(model: str, text: str, layers: Sequence[int], tokens: int, folder: Path) -> CacheReader:
    """A cache of what the MLPs of some layers read and write."""
    shares = {"test_fraction": 0.02, "validation_fraction": 0.08}
    data = DataConfig(source=text, context=256, max_tokens=tokens, txt_documents="line", **shares)
    path = folder / "cache.zarr"
    harvest(TargetConfig(model=model), data, HarvestConfig(layers=tuple(layers)), path=path, console=QUIET)
    return CacheReader.open(path)


def plan(case: str, way: str, seed: int, layers: Sequence[int], steps: int, reader: CacheReader) -> RunPlan:
    """One dictionary: a transcoder of the first layer, a CLT of all."""
    config = DictionaryConfig(layers=tuple(layers if CASES[case]["kind"] == "clt" else layers[:1]), **CASES[case])
    settings = TrainConfig(seed=seed, steps=steps, **TRAIN, **WAYS.get(way, {}))
    (one,) = plan_runs(f"{case} {way} {seed}", config, settings, reader.sites, {})
    return one


def by_stage(plans: Mapping[Key, RunPlan], reader: CacheReader, folder: Path) -> tuple[dict[Key, Score], list[str]]:
    """Train by the stage that users run; scores, and by case what AuxK had to do."""
    results = train(list(plans.values()), reader, out=folder, device="cpu", resume=True, console=QUIET)
    scores, notes = {}, []
    for key, result in zip(plans, results, strict=True):
        assert result.status != "failed", result
        checked, final = result.metrics["held_out"], result.metrics["final"]
        fvu, l0 = (statistics.mean(checked[name]) for name in ("fvu", "l0"))
        scores[key] = Score(fvu, final["dead"], l0)
        if key[1:] == ("fast", 0):
            lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
            dead = [line["dead"] for line in lines]
            low = "in use" if "auxk in bfloat16" in result.metrics["kernels"] else "not in use"
            notes.append(
                f"{key[0]}, seed 0: dead latents {min(dead):.1%} to {max(dead):.1%} in the course of training, AuxK in "
                f"{sum(line['aux'] > 0 for line in lines)} of {len(lines)} windows; bfloat16 products in it {low}."
            )
    return scores, notes


class Referee:
    """The dense trainer of one plan, and the activations as it wants them: divided by mean norm / √d."""

    def __init__(self, one: RunPlan, reader: CacheReader) -> None:
        fit, spec = Fit(one, reader, CPU), one.spec
        fit.start(reader)
        rules = Rules(
            firing=spec.firing, k=float(spec.k or 0), sparsity=spec.sparsity, unit=spec.unit_norm, aux=spec.aux,
            aux_k=spec.d_out // 2, dead_after=spec.dead_after,
        )  # fmt: skip
        self.dense = Dense(rules, named(fit.coder.state_dict()))
        self.reads, self.writes, self.settings = spec.reads, spec.writes, one.train
        known = {site: reader.statistics(site) for site in (*spec.reads, *spec.writes)}
        self.factor = {site: len(s.mean) ** 0.5 / s.mean_norm for site, s in known.items()}
        self.means = [torch.tensor(known[site].mean * self.factor[site]).float() for site in self.writes]
        self.variances = [float(known[site].variance.sum()) * self.factor[site] ** 2 for site in self.writes]

    def batch(self, acts: Mapping[str, torch.Tensor]) -> Batch:
        """Inputs and targets."""
        xs, ys = ([acts[s].float() * self.factor[s] for s in sites] for sites in (self.reads, self.writes))
        return xs, ys

    def batches(self, split: str, rows: int, reader: CacheReader) -> Iterator[Batch]:
        """The rows that thresholds or scores are taken of, the same as for the others."""
        sites = (*self.reads, *self.writes)
        for acts in passes(reader, split, sites, rows, CPU, StopFlag()):
            yield self.batch(acts)

    def score(self, reader: CacheReader) -> Score:
        """Freeze the rule, then judge it."""
        if self.dense.rules.firing == "batchtopk":
            self.dense.calibrate(self.batches("train", CALIBRATE, reader), CALIBRATE)
        fvu, l0 = self.dense.held_out(self.batches("validation", HELD_OUT, reader), self.means)
        return Score(fvu, self.dense.dead(), l0)


def dense_run(one: RunPlan, reader: CacheReader) -> Score:
    """Train in the dense way, on the rows of the plan's own stream."""
    referee, settings = Referee(one, reader), one.train
    sites, steps = list(dict.fromkeys((*one.spec.reads, *one.spec.writes))), settings.steps or 0
    batches = Batches(reader, sites=sites, batch_rows=N, seed=one.seed, end=N * steps, device=CPU)
    for step, batch in enumerate(batches):
        xs, ys = referee.batch(batch.acts)
        referee.dense.step(xs, ys, referee.variances, rate(TRAIN["lr"], step, steps, settings.warmup))
    batches.close()
    return referee.score(reader)


def by_dense(plans: Mapping[Key, RunPlan], reader: CacheReader) -> dict[Key, Score]:
    """Scores of all plans; one core for each."""
    with Crew(CPU) as crew:
        tasks = [Task(one.spec, N, functools.partial(dense_run, one, reader)) for one in plans.values()]
        scores = crew.run(tasks)
    return {key: score for key, score in zip(plans, scores, strict=True) if isinstance(score, Score)}


def report(case: str, scores: Mapping[Key, Score], seeds: int) -> Iterator[str]:
    """Two Markdown tables: scores by way; differences by pair of ways, with a verdict."""
    ways = [*WAYS, "dense"]
    values = {
        (metric, way): [float(getattr(scores[case, way, seed], metric)) for seed in range(seeds)]
        for metric in METRICS
        for way in ways
    }
    yield f"{case}: mean over {seeds} seeds ± their standard deviation"
    yield "\n| | " + " | ".join(METRICS.values()) + " |\n|---" + "|---" * len(METRICS) + "|"
    for way in ways:
        cells = [
            f"{statistics.mean(values[metric, way]):{_form(metric)}} ± {statistics.stdev(values[metric, way]):.2g}"
            for metric in METRICS
        ]
        yield f"| {way} | " + " | ".join(cells) + " |"
    yield "\n| difference | | by seed | mean | deviation of seeds | |\n|---|---|---|---|---|---|"
    for mine, other in PAIRS:
        for metric, name in METRICS.items():
            a, b = values[metric, mine], values[metric, other]
            less = [x - y for x, y in zip(a, b, strict=True)]
            mean = statistics.mean(less)
            noise = ((statistics.variance(a) + statistics.variance(b)) / 2) ** 0.5
            verdict = "within seed noise" if abs(mean) <= noise else "OUTSIDE"
            each = ", ".join(f"{x:+{_form(metric)}}" for x in less)
            yield f"| {mine} − {other} | {name} | {each} | {mean:+{_form(metric)}} | {noise:.2g} | {verdict} |"
    yield ""


def _form(metric: str) -> str:
    return ".2f" if metric == "l0" else ".5f" if metric == "fvu" else ".4f"


def main() -> None:
    """Harvest, train every way, print."""
    parser = argparse.ArgumentParser(description="Learning quality of the fast way, the plain way and a dense trainer.")
    parser.add_argument("--model", default=TargetConfig().model)
    parser.add_argument("--text", default=DataConfig().source)
    parser.add_argument("--layers", type=int, nargs=2, default=[1, 2])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", default="", help="cases with this in their name")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds is {arguments.seeds}; the deviation of seeds needs at least 2.")
    cases = [case for case in CASES if arguments.only in case]
    began, steps, seeds = time.monotonic(), arguments.steps, range(arguments.seeds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        reader = harvested(arguments.model, arguments.text, arguments.layers, arguments.tokens, folder)
        print(
            f"{arguments.model}: {reader.rows('train'):,} training rows, {steps} steps of {N}; torch "
            f"{torch.__version__}, {torch.get_num_threads()} threads, AMX {'present' if has_tiles() else 'absent'}.",
            flush=True,
        )
        scores: dict[Key, Score] = {}
        for way in (*WAYS, "dense"):
            since = time.monotonic()
            plans = {
                (c, way, seed): plan(c, way, seed, arguments.layers, steps, reader) for c in cases for seed in seeds
            }
            if way == "dense":
                scores |= by_dense(plans, reader)
            else:
                found, notes = by_stage(plans, reader, folder / "runs")
                scores |= found
                print("\n".join(notes), end="\n" if notes else "")
            print(f"{way}: {time.monotonic() - since:.0f} s", flush=True)
    for case in cases:
        print(*report(case, scores, arguments.seeds), sep="\n")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
