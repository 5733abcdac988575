"""What the commands about caches show: tables and lines, from values that were computed elsewhere."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from thresher.cache.contracts import Site
from thresher.cache.estimate import Outlook, Rates, duration
from thresher.cache.layout import Codec
from thresher.cache.memory import available_memory
from thresher.cache.prune import Decision, Found


def print_summary(facts: Mapping[str, Any], out: Console) -> None:
    """What a cache holds and how exact it is; `facts` come from `summary`."""
    for key, value in {
        "path": facts["path"],
        "fingerprint": facts["fingerprint"],
        "stored": f"{decimal(facts['bytes'])}, {facts['codec']}, "
        + ("kept rows only" if facts["store"] == "kept" else "all rows, special ones marked")
        + f", in chunks of {facts['chunk_rows']:,} and shards of {facts['shard_rows']:,} rows",
        "made with": one_line(facts["facts"].get("versions", {})),
        "not complete": ", ".join(facts["incomplete"]),
    }.items():
        if value:
            out.print(f"[bold]{key}[/] {value}", highlight=False, soft_wrap=True)
    for text in facts["texts"]:
        line = (
            f"{escape(str(text['source']))}, read up to document {text['documents']:,}; to go on behind it, "
            f"`thresher harvest --extend` with data.skip_documents = {text['documents']}"
        )
        out.print(f"[bold]text[/] {line}", highlight=False, soft_wrap=True)
    out.print(_facts_table("split", facts["splits"]))
    if len(facts["parts"]) > 1:
        shown = {part["name"]: {**part, "bytes": decimal(part["bytes"])} for part in facts["parts"]}
        for part in shown.values():
            del part["name"]
        out.print(_facts_table("part", shown))
    out.print(_sites_table(facts["sites"]))


def _facts_table(name: str, rows: Mapping[str, Mapping[str, object]]) -> Table:
    columns = list(dict.fromkeys(key for facts in rows.values() for key in facts))
    table = Table(box=None, header_style="bold")
    table.add_column(name, no_wrap=True)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row, facts in rows.items():
        table.add_row(row, *(one_line(facts.get(column, "")) for column in columns))
    return table


def _sites_table(sites: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line a site, tap by tap in layers, with its mean norm as a bar."""
    taps = list(dict.fromkeys(site["tap"] for site in sites.values()))
    largest = max(site["mean_norm"] for site in sites.values())
    table = Table(box=None, header_style="bold", caption="FVU: share of the variance that decoding does not give back.")
    table.caption_justify = "left"
    table.add_column("site", no_wrap=True)
    for column in ("width", "stored", "FVU", "median\ndimension", "worst\ndimension", "mean ‖x‖"):
        table.add_column(column, justify="right")
    table.add_column("")
    for name, site in sorted(sites.items(), key=lambda item: (taps.index(item[1]["tap"]), item[1]["layer"])):
        fvu = (f"{site[key]:.1e}" for key in ("fvu", "fvu_median_dimension", "fvu_worst_dimension"))
        bar = Bar(largest or 1.0, 0.0, site["mean_norm"], width=20)
        table.add_row(name, str(site["width"]), decimal(site["bytes"]), *fvu, f"{site['mean_norm']:.3g}", bar)
    return table


def outlooks_table(
    outlooks: Sequence[Outlook], sites: Sequence[Site], rates: Rates, memory: Mapping[Codec, int], chosen: Codec
) -> Table:
    """Sizes and times of a cache, one column a codec; sites of one tap and width share a row: they are equally large.

    `memory` is what a harvest takes of it, by codec; `chosen` is the recipe's codec.
    """
    table = Table(box=None, header_style="bold")
    table.add_column("")
    for each in outlooks:
        table.add_column(f"{each.codec} (recipe's)" if each.codec == chosen else each.codec, justify="right")
    alike: dict[tuple[str, int], list[str]] = {}
    for site in sites:
        alike.setdefault((site.tap, site.width), []).append(site.name)
    for (tap, width), names in alike.items():
        each_of = f", each of {len(names)}" if len(names) > 1 else ""
        table.add_row(f"{tap}, {width} wide{each_of}", *(decimal(each.site_bytes[names[0]]) for each in outlooks))
    table.add_row("all, with tokens and statistics", *(decimal(each.bytes) for each in outlooks), style="bold")
    fits = [("fits" if each.needed <= rates.free else "[red]too large[/]") for each in outlooks]
    table.add_row(f"{decimal(rates.free)} are free there", *fits)
    taken = (decimal(memory[each.codec]) for each in outlooks)
    table.add_row(f"memory of the harvest (free: {decimal(available_memory())})", *taken)
    table.add_row("")
    for label, shown in _times(rates):
        table.add_row(label, *(shown(each) for each in outlooks))
    return table


def _times(rates: Rates) -> list[tuple[str, Callable[[Outlook], str]]]:
    """The rows of `outlooks_table` below the line."""
    return [
        (f"writing at {decimal(int(rates.disk.write))}/s", lambda each: duration(each.write_s)),
        (f"model at {rates.forward:,.0f} tokens/s", lambda each: duration(each.forward_s)),
        ("harvest, the longer of both", lambda each: duration(each.harvest_s)),
        (f"reading a pass at {decimal(int(rates.disk.read))}/s", lambda each: duration(each.read_s)),
        ("rows/s that the disk can feed", lambda each: f"{each.rows_per_s:,.0f}"),
        ("passes from which on it pays", lambda each: f"{each.break_even:.2f}"),
    ]


def print_decision(path: Path, found: Found, decision: Decision, out: Console, *, gone: bool) -> None:
    """Two lines on a cache that was looked at for pruning: what it is, and what goes or went of it."""
    state = [*dict.fromkeys(part.state for part in found.parts), *([found.busy] if found.busy else [])]
    runs = [counted(len(found.runs), "run", "runs")] if found.runs else []
    facts = ", ".join([decimal(found.bytes), *state, f"last used {_ago(time.time() - found.used)}", *runs])
    out.print(f"[bold]{escape(str(path))}[/]  {facts}", highlight=False, soft_wrap=True)
    goes = f"[red]{decimal(decision.bytes)} {'gone' if gone else 'to go'}[/], " if decision.files else ""
    out.print(f"    {goes}{escape(decision.why)}", highlight=False, soft_wrap=True)


def counted(count: int, one: str, several: str) -> str:
    """`1 run`, `1,200 runs`."""
    return f"{count:,} {one if count == 1 else several}"


def one_line(value: object) -> str:
    """A JSON value for people."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one_line(inner)}" for key, inner in value.items())
    return str(value)


def _ago(seconds: float) -> str:
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            return counted(int(seconds // size), unit, f"{unit}s") + " ago"
    return "now"
