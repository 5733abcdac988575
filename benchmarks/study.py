"""The study of docs/study.md: firing rules on three topologies at one sparsity, and training through the model.

Runs the bundled recipe from text to report (`thresher demo books-study`, which goes on where it was stopped),
and makes of its results.json the page's tables and figures: per rule and topology the mean over seeds with the smallest
and largest, beside it the mean bootstrap interval of one run.

    python benchmarks/study.py                    # writes docs/study/ (how long has not been measured)
    python benchmarks/study.py --out DIR --only-summary
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

PAGE = Path(__file__).parents[1] / "docs" / "study"
PROTOCOLS = ("cascade", "clean_input", "single_site")
KINDS = {"sae": "SAE", "transcoder": "transcoder", "clt": "CLT"}
RULES = ("topk", "batchtopk", "groupmax", "global", "matryoshka", "jumprelu", "gated", "relu", "p-anneal")
COLOURS = {"sae": "#1b7f79", "transcoder": "#b5541c", "clt": "#4a4fa3"}
MODES = ("cascade", "clean_input", "single_site")


class Cell(NamedTuple):
    """All seeds of one rule on one topology."""

    rule: str
    kind: str
    l0: list[float]
    fvu: list[float]
    dead: list[float]
    delta: Mapping[str, list[float]]
    """By protocol, in the order of seeds."""
    interval: Mapping[str, list[tuple[float, float]]]
    """95 % of the paired bootstrap over documents, by protocol and seed."""


def rule_and_kind(name: str) -> tuple[str, str]:
    """From a run's label; `kl-cascade` and its like count as rules."""
    through = re.fullmatch(r"kl-(transcoder|clt)-(\w+)", name)
    if through:
        return f"kl {through[2]}", through[1]
    parts = re.split(r"-seed|-prefixes", name)[0]
    kind = next(kind for kind in KINDS if kind in parts.split("-"))
    return parts.replace(f"{kind}-", "").replace(f"-{kind}", ""), kind


def cells(results: Mapping[str, Any]) -> dict[tuple[str, str], Cell]:
    """Every rule on every topology."""
    found: dict[tuple[str, str], Cell] = {}
    for row in results["rows"]:
        if row["kind"] != "replacement":
            continue
        key = rule_and_kind(row["name"])
        cell = found.setdefault(key, Cell(*key, [], [], [], {p: [] for p in PROTOCOLS}, {p: [] for p in PROTOCOLS}))
        cell.delta[row["protocol"]].append(_delta(row))
        cell.interval[row["protocol"]].append(_interval(row))
        if row["protocol"] == "clean_input":
            for values, metric in ((cell.l0, "l0"), (cell.fvu, "fvu"), (cell.dead, "dead")):
                values.append(row["metrics"][metric])
    return found


def _delta(row: Mapping[str, Any]) -> float:
    return float(row["metrics"]["delta"])


def _interval(row: Mapping[str, Any]) -> tuple[float, float]:
    low, high = row["intervals"]["delta"]
    return float(low), float(high)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, with the smallest and largest of several."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def half(intervals: Iterable[tuple[float, float]]) -> str:
    """Mean half-width of intervals."""
    return f"±{statistics.fmean((high - low) / 2 for low, high in intervals):.3f}"


def rules_table(found: Mapping[tuple[str, str], Cell]) -> str:
    """Markdown: a line per topology and rule, the smallest δ under cascade first."""
    lines = [
        "| topology | rule | L0 | FVU | dead | δ cascade | δ clean_input | δ single_site | interval, cascade |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, title in KINDS.items():
        of_kind = [found[rule, kind] for rule in RULES if (rule, kind) in found]
        for cell in sorted(of_kind, key=lambda cell: statistics.fmean(cell.delta["cascade"])):
            deltas = " | ".join(spread(cell.delta[protocol]) for protocol in PROTOCOLS)
            lines.append(
                f"| {title} | {cell.rule} | {spread(cell.l0, 1)} | {spread(cell.fvu)} | "
                f"{100 * statistics.fmean(cell.dead):.1f} % | {deltas} | {half(cell.interval['cascade'])} |"
            )
    return "\n".join(lines) + "\n"


def modes_table(found: Mapping[tuple[str, str], Cell]) -> str:
    """Markdown: what a dictionary was trained for against how it is judged."""
    lines = [
        "| trained | topology | L0 | FVU | δ cascade | δ clean_input | δ single_site |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("transcoder", "clt"):
        for rule, title in (("batchtopk", "locally"), *((f"kl {mode}", f"KL, {mode}") for mode in MODES)):
            if (rule, kind) in found:
                cell = found[rule, kind]
                values = " | ".join(
                    f"{cell.delta[protocol][0]:.3f} [{cell.interval[protocol][0][0]:.3f}, "
                    f"{cell.interval[protocol][0][1]:.3f}]"
                    for protocol in PROTOCOLS
                )
                lines.append(f"| {title} | {KINDS[kind]} | {cell.l0[0]:.1f} | {cell.fvu[0]:.3f} | {values} |")
    return "\n".join(lines) + "\n"


def draw_rules(found: Mapping[tuple[str, str], Cell], path: Path) -> None:
    """δ of every rule and topology, a panel per protocol; dots are seeds, lines the interval of each."""
    order = sorted(
        RULES,
        key=lambda r: -statistics.fmean(v for k in KINDS if (r, k) in found for v in found[r, k].delta["cascade"]),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, protocol in zip(axes, PROTOCOLS, strict=True):
        for at, rule in enumerate(order):
            for shift, kind in zip((-0.22, 0.0, 0.22), KINDS, strict=True):
                if (rule, kind) not in found:
                    continue
                cell = found[rule, kind]
                for seed, (value, (low, high)) in enumerate(
                    zip(cell.delta[protocol], cell.interval[protocol], strict=True)
                ):
                    y = at + shift + 0.05 * (seed - 1)
                    axis.plot([low, high], [y, y], color=COLOURS[kind], linewidth=0.8, alpha=0.6)
                    axis.plot(value, y, "o", color=COLOURS[kind], markersize=3.2)
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis)
        axis.set_xlabel(f"δ under {protocol}, nats")
        axis.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes[0].set_yticks(range(len(order)), _labels(order, found))
    handles = [plt.Line2D([], [], marker="o", color=COLOURS[kind], label=title) for kind, title in KINDS.items()]
    axes[-1].legend(handles=handles, frameon=False, loc="best")
    _save(figure, path)


def _labels(order: Sequence[str], found: Mapping[tuple[str, str], Cell]) -> list[str]:
    """Rules with the mean L0 of each topology."""
    return [
        f"{rule}\n" + " / ".join(f"{statistics.fmean(found[rule, k].l0):.0f}" for k in KINDS if (rule, k) in found)
        for rule in order
    ]


def draw_modes(found: Mapping[tuple[str, str], Cell], path: Path) -> None:
    """δ by training and protocol, a panel per topology."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    trained = ["batchtopk", *(f"kl {mode}" for mode in MODES)]
    shades = ("#2b2b2b", "#b5541c", "#1b7f79", "#4a4fa3")
    for axis, kind in zip(axes, ("transcoder", "clt"), strict=True):
        for column, (rule, colour) in enumerate(zip(trained, shades, strict=True)):
            if (rule, kind) not in found:
                continue
            cell = found[rule, kind]
            for at, protocol in enumerate(PROTOCOLS):
                low, high = cell.interval[protocol][0]
                x = at + 0.16 * (column - 1.5)
                axis.plot([x, x], [low, high], color=colour, linewidth=1)
                axis.plot(x, cell.delta[protocol][0], "o", color=colour, markersize=5)
        axis.set_xticks(range(3), PROTOCOLS)
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)
        axis.set_title(KINDS[kind])
        axis.set_xlabel("judged under")
        axis.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes[0].set_ylabel("δ, nats")
    names = ["local", *(f"KL, {mode}" for mode in MODES)]
    handles = [plt.Line2D([], [], marker="o", color=c, label=n) for c, n in zip(shades, names, strict=True)]
    axes[1].legend(handles=handles, frameon=False, title="trained")
    _save(figure, path)


def _plain_ticks(axis: Any) -> None:
    """Few ticks of a logarithmic axis, written as numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _save(figure: Any, path: Path) -> None:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"), help="where cache, runs and report go")
    parser.add_argument("--page", type=Path, default=PAGE, help="where tables and figures go")
    parser.add_argument("--only-summary", action="store_true", help="the report is there already")
    options = parser.parse_args()
    if not options.only_summary:
        command = [sys.executable, "-m", "thresher", "demo", "books-study", "--out", str(options.out)]
        subprocess.run(command, check=True)
    found = cells(json.loads((options.out / "report" / "results.json").read_text()))
    options.page.mkdir(parents=True, exist_ok=True)
    (options.page / "rules.md").write_text(rules_table(found))
    (options.page / "modes.md").write_text(modes_table(found))
    draw_rules(found, options.page / "rules")
    draw_modes(found, options.page / "modes")
    print(rules_table(found), modes_table(found), sep="\n")


if __name__ == "__main__":
    main()
