"""What a codec does to a dictionary: training on stored rows against training on the activations themselves.

The bundled model is harvested once per codec, in the same order. `fp32` is a source whose rows never saw a codec: the
model's float32 activations, kept in memory and placed by the provenance of the bf16 cache. Rounded to bfloat16 they
have to be its rows bit by bit, and those of bf16-lz4, so neither place nor content of a row can be mistaken.

From each source the same dictionaries are trained with the same seeds, which decide initial weights and the order of
rows. All are judged on the float32 activations of the model on the test split: FVU, and δ with the dictionaries of all
layers in place at once (cascade). So two runs of one seed differ by what the codec lost and by what training makes of
it; the noise to compare with is what another seed changes.

    python benchmarks/codecs.py                                # 3 seeds, two layers; 10 minutes on 2 busy cores
"""

import argparse
import statistics
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from thresher.cache.contracts import Dictionary
from thresher.cache.layout import ArraySpec
from thresher.cache.order import Stream
from thresher.cache.reader import CacheReader
from thresher.cache.rows import as_codes
from thresher.cache.source import Source
from thresher.cache.summary import summary
from thresher.evaluate.results import Results
from thresher.evaluate.run import EvaluateConfig, Replacement, evaluate
from thresher.harvest.corpus import DataConfig
from thresher.harvest.fill import batch_contexts
from thresher.harvest.passes import Passes, shard_jobs
from thresher.harvest.run import harvest
from thresher.harvest.settings import HarvestConfig
from thresher.harvest.target import TargetConfig, TransformerTarget, load_target
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.files import load_run
from thresher.train.plan import plan_runs
from thresher.train.run import train

# As in the recipe books-demo.
TARGET = TargetConfig()
DATA = DataConfig(context=256, test_fraction=0.1, validation_fraction=0.03)
TRAIN: dict[str, Any] = {"batch_rows": 2048, "lr": 2e-3}
COMMON: dict[str, Any] = {"k": 16, "n_latents": 1024, "dead_after": 50_000}
KINDS = {
    "transcoder, BatchTopK": DictionaryConfig(kind="transcoder", firing="batchtopk", **COMMON),
    "SAE, TopK": DictionaryConfig(kind="sae", writes="mlp_out", firing="topk", **COMMON),
}
SPLITS = ("train", "validation")
"""What training reads."""
ALIVE_ROWS = 8192

Rows = Mapping[tuple[str, str], np.ndarray]
"""[N, d] float32 by split and site."""


class Unstored(CacheReader):
    """A source of float32 activations in the order of a cache; all but the rows of its sites is the cache's."""

    exact: Rows = MappingProxyType({})

    @property
    def identity(self) -> dict[str, Any]:
        """The cache's, with what the rows are."""
        known = super().identity
        return {**known, "harvest": {**known["harvest"], "codec": "float32"}}

    def arrays(self, split: str) -> dict[str, ArraySpec]:
        """As of a cache, sites in float32."""
        return {
            name: spec._replace(dtype="float32") if (split, name) in self.exact else spec
            for name, spec in super().arrays(split).items()
        }

    def chunk(self, split: str, name: str, index: int, stop: threading.Event | None = None) -> np.ndarray:
        """[C, …] rows of a chunk."""
        if (split, name) not in self.exact:
            return super().chunk(split, name, index)
        rows = self.exact[split, name][index * self.chunk_rows : (index + 1) * self.chunk_rows]
        rows.flags.writeable = False
        return rows


def activations(reader: CacheReader, model: TransformerTarget, batch: int) -> Rows:
    """The rows of a cache before any codec: its contexts through the model again, in the passes of its harvest."""
    sites, shard_rows = tuple(reader.sites.values()), reader.plan.shard_rows
    out: dict[tuple[str, str], np.ndarray] = {}
    with Passes(model, sites) as passes:
        for split in SPLITS:
            contexts, source, total = reader.contexts(split), reader.provenance(split), reader.rows(split)
            out |= {(split, site.name): np.empty((total, site.width), np.float32) for site in sites}
            stream = Stream(contexts.stored(reader.store), reader.plan.seed, split, total)
            for index in range(reader.plan.splits[split].shards):
                wanted = stream.shard(index, shard_rows).contexts
                here = slice(index * shard_rows, min((index + 1) * shard_rows, total))
                place = np.empty(len(contexts.token_id), np.int64)
                place[wanted] = np.arange(len(wanted))
                made = [done for done in passes.run(shard_jobs(split, index, wanted, contexts, batch)) if done]
                for site in sites:
                    x_MTD = torch.cat([acts[site.name] for _, acts in made]).float().numpy()
                    out[split, site.name][here] = x_MTD[place[source.context[here]], source.position[here]]
    return out


def check_rows(exact: Rows, caches: Sequence[CacheReader]) -> None:
    """Rounded to bfloat16, the activations are the stored rows of every one of the caches."""
    for (split, site), rows in exact.items():
        for index in range(len(rows) // caches[0].chunk_rows):
            c = caches[0].chunk_rows
            rounded = torch.from_numpy(rows[index * c : (index + 1) * c]).to(torch.bfloat16)
            for cache in caches:
                stored = as_codes(cache.chunk(split, site, index).copy())
                assert torch.equal(rounded, stored), f"{cache.path}: chunk {index} of {split}/{site} is another one"


def prepared(folder: Path, layers: tuple[int, ...], console: Console) -> dict[str, Source]:
    """A source per codec, `fp32` first."""
    config = {codec: HarvestConfig(layers=layers, codec=codec) for codec in ("bf16", "bf16-lz4", "int8z")}
    for codec, settings in config.items():
        console.print(f"harvest, {codec}")
        harvest(TARGET, DATA, settings, path=folder / f"{codec}.zarr", console=Console(quiet=True))
    caches = {codec: CacheReader.open(folder / f"{codec}.zarr") for codec in config}
    bf16, fp32 = caches["bf16"], Unstored.open(folder / "bf16.zarr")
    assert isinstance(fp32, Unstored)
    model = load_target(TARGET)
    context = bf16.contexts("train").token_id.shape[1]
    batch = batch_contexts(config["bf16"], model, tuple(bf16.sites.values()), context, bf16.facts)
    fp32.exact = activations(bf16, model, batch)
    check_rows(fp32.exact, [bf16, caches["bf16-lz4"]])
    for site in bf16.sites:
        mine, theirs = (cache.statistics(site).variance for cache in (bf16, caches["int8z"]))
        assert np.allclose(mine, theirs, rtol=1e-6), f"statistics of {site} depend on the codec"
    lost = {codec: [s["fvu"] for s in summary(caches[codec])["sites"].values()] for codec in ("bf16", "int8z")}
    for codec, fvus in lost.items():
        console.print(f"FVU of the stored rows themselves, {codec}: {min(fvus):.1e} to {max(fvus):.1e}, site by site")
    return {"fp32": fp32, "bf16": bf16, "int8z": caches["int8z"]}


def trained(
    name: str, source: Source, folder: Path, seeds: int, epochs: float, console: Console
) -> dict[tuple[str, int], list[Dictionary]]:
    """The dictionaries of all layers, by kind and seed."""
    plans = {
        (kind, seed): plan_runs(
            f"{name} {kind} {seed}", config, TrainConfig(seed=seed, epochs=epochs, **TRAIN), source.sites, {}
        )
        for kind, config in KINDS.items()
        for seed in range(seeds)
    }
    console.print(f"train from {name}: {sum(map(len, plans.values()))} dictionaries")
    train(
        [p for some in plans.values() for p in some],
        source,
        out=folder,
        device="cpu",
        resume=True,
        console=Console(quiet=True),
    )
    return {key: [load_run(folder / plan.name).dictionary for plan in some] for key, some in plans.items()}


def likeness(run: Sequence[Any], reference: Sequence[Any], source: Source) -> float:
    """Cosine of each decoder row of `reference` with the nearest one of `run`, mean over layers and latents that fire.

    Latents without use keep their initial direction, which one seed shares; so only those count that fired on some
    held-out rows.
    """
    means = []
    for mine, other in zip(run, reference, strict=True):
        rows = np.arange(min(ALIVE_ROWS, source.rows("validation")))
        codes = other.encode(0, source.gather("validation", other.reads[0], rows))
        alive = codes.latents[codes.values > 0].unique()
        a_FE, b_FE = (torch.nn.functional.normalize(d.W_dec[0][:, 0], dim=1) for d in (mine, other))
        means.append(float((b_FE[alive] @ a_FE.T).amax(dim=1).mean()))
    return statistics.mean(means)


def score(results: Results, name: str, metric: str) -> float:
    """A metric of one replacement with all its dictionaries in place."""
    value = results.find(name, "cascade").metrics[metric]
    assert value is not None, f"{metric} of {name} is undefined"
    return value


def shown(values: Sequence[float], sign: str = "") -> str:
    """Numbers side by side."""
    return "  ".join(f"{value:{sign}.5f}" for value in values)


def report(
    kind: str,
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    cosines: Mapping[str, float],
    console: Console,
) -> None:
    """Table and verdict of one kind of dictionary: `scores` by metric and source, one number a seed.

    The spread is the standard deviation over seeds.
    """
    table = Table(title=f"{kind}: held-out scores by seed", title_justify="left", box=None, header_style="bold")
    for column in (
        "metric",
        "trained from",
        "by seed",
        "mean",
        "spread",
        "less fp32, by seed",
        "mean",
        "/ spread of fp32",
    ):
        table.add_column(column, justify="left" if column in ("metric", "trained from") else "right")
    lines = []
    for metric, by_source in scores.items():
        spread = statistics.stdev(by_source["fp32"])
        for name, values in by_source.items():
            less = [mine - exact for mine, exact in zip(values, by_source["fp32"], strict=True)]
            cells = [metric, name, shown(values), f"{statistics.mean(values):.5f}", f"{statistics.stdev(values):.5f}"]
            if name != "fp32":
                mean = statistics.mean(less)
                cells += [shown(less, "+"), f"{mean:+.5f}", f"{mean / spread:+.2f}"]
                word = "within" if abs(mean) <= spread else "OUTSIDE"
                lines.append(f"{metric} from {name} less fp32: {mean:+.5f}, {word} the spread of seeds, {spread:.5f}.")
            table.add_row(*cells)
    console.print(table)
    console.print("\n".join(lines), highlight=False)
    words = ", ".join(f"{name} {value:.3f}" for name, value in cosines.items())
    console.print(f"Decoder rows against those from fp32, mean cosine of the nearest: {words}.\n", highlight=False)


def main() -> None:
    """Harvest, train, judge, print."""
    parser = argparse.ArgumentParser(description="What a codec does to a dictionary.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="Keep caches and runs here, and go on with what is there.")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds is {arguments.seeds}; the spread over seeds needs at least 2.")
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        sources = prepared(folder, tuple(arguments.layers), console)
        runs = {
            (name, *key): dictionaries
            for name, source in sources.items()
            for key, dictionaries in trained(
                name, source, folder / "runs", arguments.seeds, arguments.epochs, console
            ).items()
        }
        replacements = [Replacement(" ".join(map(str, key)), tuple(some), {}) for key, some in runs.items()]
        settings = EvaluateConfig(protocols=("cascade",), arms=("zero", "mean"), tokens=0, resamples=100)
        contexts = sources["bf16"].contexts("test")
        results = evaluate(replacements, load_target(TARGET), contexts, settings, console=console, provenance={})
        numbers = range(arguments.seeds)
        for kind in KINDS:
            scores = {
                metric: {name: [score(results, f"{name} {kind} {n}", key) for n in numbers] for name in sources}
                for metric, key in (("FVU", "fvu"), ("δ, nats", "delta"))
            }
            fp32 = sources["fp32"]
            cosines = {
                name: statistics.mean(likeness(runs[name, kind, n], runs["fp32", kind, n], fp32) for n in numbers)
                for name in ("bf16", "int8z")
            } | {
                "fp32 of the next seed": statistics.mean(
                    likeness(runs["fp32", kind, (n + 1) % arguments.seeds], runs["fp32", kind, n], fp32)
                    for n in numbers
                )
            }
            report(kind, scores, cosines, console)


if __name__ == "__main__":
    main()
