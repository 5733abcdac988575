"""The harvest: text through the target into a cache, once.

1. A finished cache with this identity is reused, before anything is loaded.
2. Text is tokenised and packed, the model loaded, its sites resolved; the cache's plan is written and the disk checked.
3. Shard by shard, the contexts that the writer asks for run through the model, all sites from one pass. Activations
   are encoded while the next pass runs, and a full shard is published in the background.

A kill loses at most the shard being filled; the same command goes on. Ctrl-C or SIGTERM stops after the current pass.
"""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.filesize import decimal

from thresher.cache.contracts import Site, UserError
from thresher.cache.interrupts import Interrupted, deferred_interrupts
from thresher.cache.layout import Contexts
from thresher.cache.order import SPLITS
from thresher.cache.reader import CacheReader, find_complete
from thresher.cache.records import differences
from thresher.cache.writer import CacheWriter, ShardWriter
from thresher.harvest.corpus import Corpus, DataConfig, data_identity, read_corpus
from thresher.harvest.feeder import Feeder
from thresher.harvest.meter import Meter
from thresher.harvest.passes import Passes, jobs
from thresher.harvest.target import TargetConfig, TransformerTarget, load_target, load_tokenizer, model_identity

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens of one forward pass when the recipe gives none: enough to fill the device, little enough for its caches."""

BATCH_BYTES = 1 << 30
"""Bound on the activations of one pass; three passes' worth can be alive on a GPU."""

TAPS_ID = "thresher-taps-1"
"""Names what the taps mean (harvest/sites.py); another meaning would need another name."""


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Which activations are stored, and how: the table [harvest] of a recipe."""

    sites: tuple[str, ...] = ("mlp_in", "mlp_out")
    """Taps (resid_pre, resid_mid, mlp_in, mlp_out, resid_post), full names such as L05.mlp_in, or transformer-lens hook
    names; with patterns, such as blocks.[0-3].hook_mlp_out."""

    layers: tuple[int, ...] | None = None
    """Layers that bare taps are taken at, from 0; left out: all."""

    codec: Literal["int8z", "bf16"] = "int8z"
    """int8z: one byte a number, its error measured and bounded. bf16: two bytes, exact for a bfloat16 model."""

    store: Literal["kept", "all"] = "kept"
    """kept: without position 0 and special tokens. all: with them, marked, so that training may choose."""

    seed: int = 0
    """Key of the order in which rows are stored."""

    fvu_gate: float = 1e-3
    """Stop when storing loses more than this share of a site's variance in any shard."""

    batch_contexts: int | None = None
    """Contexts per forward pass; left out: about 4,096 tokens on a CPU and 32,768 on a GPU, fewer when
    they would take more than 1 GiB."""

    def __post_init__(self) -> None:
        if not self.sites:
            raise UserError('harvest.sites is empty; expected at least one, such as sites = ["mlp_in", "mlp_out"].')
        if self.layers is not None and not self.layers:
            raise UserError("harvest.layers is empty; expected layer numbers. Leave it out for all layers.")
        if self.batch_contexts is not None and self.batch_contexts < 1:
            raise UserError(f"harvest.batch_contexts is {self.batch_contexts}; expected at least 1.")
        if not self.fvu_gate > 0:
            raise UserError(f"harvest.fvu_gate is {self.fvu_gate}; expected more than 0, such as 1e-3.")


class HarvestResult(NamedTuple):
    """What a harvest did."""

    path: Path
    reused: bool
    """The cache was there already and nothing was computed."""
    rows: dict[str, int]
    """Stored rows by split."""
    tokens: int
    """Tokens that went through the model this time."""
    tokens_per_s: float
    """Of the time spent on shards, loading and tokenising left out; 0 when reused."""
    seconds: float
    """Everything."""


def identity(target: TargetConfig, data: DataConfig, config: HarvestConfig) -> dict[str, Any]:
    """What the cache's fingerprint is of, from settings and files alone: no model is loaded, nothing tokenised."""
    return {
        "target": model_identity(target),
        "data": data_identity(data),
        "harvest": {
            "sites": list(config.sites),
            "layers": None if config.layers is None else sorted(set(config.layers)),
            "taps": TAPS_ID,
            "codec": config.codec,
            "store": config.store,
            "seed": config.seed,
        },
    }


def harvest(
    target: TargetConfig, data: DataConfig, config: HarvestConfig, *, path: Path, console: Console
) -> HarvestResult:
    """Fill the cache at `path`, go on with it, or find it finished.

    Raises UserError for anything the user can mend, and Interrupted after Ctrl-C or SIGTERM, with all full shards kept.
    """
    started = time.perf_counter()
    wanted = identity(target, data, config)
    finished = find_complete(path, wanted)
    if finished is not None:
        rows = {split: finished.rows(split) for split in SPLITS if split in finished.plan.splits}
        console.print(f"[bold]Reusing[/bold] the cache {path}: {_shown(rows)}, made with the same settings.")
        return HarvestResult(path, True, rows, 0, 0.0, time.perf_counter() - started)
    _refuse_other(path, wanted)
    with console.status("loading the model"):
        model = load_target(target)
        sites = model.sites(config.sites, config.layers)
    corpus = read_corpus(data, load_tokenizer(target), model.n_ctx, model.n_vocab, console)
    return harvest_corpus(model, corpus, sites, config, wanted, path=path, console=console, started=started)


def harvest_corpus(
    model: TransformerTarget,
    corpus: Corpus,
    sites: tuple[Site, ...],
    config: HarvestConfig,
    wanted: Mapping[str, Any],
    *,
    path: Path,
    console: Console,
    started: float | None = None,
) -> HarvestResult:
    """The harvest proper, on a loaded model and packed text; `wanted` is the cache's identity.

    `started` is the time from which `seconds` counts, now when left out.
    """
    started = time.perf_counter() if started is None else started
    with CacheWriter.open(
        path,
        identity=wanted,
        sites=sites,
        contexts=corpus.splits,
        codec=config.codec,
        seed=config.seed,
        store=config.store,
        fvu_gate=config.fvu_gate,
        facts=_facts(model, sites, corpus),
    ) as writer:
        _announce(writer, sites, path, console)
        context = corpus.splits["train"].token_id.shape[1]
        batch = config.batch_contexts or default_batch(model, sites, context)
        began = time.perf_counter()
        tokens = _fill(writer, model, sites, corpus.splits, batch, console)
        writer.finalize()
        seconds = time.perf_counter() - began
        rows = {split: sizes.rows for split, sizes in writer.plan.splits.items()}
    rate = tokens / seconds if tokens else 0.0
    console.print(
        f"[bold]Harvested[/bold] {_shown(rows)} into {path}: {tokens:,} tokens in {seconds:.1f} s "
        f"({rate:,.0f} tokens/s)."
    )
    return HarvestResult(path, False, rows, tokens, rate, time.perf_counter() - started)


def _refuse_other(path: Path, wanted: Mapping[str, Any]) -> None:
    """Raise UserError for a finished cache of something else, before anything is loaded; the writer judges the rest."""
    try:
        other = CacheReader.open(path)
    except UserError:
        return
    lines = differences(wanted, other.identity)
    raise UserError(
        f"{path} holds another cache: {'; '.join(lines)} ('expected' is this recipe's). Choose another place with "
        "--cache PATH, or remove that directory if it is no longer wanted."
    )


def _facts(model: TransformerTarget, sites: tuple[Site, ...], corpus: Corpus) -> dict[str, Any]:
    """What is recorded beside the fingerprint."""
    packages = ("thresher", "torch", "transformers", "transformer-lens", "datasets", "zarr")
    return {
        "corpus": corpus.facts,
        "points": model.describe(sites),
        "device": str(model.device),
        "attention": str(getattr(model.model.config, "_attn_implementation", None)),
        "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
    }


def _announce(writer: CacheWriter, sites: tuple[Site, ...], path: Path, console: Console) -> None:
    pending, total = len(writer.pending()), sum(sizes.shards for sizes in writer.plan.splits.values())
    rows = {split: sizes.rows for split, sizes in writer.plan.splits.items()}
    going_on = f", of which {total - pending} of {total} shards are there already" if pending < total else ""
    console.print(
        f"Harvesting {_shown(rows)} at {len(sites)} sites into {path}: {decimal(writer.bytes_needed())} to write"
        f"{going_on}."
    )


def default_batch(model: TransformerTarget, sites: Sequence[Site], context: int) -> int:
    """Contexts per pass: enough tokens to fill the device, as long as their activations stay small."""
    token_bytes = sum(site.width for site in sites) * model.dtype.itemsize
    tokens = min(BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"]), BATCH_BYTES // token_bytes)
    return max(1, tokens // context)


def _fill(
    writer: CacheWriter,
    model: TransformerTarget,
    sites: tuple[Site, ...],
    contexts: Mapping[str, Contexts],
    batch: int,
    console: Console,
) -> int:
    """Fill every shard that is not committed; returns the number of tokens that went through the model."""
    tokens = 0
    with (
        deferred_interrupts() as stop,
        Passes(model, sites) as passes,
        Feeder(model.device) as feeder,
        Meter(writer, console) as meter,
    ):
        for job, acts in passes.run(jobs(writer, contexts, batch)):
            if job.first:
                shard = writer.shard(job.split, job.shard)
                meter.begin(job.split, job.shard)
            feeder.add(shard, acts)
            tokens += job.tokens.numel()
            meter.advance(job.tokens.numel())
            if stop.requested:
                feeder.drain()
                raise _interrupted(writer, shard)
            if job.last:
                feeder.drain()
                shard.commit()
                meter.committed(job.split, job.shard)
    return tokens


def _interrupted(writer: CacheWriter, shard: ShardWriter) -> Interrupted:
    shard.abandon()
    writer.close()
    left, total = len(writer.pending()), sum(sizes.shards for sizes in writer.plan.splits.values())
    return Interrupted(
        f"Stopped. {total - left} of {total} shards are in {writer.path}; run the same harvest again to go on."
    )


def _shown(rows: Mapping[str, int]) -> str:
    return " + ".join(f"{count:,} {split}" for split, count in rows.items()) + " rows"
