"""Write results down and show them: JSON, CSV, Markdown, LaTeX, plots, one HTML file, and a table in the terminal.

Nothing is computed here that is not in `Results`; only chosen, formatted and drawn.
"""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from thresher.evaluate import latex, page, plots
from thresher.evaluate.columns import STAR, Column, filled, interval_text, label, meaning, sites_label, star
from thresher.evaluate.headline import headline
from thresher.evaluate.results import Results, Row, Segments, to_json

WIDTH = 100
DISPENSABLE = ("n_latents", "recovered_zero", "chance", "dead", "agree", "kl", "fvu")
"""Columns that go, in this order, when the terminal is narrow or names are long."""


class ReportPaths(NamedTuple):
    """Where everything was written."""

    json: Path
    csv: Path
    markdown: Path
    latex: Path
    html: Path
    plots: tuple[Path, ...]
    segments: Path | None
    """Sums per document and row, for comparisons later; None for results read back from JSON."""


def write_report(results: Results, out: Path) -> ReportPaths:
    """Write every form of the results into the directory `out`, replacing what an earlier report left there."""
    out.mkdir(parents=True, exist_ok=True)
    json_path, csv_path, md_path, tex_path = (out / f"results.{end}" for end in ("json", "csv", "md", "tex"))
    html_path = out / "report.html"
    segments = None
    if results.segments is not None:
        segments = out / "documents.npz"
        _write_segments(segments, results.segments)
    _write_csv(csv_path, results)
    _write_text(md_path, markdown(results))
    _write_text(tex_path, latex.tables(results))
    drawn = plots.write_plots(results, out / "plots")
    _write_text(html_path, page.render(results))
    # last: a directory with results.json is a whole report
    _write_text(json_path, json.dumps(to_json(results), indent=1, ensure_ascii=False, allow_nan=False))
    return ReportPaths(json_path, csv_path, md_path, tex_path, html_path, drawn, segments)


def _write_text(path: Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _write_segments(path: Path, segments: Segments) -> None:
    arrays: dict[str, Any] = {key: getattr(segments, key) for key in ("row", "document", "tokens", "tokens_single")}
    arrays |= {f"arm/{label}": sums for label, sums in segments.arms.items()}
    arrays |= {f"l0/{name}": sums for name, sums in segments.l0.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


# --- CSV and Markdown -----------------------------------------------------------------------------------------------


def flat(row: Row) -> dict[str, Any]:
    """One CSV line: identity, metrics, interval ends, front flags and chances, and facts that are plain values."""
    out: dict[str, Any] = {"name": row.name, "kind": row.kind, "family": row.family, "protocol": row.protocol}
    out["sites"] = " ".join(row.sites)
    out |= row.metrics
    for key, found in row.intervals.items():
        out |= {f"{key}_low": found and found.low, f"{key}_high": found and found.high}
    out |= {f"front_{axis}": int(on) for axis, on in row.front.items()}
    out |= {f"chance_{axis}": share for axis, share in row.chance.items()}
    out |= {f"fact_{key}": value for key, value in row.facts.items() if isinstance(value, (str, int, float, bool))}
    return out


def _write_csv(path: Path, results: Results) -> None:
    lines = [flat(row) for protocol in results.protocols for row in results.table(protocol)]
    keys = list(dict.fromkeys(key for line in lines for key in line))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, keys, restval="")
        writer.writeheader()
        writer.writerows(lines)


def markdown(results: Results) -> str:
    """Tables by protocol, headline, masks and definitions."""
    parts = ["# Evaluation", *(f"- **{line.title}:** {line.text}" for line in headline(results)), ""]
    columns = filled(results.rows)
    for protocol, facts in results.protocols.items():
        parts += [f"## {protocol}", str(facts["definition"]), "", caption(results, protocol), ""]
        titles = ["", "replacement", *(title for c in columns for title in _titles(c.key, c.title))]
        parts += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        for row in results.table(protocol):
            cells = [star(row), label(row)]
            for column in columns:
                cells += [column.text(row), interval_text(row)] if column.key == "delta" else [column.text(row)]
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    parts += ["## Notes", *(f"- {note}" for note in results.notes or ("none",)), "", "## Masks"]
    parts += [f"- {key}: {value}" for key, value in results.masks.items()]
    parts += ["", "## Columns", *(f"- **{c.title}** (`{c.key}`): {meaning(c.key)}" for c in columns), ""]
    return "\n".join(parts)


def _titles(key: str, title: str) -> list[str]:
    return [title, "95 %"] if key == "delta" else [title]


def caption(results: Results, protocol: str) -> str:
    """What a table of this protocol rests on."""
    facts, unit = results.protocols[protocol], results.masks["unit"]
    plural = "" if facts["units"] == 1 else "s"
    few = " (few: intervals are rough)" if facts["few_units"] else ""
    chance = f", P({STAR}) how often on it" if any(row.chance for row in results.rows) else ""
    return (
        f"{facts['scored_tokens']:,} scored tokens in {facts['rows']:,} rows, {facts['units']:,} {unit}{plural}{few}; "
        f"intervals 95 %, paired bootstrap; {STAR} Pareto front of δ against L0{chance}."
    )


# --- terminal -------------------------------------------------------------------------------------------------------


def print_table(results: Results, console: Console) -> None:
    """A table per protocol, at most 100 columns wide, and the headline."""
    before = console.width
    if not console.is_terminal:
        console.width = WIDTH  # a pipe or file has no width of its own: rich says 80
    width = min(console.width, WIDTH)
    for protocol in results.protocols:
        console.print(fitting_table(results, protocol, console, width), width=width)
    for line in headline(results):
        console.print(f"[bold]{escape(line.title)}[/]  {escape(line.text)}", width=width, highlight=False)
    for note in results.notes:
        console.print(f"[yellow]note[/]  {escape(note)}", width=width, highlight=False)
    if not console.is_terminal:
        console.width = before


def fitting_table(results: Results, protocol: str, console: Console, width: int) -> Table:
    """The table with as many columns as can be read in `width`; the rest is in the report."""
    shown = [column for column in filled(results.rows) if column.terminal]
    for key in (None, *DISPENSABLE):
        shown = [column for column in shown if column.key != key]
        drawn = table(results, protocol, shown)
        if Measurement.get(console, console.options.update(width=10_000), drawn).maximum <= width:
            break
    return drawn


def table(results: Results, protocol: str, shown: Sequence[Column]) -> Table:
    """The rich table of one protocol."""
    head = Table(
        title=f"{protocol}{'  (headline)' if protocol == 'cascade' else ''}",
        caption=caption(results, protocol),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="dim",
    )
    head.add_column("", width=1, style="bold yellow")
    head.add_column("replacement", overflow="fold", min_width=12)  # the one column that gives way
    for column in shown:
        head.add_column(column.title, justify="right", no_wrap=True)
        if column.key == "delta":
            head.add_column("95 %", justify="right", no_wrap=True, style="dim")
    rows = results.table(protocol)
    several = len({row.sites for row in rows if row.kind == "replacement"}) > 1
    previous: tuple[Any, ...] | None = None
    for row in rows:
        section = (row.kind, row.sites if several else (), row.family)
        if previous is not None and section[:2] != previous[:2]:
            head.add_section()
        if several and (previous is None or section[:2] != previous[:2]) and row.kind == "replacement":
            head.add_row("", f"[italic]{sites_label(row.sites)}[/]")
        previous = section
        head.add_row(*_cells(row, shown, several), style="dim" if row.kind == "baseline" else "")
    return head


def _cells(row: Row, shown: Sequence[Column], several: bool) -> list[str]:
    cells = [star(row), escape(label(row, several))]
    for column in shown:
        cells.append(column.text(row))
        if column.key == "delta":
            cells.append("" if row.name == "clean" and row.kind == "baseline" else interval_text(row))
    return cells
