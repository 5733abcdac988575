"""The report on a toy model: JSON, CSV, Markdown, one page, a picture, and a table in the terminal.

Nothing is computed here; only chosen, formatted and drawn.
"""

import csv
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from thresher.cache.publish import publish
from thresher.evaluate.columns import sites_label
from thresher.evaluate.palette import CARD_DARK, CARD_LIGHT, hue, stylesheet
from thresher.evaluate.vectors import SourceScore, VectorResults, VectorRow

DEFINITIONS = {
    "fvu": "Share of the variance of a written site that is missed, on clean inputs; of several sites their mean.",
    "output_mse": "Squared error of the model's output with reconstructions in place, mean over rows and dimensions.",
    "l0": "Active latents per row, of all dictionaries of the set together.",
    "l0_ratio": "L0 over the number of true features that are active.",
    "dead": "Share of latents that never fired.",
    "encoder": "Mean over truths of the largest |cosine| with the encoder row of a latent that fires.",
    "decoder": "Mean over truths of the largest |cosine| with the decoder row of a latent that fires.",
    "encoder_weighted": "The same, truths weighted by the squared norm of what they write.",
    "decoder_weighted": "The same, truths weighted by the squared norm of what they write.",
    "encoder_matched": "Mean cosine when every latent stands for one truth at most (Hungarian assignment).",
    "decoder_matched": "Mean cosine when every latent stands for one truth at most (Hungarian assignment).",
    "duplicates": "Latents beyond the first of a truth, both cosines above 0.9.",
    "missing": "Truths with which no latent has both cosines at 0.5 or more.",
    "missing_weight": "Their share of the squared norms that all truths write.",
    "null": "Scores of as many random directions.",
}
WIDTH = 100
REPORT_ONLY = ("output_mse_clean_input", "output_mse_single_site", "encoder_weighted", "decoder_null", "missing_weight")
"""Columns that the terminal leaves out."""
SCORES = ("encoder", "decoder", "encoder_weighted", "decoder_weighted", "encoder_matched", "decoder_matched")


class VectorPaths(NamedTuple):
    """Where everything was written."""

    json: Path
    csv: Path
    markdown: Path
    html: Path
    plots: tuple[Path, ...]


def flat(row: VectorRow) -> dict[str, Any]:
    """A replacement's numbers by name: over its sources, means of shares and cosines, sums of counts."""
    out: dict[str, Any] = {"fvu": _mean([value for value in row.fvu.values() if value is not None])}
    out |= {f"output_mse_{protocol}": value for protocol, value in row.output_mse.items()}
    if row.sources:
        out |= {"l0": row.l0, "l0_ratio": row.l0_ratio, "dead": _mean([source.dead for source in row.sources])}
        for key in SCORES:
            out[key] = _mean([getattr(source.found, key) for source in row.sources])
            out[f"{key}_null"] = _mean([getattr(source.null, key) for source in row.sources])
        out |= {key: sum(getattr(source.found, key) for source in row.sources) for key in ("duplicates", "missing")}
        out["missing_weight"] = _mean([source.found.missing_weight for source in row.sources])
        out["truths"] = sum(source.found.truths for source in row.sources)
    return out


def to_json(results: VectorResults) -> dict[str, Any]:
    """All of it, JSON values."""
    rows = [
        {
            "name": row.name,
            "kind": row.kind,
            "family": _family(row),
            "sites": list(row.sites),
            "metrics": flat(row),
            "fvu": row.fvu,
            "output_mse": row.output_mse,
            "sources": [_source(source) for source in row.sources],
            "facts": row.facts,
        }
        for row in results.rows
    ]
    return {
        "rows": rows,
        "truths": results.truths,
        "tokens": results.tokens,
        "notes": list(results.notes),
        "definitions": DEFINITIONS,
        "provenance": results.provenance,
    }


def _source(source: SourceScore) -> dict[str, Any]:
    return {**source._asdict(), "found": source.found._asdict(), "null": source.null._asdict()}


def _family(row: VectorRow) -> str:
    if row.kind == "baseline":
        return "baseline"
    skip = "skip " if row.facts.get("skip") else ""
    return f"{skip}{row.facts.get('kind', 'dictionary')} {row.facts.get('firing', '')}".strip()


def write_vector_report(results: VectorResults, out: Path) -> VectorPaths:
    """Write every form into `out`, replacing what lies there."""
    out.mkdir(parents=True, exist_ok=True)
    plots = _save(recovery_figure(results), out / "plots")
    paths = VectorPaths(
        out / "results.json", out / "results.csv", out / "results.md", out / "report.html", tuple(plots)
    )
    lines = [{"name": row.name, "kind": row.kind, "family": _family(row), **flat(row)} for row in results.rows]
    keys = list(dict.fromkeys(key for line in lines for key in line))
    with paths.csv.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, keys, restval="")
        writer.writeheader()
        writer.writerows(lines)
    publish(paths.markdown, [markdown(results).encode()])
    svg = next((path.read_text(encoding="utf-8") for path in plots if path.suffix == ".svg"), "")
    publish(paths.html, [page(results, svg).encode()])
    publish(paths.json, [json.dumps(to_json(results), indent=1, ensure_ascii=False, allow_nan=False).encode()])
    return paths


# --- table ----------------------------------------------------------------------------------------------------------


def columns(results: VectorResults) -> dict[str, str]:
    """Key of `flat` to the title of its column, those that any row has."""
    titles = {"fvu": "FVU"}
    titles |= {f"output_mse_{p}": f"MSE {p}" for p in ("cascade", "clean_input", "single_site")}
    titles |= {"l0": "L0", "l0_ratio": "L0/true", "dead": "dead", "encoder": "enc", "decoder": "dec"}
    titles |= {"encoder_weighted": "enc ‖v‖²", "decoder_weighted": "dec ‖v‖²", "decoder_matched": "dec 1:1"}
    titles |= {"decoder_null": "dec null", "duplicates": "dup", "missing": "miss"}
    titles |= {"missing_weight": "miss ‖v‖²"}
    found = {key for row in results.rows for key, value in flat(row).items() if value is not None}
    return {key: title for key, title in titles.items() if key in found}


def cell(key: str, value: Any) -> str:
    """A number as shown."""
    if value is None:
        return ""
    if key in ("duplicates", "missing"):
        return f"{value:d}"
    if key.startswith("output_mse"):
        return f"{value:.2e}"
    return f"{value:.2f}" if key in ("l0", "l0_ratio") else f"{value:.3f}"


def print_vectors(results: VectorResults, console: Console) -> None:
    """The table."""
    table = Table(
        title=f"Against the known solution: {results.truths}",
        caption=f"{results.tokens:,} held-out rows of inputs; MSE of the model's output, by protocol",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="dim",
    )
    shown = {key: title for key, title in columns(results).items() if key not in REPORT_ONLY}
    table.add_column("replacement", overflow="fold", min_width=12)
    for title in shown.values():
        table.add_column(title, justify="right", no_wrap=True)
    for row in results.rows:
        numbers = flat(row)
        style = "dim" if row.kind == "baseline" else ""
        table.add_row(escape(row.name), *(cell(key, numbers.get(key)) for key in shown), style=style)
    before = console.width
    if not console.is_terminal:
        console.width = WIDTH  # a pipe or file has no width of its own: rich says 80
    console.print(table)
    for note in results.notes:
        console.print(f"[yellow]note[/]  {escape(note)}", highlight=False)
    if not console.is_terminal:
        console.width = before


def markdown(results: VectorResults) -> str:
    """Table and definitions."""
    shown = columns(results)
    lines = ["# Against the known solution", "", f"Truths: {results.truths}. {results.tokens:,} held-out rows.", ""]
    lines += ["| replacement | " + " | ".join(shown.values()) + " |", "|---|" + "---:|" * len(shown)]
    for row in results.rows:
        numbers = flat(row)
        lines.append(f"| {row.name} | " + " | ".join(cell(key, numbers.get(key)) for key in shown) + " |")
    lines += ["", *(f"- {note}" for note in results.notes), ""]
    lines += [f"- **{key}**: {text}" for key, text in DEFINITIONS.items()]
    return "\n".join(lines) + "\n"


# --- picture and page -----------------------------------------------------------------------------------------------


def recovery_figure(results: VectorResults) -> Figure | None:
    """For every truth its best latent's smaller cosine, descending: one line per source of a replacement."""
    traces = [(row, source) for row in results.rows for source in row.sources if source.by_truth]
    if not traces:
        return None
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row.name for row, _ in traces))
    for row, source in traces:
        first = source is row.sources[0]
        shares = [100 * (i + 0.5) / len(source.by_truth) for i in range(len(source.by_truth))]
        axes.plot(
            shares,
            source.by_truth,
            color=hue(names.index(row.name)).light,
            ls="-" if first else "--",
            lw=1.5,
            label=row.name if first else None,
        )
    axes.axhline(0.5, color="0.6", ls=":", lw=1)
    axes.set_ylim(-0.05, 1.03)
    axes.set_xlabel("truths, % (best first)")
    axes.set_ylabel("smaller of encoder's and decoder's cosine")
    axes.set_title("how well each truth was found; below 0.5 it is missing", fontsize=10)
    axes.grid(True, color="0.92", lw=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def _save(figure: Figure | None, folder: Path) -> list[Path]:
    if figure is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    paths = [folder / f"recovery.{end}" for end in ("png", "svg")]
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "thresher"}):
        for path, metadata in zip(paths, ({"Software": None}, {"Date": None, "Creator": None}), strict=True):
            figure.savefig(path, dpi=160, metadata=metadata, facecolor=CARD_LIGHT)
    return paths


STYLE = f"""
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#f5f6f8, #14171b); color: light-dark(#1d2127, #e4e7eb); }}
section {{ background: light-dark({CARD_LIGHT}, {CARD_DARK}); border-radius: 8px; padding: .6rem 1.4rem 1.2rem;
  margin: 1.2rem 0; overflow-x: auto; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
td:first-child, th:first-child {{ text-align: left; }}
figure {{ margin: 0; background: #fff; border-radius: 6px; padding: .5rem; }}
figure svg {{ width: 100%; height: auto; max-height: 34rem; }}
.soft {{ color: light-dark(#5b636e, #a2abb6); }}
"""


def page(results: VectorResults, svg: str) -> str:
    """One self-contained file: table, picture, every source, what the words mean."""
    shown = columns(results)
    body = [(row.name, [cell(key, flat(row).get(key)) for key in shown]) for row in results.rows]
    names = [*SCORES, "duplicates", "missing", "missing_weight"]
    sources = [
        (
            f"{row.name}: {sites_label(source.reads)} → {sites_label(source.writes)}",
            [f"{source.l0:.2f}", f"{source.true_l0:.2f}", f"{source.dead:.3f}", str(source.found.truths)]
            + [cell(key, getattr(source.found, key)) for key in names]
            + [cell(key, getattr(source.null, key)) for key in ("encoder", "decoder")],
        )
        for row in results.rows
        for source in row.sources
    ]
    heads = ["L0", "true", "dead", "truths", *names, "encoder null", "decoder null"]
    picture = f"<section><h2>Truth by truth</h2><figure>{svg[svg.index('<svg') :]}</figure></section>" if svg else ""
    words = "".join(f"<p><b>{escape(key)}</b> {escape(text)}</p>" for key, text in DEFINITIONS.items())
    target = escape(str(results.provenance["target"]["name"]))
    notes = "".join(f"<p>{escape(note)}</p>" for note in results.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Dictionaries of {target}</title><style>{stylesheet()}{STYLE}</style></head><body>"
        f"<h1>Dictionaries of {target}</h1><p>Against the known solution ({escape(results.truths)}), on "
        f"{results.tokens:,} held-out rows of inputs.</p>{notes}"
        f"<section><h2>Results</h2>{_table('replacement', list(shown.values()), body)}</section>{picture}"
        f"<section><h2>Source by source</h2>{_table('source', heads, sources)}</section>"
        f"<section><h2>What the words mean</h2>{words}</section></body></html>\n"
    )


def _table(first: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in (first, *heads))
    lines = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(text)}</td>' for text in cells)}</tr>"
        for name, cells in rows
    )
    return f"<table><tr>{head}</tr>{lines}</table>"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
