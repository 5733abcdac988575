"""`thresher cache`: look at a cache, check it, reckon what one would take, free its space."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from thresher.cache.place import Place, local, place_at
from thresher.commands import completion
from thresher.commands.document import Json, plain, write
from thresher.commands.options import Assignments, CachePath, OneCache, RecipeName, examples, out, parse_place
from thresher.commands.wiring import default_cache, plans_of, read_recipe

if TYPE_CHECKING:
    from thresher.cache.estimate import Outlook, Training
    from thresher.cache.layout import Codec
    from thresher.cache.prune import Decision, Found
    from thresher.harvest.estimate import Measured
    from thresher.train.plan import RunPlan

_PRUNE_STORES = "Remove the prefix with the tools of the store: nothing there tells whether somebody reads it."

app = typer.Typer(help="Look at caches, check them, estimate one, free their space.", no_args_is_help=True)


@app.command(
    "info", epilog=examples("thresher cache info caches/mine.zarr", "thresher cache info caches/mine.zarr --json")
)
def cache_info(path: OneCache, as_json: Json = False) -> None:
    """What a cache holds, how large it is and how exact."""
    from thresher.cache.display import print_summary
    from thresher.cache.reader import CacheReader
    from thresher.cache.summary import summary

    with CacheReader.open(path) as reader:
        facts = summary(reader)
    print_summary(facts, out)
    if as_json:
        write(facts)


@app.command("verify", epilog=examples("thresher cache verify caches/mine.zarr"))
def cache_verify(path: OneCache, as_json: Json = False) -> None:
    """Read every byte, check every checksum, name every fault; exits with 1 if there is one."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from thresher.cache.verify import faults, in_the_making, total_bytes

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("", total=total_bytes(path))
        found = faults(path, lambda count: progress.advance(task, count))
    for fault in found:
        out.print(fault, markup=False, highlight=False, soft_wrap=True)
    unfinished = in_the_making(path)
    for name in unfinished:
        out.print(f"{name} is in the making: it was not read, and does not count.", highlight=False, soft_wrap=True)
    out.print(f"{len(found)} faults in {path}" if found else f"{path} is whole: every checksum holds.", soft_wrap=True)
    if as_json:
        write({"path": path, "whole": not found, "faults": found, "in_the_making": unfinished})
    if found:
        raise typer.Exit(1)


@app.command(
    "estimate",
    epilog=examples("thresher cache estimate books-demo", "thresher cache estimate gpt2-small --tokens 10000000"),
)
def cache_estimate(
    name: RecipeName,
    assignments: Assignments = None,
    cache: CachePath = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens to reckon with, in place of reading the text.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Bytes and time of a recipe's cache, and whether it pays against running the model again (takes some seconds)."""
    from thresher.cache.display import counted, outlooks_table
    from thresher.cache.estimate import outlook, verdict
    from thresher.cache.layout import CODECS
    from thresher.harvest.estimate import measure

    recipe = read_recipe(name, assignments)
    path = local(cache or default_cache(recipe), "thresher cache estimate, which times the disk,")
    target, data, settings = (recipe.tables[table] for table in ("target", "data", "harvest"))
    found = measure(target, data, settings, folder=path, tokens=tokens, console=out)
    outlooks = {codec: outlook(found.work, found.rates, codec) for codec in CODECS}
    training = _training(plans_of(recipe, {site.name: site for site in found.work.sites}), found.work.rows["train"])
    advice = verdict(outlooks[settings.codec], list(outlooks.values()), found.rates, training)
    rows = " + ".join(f"{count:,} {split}" for split, count in found.work.rows.items())
    contexts = sum(found.work.contexts.values())
    out.print(
        f"{rows} rows from {contexts:,} contexts of {found.work.context} tokens ({found.basis}), at "
        f"{len(found.work.sites)} sites of {target.model} on {found.device}."
    )
    out.print(outlooks_table(list(outlooks.values()), found.work.sites, found.rates, found.memory, settings.codec))
    out.print(
        f"The recipe trains {counted(training.dictionaries, 'dictionary', 'dictionaries')} from "
        f"{counted(training.streams, 'stream', 'streams')} of batches: {training.passes:.2f} passes over the rows."
    )
    out.print(advice)
    if settings.window_gb is not None:
        out.print(
            f"harvest.window_gb is set: a ring of {settings.window_gb:g} GB is kept in place of all train rows "
            "(rolling mode), and the model runs in every pass."
        )
    if as_json:
        write(_estimate(path, found, outlooks, training) | {"codec": settings.codec, "verdict": advice})


def _estimate(
    path: Path, found: "Measured", outlooks: "Mapping[Codec, Outlook]", training: "Training"
) -> dict[str, Any]:
    """What was measured and what follows from it, by codec."""
    codecs = {
        codec: plain(outlook)
        | {"harvest_s": outlook.harvest_s, "break_even": outlook.break_even}
        | {"fits": outlook.needed <= found.rates.free, "memory": found.memory[codec]}
        for codec, outlook in outlooks.items()
    }
    for facts in codecs.values():
        del facts["codec"]
    work = {key: getattr(found.work, key) for key in ("rows", "contexts", "context")}
    rates = {
        "forward_tokens_per_s": found.rates.forward,
        "disk_bytes_per_s": found.rates.disk,
        "free": found.rates.free,
    }
    return {
        "path": path,
        **work,
        "basis": found.basis,
        "device": found.device,
        **rates,
        "codecs": codecs,
        "training": training,
    }


def _training(plans: "Sequence[RunPlan]", rows: int) -> "Training":
    """What the plans read of a cache with so many training rows; those that share batch size and seed read together."""
    from thresher.cache.estimate import Training

    streams: dict[tuple[int, int], int] = {}
    for plan in plans:
        key = (plan.train.batch_rows, plan.seed)
        streams[key] = max(streams.get(key, 0), plan.train.total_steps(rows) * plan.train.batch_rows)
    return Training(len(plans), len(streams), sum(streams.values()) / rows)


@app.command(
    "prune",
    epilog=examples(
        "thresher cache prune",
        "thresher cache prune caches --older-than 30",
        "thresher cache prune caches/mine.zarr --yes",
    ),
)
def cache_prune(
    paths: Annotated[
        list[Place] | None,
        typer.Argument(
            parser=parse_place,
            metavar="PATH…",
            help="Caches, or directories of caches.",
            autocompletion=completion.caches,
        ),
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Also caches that were not used for so long.")
    ] = None,
    used: Annotated[bool, typer.Option("--used", help="Also caches that runs were trained from.")] = False,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where to look for runs.")] = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it nothing is changed.")] = False,
    as_json: Json = False,
) -> None:
    """Free space: leftovers of dead harvests; whole caches when named or --older-than. A dry run without --yes."""
    import time

    from thresher.cache.display import print_decision
    from thresher.cache.prune import Policy, decide, find, remove, survey
    from thresher.train.found import trained_from

    given = [local(each, "thresher cache prune", _PRUNE_STORES) for each in paths or ()]
    named = {path for path in given if find(path) == [path]}
    usual = os.environ.get("THRESHER_CACHE", "caches")
    if not given and (there := local(place_at(usual), "thresher cache prune", _PRUNE_STORES)).is_dir():
        given = [there]
    found = list(dict.fromkeys(path for folder in given for path in find(folder)))
    users = trained_from({runs, *(path.parent / "runs" for path in found)})
    policy, now = Policy(older_than, used), time.time()
    strangers: list[Path] = []
    told: list[dict[str, Any]] = []
    for path in found:
        seen = survey(path, users)
        if yes:
            decision = remove(path, policy, named=path in named, runs=users)
        else:
            decision = decide(seen, policy, named=path in named, now=now)
        strangers += [path / name for name in seen.strangers]
        print_decision(path, seen, decision, out, gone=yes)
        told.append(_decided(path, seen, decision))
    for stranger in strangers:
        out.print(f"not ours, left alone: {stranger}", markup=False, highlight=False, soft_wrap=True)
    freed = sum(cache["frees"] for cache in told)
    where = ", ".join(map(str, given)) or usual
    more = " Add --yes to remove it." if freed and not yes else ""
    out.print(f"{decimal(freed)} {'freed' if yes else 'would be freed'} in {where}.{more}", highlight=False)
    if as_json:
        write({"removed": yes, "bytes": freed, "caches": told, "left_alone": strangers})


def _decided(path: Path, seen: "Found", decision: "Decision") -> dict[str, Any]:
    """A cache that was looked at, what goes of it, and why."""
    parts = [part.state for part in seen.parts]
    facts = {"path": path, "bytes": seen.bytes, "parts": parts, "busy": seen.busy, "used": seen.used, "runs": seen.runs}
    return facts | {"frees": decision.bytes, "why": decision.why}
