"""The passes of a harvest: shard after shard, the contexts that a writer asks for run through the model.

All sites come from one pass. Activations are encoded while the next pass runs, and a full shard is published in the
background. Any number of processes may do this for one cache at once.
"""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.console import Console
from rich.filesize import decimal

from thresher.cache.claims import Shard
from thresher.cache.contracts import Site
from thresher.cache.interrupts import Interrupted
from thresher.cache.locks import Lock
from thresher.cache.place import Place
from thresher.cache.plan import Extends, Plan, estimate_memory
from thresher.cache.ring import RingKeeper
from thresher.cache.roster import Roster
from thresher.cache.writer import CacheWriter, ShardWriter
from thresher.harvest.corpus import Corpus
from thresher.harvest.feeder import Feeder
from thresher.harvest.footprint import Running
from thresher.harvest.meter import Meter
from thresher.harvest.passes import Passes, PassSize, claimed, jobs, threads_per_pass, workers_for
from thresher.harvest.settings import HarvestConfig, HarvestResult, window_bytes
from thresher.harvest.target import TransformerTarget
from thresher.harvest.timing import WORTH_A_LINE, WORTH_A_TRIAL, counted, foretold, run_trial

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of one forward pass when the recipe gives none: enough to fill the device, little enough for its caches."""

BATCH_BYTES = 1 << 30
"""Bound on the activations of one pass; three passes' worth can be alive on a GPU."""


_IDLE_SECONDS = 0.2


class Filled(NamedTuple):
    """What one process did for a part of a cache."""

    rows: dict[str, int]
    """Stored rows by split, by whomever."""
    tokens: int
    """Tokens that went through the model here."""
    seconds: float
    """Of the shards, planning left out."""


def fill_part(
    model: TransformerTarget,
    corpus: Corpus,
    sites: tuple[Site, ...],
    config: HarvestConfig,
    identity: Mapping[str, Any],
    *,
    path: Place,
    console: Console,
    begun: Mapping[str, Any] = MappingProxyType({}),
    create: Lock | None = None,
    extends: Extends | None = None,
    planned: Callable[[], None] = lambda: None,
    roster: Roster | None = None,
) -> Filled:
    """Fill the part of a cache at `path`, or go on with it.

    `begun` are the facts of the cache that is gone on with or extended. `create` is the lock from `planning`, if it is
    held; `planned` is called once the plan is on the disk. `roster`, entered: the ranks of the job that fills it.
    """
    size = pass_size(config, model, sites, corpus.splits["train"].token_id.shape[1], begun)
    with (
        CacheWriter.open(
            path,
            identity=identity,
            sites=sites,
            contexts=corpus.splits,
            codec=config.codec,
            seed=config.seed,
            store=config.store,
            fvu_gate=config.fvu_gate,
            window_bytes=window_bytes(config),
            facts=_facts(model, sites, corpus, size),
            extends=extends,
            create=create,
            notify=lambda line: console.print(line, highlight=False),
        ) as writer,
        Passes(model, writer.plan.sites, size.threads) as passes,
    ):
        planned()
        if not console.quiet:
            _announce(writer, console)
            _try(passes, writer, model, size, console)
        began, roster = time.perf_counter(), roster or Roster()
        if writer.plan.window_shards is None:
            tokens = _fill(passes, writer, model, corpus, size, console, claimed(writer), roster)
            writer.finalize()
        else:
            tokens = _fill(passes, writer, model, corpus, size, console, rolling(writer, console), roster)
        rows = {split: sizes.rows for split, sizes in writer.plan.splits.items()}
        return Filled(rows, tokens, time.perf_counter() - began)


def rolling(writer: CacheWriter, console: Console) -> Iterator[Shard | None]:
    """The shards that a ring wants, until training says that it is over; None: the ring is full for now."""
    keeper, told = RingKeeper(writer), False
    try:
        while not keeper.over():
            if keeper.publish_ready() and not told:
                console.print(f"The first window of {writer.path} is there: training may begin.", highlight=False)
                told = True
            yield writer.take(keeper.wanted())
    finally:
        keeper.close()
    console.print("Training is over.")


def pass_size(
    config: HarvestConfig, model: TransformerTarget, sites: Sequence[Site], context: int, facts: Mapping[str, Any]
) -> PassSize:
    """Contexts of the recipe; else both as this cache was begun with; else what suits this machine.

    `facts` are those of the cache, empty for a new one.
    """
    begun = facts if facts.get("device") == str(model.device) else {}
    contexts = config.batch_contexts or begun.get("batch_contexts") or default_batch(model, sites, context)
    return PassSize(contexts, begun.get("threads_per_pass") or threads_per_pass())


def default_batch(model: TransformerTarget, sites: Sequence[Site], context: int) -> int:
    """Contexts per pass: enough tokens to fill the device, as long as their activations stay small."""
    token_bytes = sum(site.width for site in sites) * model.dtype.itemsize
    tokens = min(BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"]), BATCH_BYTES // token_bytes)
    return max(1, tokens // context)


def outcome(path: Place, filled: Sequence[Filled], started: float, console: Console) -> HarvestResult:
    """Tell what was done for a cache, part by part; `started` is when the harvest began, by `perf_counter`."""
    tokens, seconds = sum(part.tokens for part in filled), sum(part.seconds for part in filled)
    rows = filled[-1].rows
    rate = tokens / seconds if tokens else 0.0
    console.print(
        f"[bold]Harvested[/bold] {shown(rows)} into {path}: {tokens:,} tokens in {seconds:.1f} s "
        f"({rate:,.0f} tokens/s)."
    )
    return HarvestResult(path, False, rows, tokens, rate, time.perf_counter() - started)


def note_versions(facts: Mapping[str, Any], console: Console) -> None:
    """Tell which libraries differ from those that a cache was begun with."""
    begun, here = facts.get("versions", {}), versions()
    changed = [name for name in here if begun.get(name) != here[name]]
    if changed:
        lines = ", ".join(f"{name} {begun.get(name, 'unknown')} then and {here[name]} now" for name in changed)
        console.print(f"Note: this cache was begun with other libraries: {lines}.", highlight=False)


def memory_needed(plan: Plan, model: TransformerTarget, size: PassSize, running: Running) -> int:
    """Bytes of host memory that a harvest takes beside the model (`estimate_memory`)."""
    token_bytes = sum(site.width for site in plan.sites) * model.dtype.itemsize
    pass_bytes = size.contexts * plan.splits["train"].tokens * token_bytes
    return estimate_memory(
        plan,
        token_bytes=token_bytes,
        results=(workers_for(model, size.threads) + 1) * pass_bytes if model.device.type == "cpu" else 0,
        kept=running.kept,
        passing=running.passing,
    )


def versions() -> dict[str, str]:
    """Versions of the libraries that a harvest runs on."""
    packages = ("thresher", "torch", "transformers", "transformer-lens", "datasets", "zarr")
    return {name: metadata.version(name) for name in packages} | {"python": platform.python_version()}


def shown(rows: Mapping[str, int]) -> str:
    """`1,000 train + 100 test rows`."""
    return " + ".join(f"{count:,} {split}" for split, count in rows.items()) + " rows"


def _facts(model: TransformerTarget, sites: tuple[Site, ...], corpus: Corpus, size: PassSize) -> dict[str, Any]:
    """What is recorded beside the fingerprint."""
    return {
        "corpus": corpus.facts,
        "points": model.describe(sites),
        "device": str(model.device),
        "batch_contexts": size.contexts,
        "threads_per_pass": size.threads,
        "attention": str(getattr(model.model.config, "_attn_implementation", "sdpa")),
        "versions": versions(),
    }


def _announce(writer: CacheWriter, console: Console) -> None:
    pending, total = len(writer.pending()), sum(sizes.shards for sizes in writer.plan.splits.values())
    rows = {split: sizes.rows for split, sizes in writer.plan.splits.items()}
    going_on = f", of which {total - pending} of {total} shards are there already" if pending < total else ""
    console.print(
        f"Harvesting {shown(rows)} at {len(writer.plan.sites)} sites into {writer.path}: "
        f"{decimal(writer.bytes_needed())} to write{going_on}."
    )


def _try(passes: Passes, writer: CacheWriter, model: TransformerTarget, size: PassSize, console: Console) -> None:
    """Say what memory a harvest takes, and how long it takes, where that is long enough to ask.

    Both come from trial passes, as long as these are a small part of the harvest.
    """
    plan, sizes, context = writer.plan, writer.plan.splits, writer.plan.splits["train"].tokens
    rows = dict.fromkeys(sizes, 0)
    for split, shard in writer.pending():
        rows[split] += plan.shard_rows_of(split, shard)
    tokens = sum(rows[split] * of.contexts * of.tokens // of.rows for split, of in sizes.items() if of.rows)
    rounds = tokens // (size.contexts * context * passes.workers)
    if rounds >= WORTH_A_TRIAL:
        with console.status("trying some passes"):
            few = 2 if plan.window_shards is not None else rounds  # of a ring: somebody waits for it
            trial = run_trial(passes, model, size, context, most_rounds=min(few, rounds // WORTH_A_TRIAL))
        running = trial.running
    else:
        trial, running = None, counted(model, plan.sites, size, context)
    memory = memory_needed(plan, model, size, running)
    line = f"It needs about {decimal(memory)} of memory beside the model."
    if trial is not None and rounds >= WORTH_A_LINE and plan.window_shards is None:
        line += f" {foretold(trial, tokens=tokens, size=writer.bytes_needed(), path=writer.path)}"
    console.print(line, highlight=False)


def _fill(
    passes: Passes,
    writer: CacheWriter,
    model: TransformerTarget,
    corpus: Corpus,
    size: PassSize,
    console: Console,
    shards: Iterable[Shard | None],
    roster: Roster,
) -> int:
    """Fill shard after shard; returns the number of tokens that went through the model."""
    tokens = 0
    with (
        roster.interrupts() as stop,
        Feeder(model.device) as feeder,
        Meter(writer, console) as meter,
    ):
        shard: ShardWriter | None = None
        for done in passes.run(jobs(shards, writer, corpus.splits, size.contexts)):
            if done is None:
                if stop.requested:
                    raise _interrupted(writer, None)
                meter.idle()
                time.sleep(_IDLE_SECONDS)
                continue
            job, acts = done
            if job.first:
                shard = writer.shard(job.split, job.shard)
                meter.begin(job.split, job.shard)
            assert shard is not None
            feeder.add(shard, acts, partial(passes.give, acts))
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


def _interrupted(writer: CacheWriter, shard: ShardWriter | None) -> Interrupted:
    """What to tell after a signal. Raises what went wrong with a shard that was being published meanwhile."""
    if shard is not None:
        shard.abandon()
    writer.settle()
    writer.close()
    left, total = len(writer.pending()), sum(sizes.shards for sizes in writer.plan.splits.values())
    return Interrupted(
        f"Stopped. {total - left} of {total} shards are in {writer.path}; run the same harvest again to go on."
    )
