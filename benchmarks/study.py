"""The study of docs/study.md: firing rules on three topologies at one sparsity, and training through the model.

Runs the bundled recipe from text to report (`thresher demo books-study`, which goes on where it was stopped),
and makes of its results.json and documents.npz the page's tables and figures: per rule and topology the mean over
seeds with its interval (95 % of the bootstrap over documents) and the smallest and largest seed; and what rules differ
by, with intervals in which both sides share each draw of documents.

    python benchmarks/study.py                    # writes docs/study/
    python benchmarks/study.py --out DIR --only-summary

From nothing it took 48 minutes on two shared cores, 37 of them processor time, beside other work.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from thresher.evaluate.arms import patched_label
from thresher.evaluate.paired import segments_from
from thresher.evaluate.passes import CLEAN
from thresher.evaluate.verdict import Draw, Judge

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
    sites: Sequence[str]
    """Patched ones."""
    names: list[str]
    """Of the sets, in the order of seeds, as everything below."""
    seeds: list[int]
    l0: list[float]
    """On clean inputs."""
    l0_patched: list[float]
    """Of the codes that arise under cascade."""
    fvu: list[float]
    dead: list[float]
    delta: Mapping[str, list[float]]
    """By protocol."""
    interval: Mapping[str, list[tuple[float, float]]]
    """95 % of the paired bootstrap over documents, by protocol and seed."""


Cells = Mapping[tuple[str, str], Cell]
Judges = Mapping[str, Judge]


def rule_and_kind(name: str) -> tuple[str, str]:
    """From a run's label; `kl-cascade` and its like count as rules."""
    through = re.fullmatch(r"kl-(transcoder|clt)-(\w+?)(-seed\d+)?", name)
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
        lists: list[list[Any]] = [[] for _ in range(6)]
        empty = Cell(*key, row["sites"], *lists, {p: [] for p in PROTOCOLS}, {p: [] for p in PROTOCOLS})
        cell = found.setdefault(key, empty)
        cell.delta[row["protocol"]].append(row["metrics"]["delta"])
        cell.interval[row["protocol"]].append(tuple(row["intervals"]["delta"]))
        if row["protocol"] == "cascade":
            cell.names.append(row["name"])
            cell.seeds.append(row["facts"]["seed"])
            for metric in ("l0", "l0_patched", "fvu", "dead"):
                getattr(cell, metric).append(row["metrics"][metric])
    return found


def judges_of(report: Path, results: Mapping[str, Any]) -> Judges:
    """By protocol, with the bootstrap of the report."""
    with np.load(report / "documents.npz") as arrays:
        segments = segments_from(dict(arrays))
    settings = results["provenance"]["evaluate"]
    draw = Draw(settings["resamples"], settings["seed"])
    by_document = bool((segments.document >= 0).all())
    return {protocol: Judge(segments, protocol, by_document, draw) for protocol in PROTOCOLS}


def arm(judge: Judge, protocol: str, cell: Cell, seeds: Sequence[int]) -> np.ndarray:
    """Sums of a rule, the mean of some seeds."""
    names = [name for name, seed in zip(cell.names, cell.seeds, strict=True) if seed in seeds]
    sites = cell.sites if protocol == "single_site" else [None]
    found = judge.arm([patched_label(protocol, name, site) for name in names for site in sites])
    assert found is not None, names
    return found


def mean_delta(judge: Judge, protocol: str, cell: Cell, seeds: Sequence[int]) -> str:
    """δ of the mean of some seeds and its interval."""
    clean = judge.arm([CLEAN])
    assert clean is not None
    value, (low, high) = judge.difference(clean, arm(judge, protocol, cell, seeds))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def apart(judge: Judge, protocol: str, first: Cell, second: Cell) -> str:
    """δ of the second minus δ of the first, means over the seeds that both have, with the paired interval."""
    seeds = sorted({*first.seeds} & {*second.seeds})
    value, (low, high) = judge.difference(*(arm(judge, protocol, cell, seeds) for cell in (first, second)))
    return f"{_signed(value)} [{_signed(low)}, {_signed(high)}]"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, with the smallest and largest of several."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} {_seeds(values, digits)}"


def _seeds(values: Sequence[float], digits: int = 3) -> str:
    return f"({min(values):.{digits}f} to {max(values):.{digits}f})"


def ordered(found: Cells, kind: str) -> list[Cell]:
    """The rules on a topology, the smallest δ under cascade first."""
    of_kind = [found[rule, kind] for rule in RULES if (rule, kind) in found]
    return sorted(of_kind, key=lambda cell: statistics.fmean(cell.delta["cascade"]))


def rules_table(found: Cells, judges: Judges) -> str:
    """Markdown: a line per topology and rule."""
    lines = [
        "| topology | rule | L0 | L0 in cascade | FVU | dead | δ cascade | δ clean_input | δ single_site |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, title in KINDS.items():
        for cell in ordered(found, kind):
            deltas = " | ".join(
                f"{mean_delta(judges[protocol], protocol, cell, cell.seeds)} {_seeds(cell.delta[protocol])}"
                for protocol in PROTOCOLS
            )
            lines.append(
                f"| {title} | {cell.rule} | {spread(cell.l0, 1)} | {statistics.fmean(cell.l0_patched):.1f} | "
                f"{spread(cell.fvu)} | {100 * statistics.fmean(cell.dead):.1f} % | {deltas} |"
            )
    return "\n".join(lines) + "\n"


def differences_table(found: Cells, judges: Judges) -> str:
    """Markdown: δ of a rule minus that of others on its topology, and minus that of other topologies with the rule."""
    lines = [
        "| topology | rule | − topk, cascade | − topk, clean_input | − topk, single_site | − batchtopk, cascade | "
        "− transcoder, cascade | − SAE, cascade |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, title in KINDS.items():
        for cell in ordered(found, kind):
            against = [(found["topk", kind], protocol) for protocol in PROTOCOLS]
            others = (found["batchtopk", kind], found[cell.rule, "transcoder"], found[cell.rule, "sae"])
            against += [(other, "cascade") for other in others]
            values = [apart(judges[p], p, other, cell) if other is not cell else "" for other, p in against]
            lines.append(f"| {title} | {cell.rule} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def modes_table(found: Cells, judges: Judges) -> str:
    """Markdown: what a dictionary was trained for against how it is judged; then δ minus that of local training."""
    lines = [
        "| trained | topology | seeds | L0 | L0 in cascade | FVU | δ cascade | δ clean_input | δ single_site |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    minus = [
        "| trained | topology | − locally, cascade | − locally, clean_input | − locally, single_site |",
        "|---|---|---|---|---|",
    ]
    for kind in ("transcoder", "clt"):
        local = found["batchtopk", kind]
        for rule, title in (("batchtopk", "locally"), *((f"kl {mode}", f"KL, {mode}") for mode in MODES)):
            cell = found[rule, kind]
            deltas = [mean_delta(judges[p], p, cell, cell.seeds) for p in PROTOCOLS]
            lines.append(
                f"| {title} | {KINDS[kind]} | {len(cell.seeds)} | {statistics.fmean(cell.l0):.1f} | "
                f"{statistics.fmean(cell.l0_patched):.1f} | {statistics.fmean(cell.fvu):.3f} | {' | '.join(deltas)} |"
            )
            if cell is not local:
                values = [apart(judges[p], p, local, cell) for p in PROTOCOLS]
                minus.append(f"| {title} | {KINDS[kind]} | {' | '.join(values)} |")
    return "\n".join([*lines, "", *minus]) + "\n"


def draw_rules(found: Cells, path: Path) -> None:
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


def _labels(order: Sequence[str], found: Cells) -> list[str]:
    """Rules with the mean L0 of each topology."""
    return [
        f"{rule}\n" + " / ".join(f"{statistics.fmean(found[rule, k].l0):.0f}" for k in KINDS if (rule, k) in found)
        for rule in order
    ]


def draw_modes(found: Cells, path: Path) -> None:
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
                for seed, value, (low, high) in zip(
                    cell.seeds, cell.delta[protocol], cell.interval[protocol], strict=True
                ):
                    x = at + 0.18 * (column - 1.5) + 0.04 * (seed - 1)
                    axis.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.7)
                    axis.plot(x, value, "o", color=colour, markersize=4)
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
    results = json.loads((options.out / "report" / "results.json").read_text())
    found, judges = cells(results), judges_of(options.out / "report", results)
    matplotlib.rcParams["svg.hashsalt"] = "thresher"  # the same figures are the same bytes
    options.page.mkdir(parents=True, exist_ok=True)
    tables = {"rules": rules_table, "differences": differences_table, "modes": modes_table}
    for name, table in tables.items():
        text = table(found, judges)
        (options.page / f"{name}.md").write_text(text)
        print(text)
    draw_rules(found, options.page / "rules")
    draw_modes(found, options.page / "modes")


if __name__ == "__main__":
    main()
