"""The plots of a report as PNG files: δ against L0 per protocol, FVU against L0, and both by site.

Colours are Okabe and Ito's, told apart by colour-blind readers too, and every family has its own marker besides. Each
picture is a `Figure` of its own drawn by Agg: no window, no state shared with a caller's pyplot.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from thresher.evaluate.columns import FRONT_AXIS, sites_label
from thresher.evaluate.results import Results, Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FLOOR = 1e-4
"""δ below this is drawn at it: a log axis has no zero."""
DPI = 160


def write_plots(results: Results, folder: Path) -> tuple[Path, ...]:
    """Draw every plot into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "delta_l0.png": delta_figure(results),
        "fvu_l0.png": fvu_figure(results),
        "fvu_sites.png": sites_figure(results, next(iter(results.protocols)), "fvu", "FVU on clean inputs"),
    }
    if "single_site" in results.protocols:
        title = "δ with one site patched at a time, nats"
        figures["delta_sites.png"] = sites_figure(results, "single_site", "delta", title)
    paths = []
    for name, figure in figures.items():
        FigureCanvasAgg(figure)
        paths.append(folder / name)
        figure.savefig(paths[-1], dpi=DPI)
    return tuple(paths)


def families(results: Results) -> list[str]:
    """Families in the order that fixes their colour."""
    return sorted({row.family for row in results.rows if row.kind == "replacement"})


def site_sets(results: Results) -> list[tuple[str, ...]]:
    """Sets of written sites; each is a comparison of its own."""
    return sorted({row.sites for row in results.rows if row.kind == "replacement"})


def front_of(rows: Sequence[Row]) -> list[Row]:
    """The rows on the front of δ against L0, by rising L0."""
    return sorted((row for row in rows if row.front.get(FRONT_AXIS)), key=lambda row: row.cost["l0"])


def delta_figure(results: Results) -> Figure:
    """δ against L0: a panel per protocol, a row of panels per set of written sites."""
    sets, protocols = site_sets(results), list(results.protocols)
    figure = Figure(figsize=(1.2 + 3.6 * len(protocols), 0.9 + 3.6 * len(sets)), layout="constrained")
    grid = figure.subplots(len(sets), len(protocols), squeeze=False, sharey="row")
    for line, sites in zip(grid, sets, strict=True):
        for axes, protocol in zip(line, protocols, strict=True):
            _delta_panel(axes, results, protocol, sites)
            if len(sets) > 1:
                axes.set_title(f"{protocol}, {sites_label(sites)}", fontsize=10)
        line[0].set_ylabel("δ = CE patched − CE clean, nats")
    _legend(figure, grid[0][0])
    return figure


def _delta_panel(axes: Axes, results: Results, protocol: str, sites: tuple[str, ...]) -> None:
    rows = [row for row in results.table(protocol) if row.sites == sites and row.metrics["delta"] is not None]
    replacements = [row for row in rows if row.kind == "replacement"]
    _points(axes, results, replacements, "delta", intervals=True)
    front = front_of(replacements)
    if front:
        cost, delta = [row.cost["l0"] for row in front], [_shown(row) for row in front]
        cost, delta = [*cost, 1.2 * max(row.cost["l0"] for row in replacements)], [*delta, delta[-1]]
        axes.step(cost, delta, where="post", color="#F5DFB0", lw=5, zorder=1, label="Pareto front")
    for row in results.rows:
        delta_of_row = row.metrics["delta"]
        baseline = row.kind == "baseline" and row.protocol == protocol and set(row.sites) == set(sites)
        if baseline and row.name != "clean" and delta_of_row is not None and delta_of_row > 0:
            style = "--" if row.name == "mean" else ":"
            axes.axhline(delta_of_row, color="0.45", ls=style, lw=1, label=f"{row.name} ablation")
    _log_axes(axes, y=True)
    axes.set_title(protocol, fontsize=10)


def _shown(row: Row) -> float:
    return max(row.metrics["delta"] or 0.0, FLOOR)


def fvu_figure(results: Results) -> Figure:
    """FVU against L0; the same under every protocol, since both are measured on clean inputs."""
    sets = site_sets(results)
    figure = Figure(figsize=(0.9 + 4.6 * len(sets), 4.4), layout="constrained")
    grid = figure.subplots(1, len(sets), squeeze=False, sharey=True)
    first = next(iter(results.protocols))
    for axes, sites in zip(grid[0], sets, strict=True):
        rows = [r for r in results.table(first) if r.kind == "replacement" and r.sites == sites]
        _points(axes, results, [row for row in rows if row.metrics["fvu"] is not None], "fvu")
        _log_axes(axes, y=False)
        axes.set_ylim(bottom=0)
        axes.set_title(sites_label(sites), fontsize=10)
    grid[0][0].set_ylabel("FVU, mean over sites (clean inputs)")
    _legend(figure, grid[0][0])
    return figure


def sites_figure(results: Results, protocol: str, key: str, title: str) -> Figure:
    """A metric by written site, one line per replacement."""
    rows = [row for row in results.table(protocol) if row.kind == "replacement"]
    names = sorted({site for row in rows for site in row.sites})
    figure = Figure(figsize=(max(5.0, 2.2 + 0.8 * len(names)), 4.2), layout="constrained")
    axes = figure.subplots()
    order = families(results)
    for row in rows:
        index = order.index(row.family) % len(COLOURS)
        points = [(names.index(p["site"]), p[key]) for p in row.per_site if p.get(key) is not None]
        if key == "delta":
            points = [(x, max(y, FLOOR)) for x, y in points]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            marker=MARKERS[index],
            color=COLOURS[index],
            lw=1,
            ms=5,
            alpha=0.85,
            label=row.family,
        )
    if key == "delta":
        _log_y(axes)
    else:
        axes.set_ylim(bottom=0)
    turned = any(len(name) > 12 for name in names) or len(names) > 8
    axes.set_xticks(range(len(names)), names, rotation=35 if turned else 0, ha="right" if turned else "center")
    axes.set_ylabel(title)
    axes.set_xlim(-0.4, len(names) - 0.6)
    _tidy(axes)
    _legend(figure, axes)
    return figure


def _points(axes: Axes, results: Results, rows: Sequence[Row], key: str, intervals: bool = False) -> None:
    order = families(results)
    for family in order:
        own = sorted((row for row in rows if row.family == family), key=lambda row: row.cost["l0"])
        if not own:
            continue
        index = order.index(family) % len(COLOURS)
        x = [row.cost["l0"] for row in own]
        y = [_shown(row) if key == "delta" else float(row.metrics[key] or 0.0) for row in own]
        style = {"color": COLOURS[index], "marker": MARKERS[index], "ms": 6, "lw": 1, "label": family, "zorder": 3}
        if not intervals:
            axes.plot(x, y, **style)  # type: ignore[arg-type]
            continue
        ends = [row.intervals.get("delta") for row in own]
        low = [max(0.0, v - max(e.low, FLOOR)) if e else 0.0 for v, e in zip(y, ends, strict=True)]
        high = [max(0.0, e.high - v) if e else 0.0 for v, e in zip(y, ends, strict=True)]
        axes.errorbar(x, y, yerr=[low, high], capsize=2.5, elinewidth=1, **style)  # type: ignore[arg-type]


def _log_axes(axes: Axes, *, y: bool) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("L0: active latents per token and source")
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    if y:
        _log_y(axes)
    _tidy(axes)


def _log_y(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain(value: float, position: int) -> str:
    return f"{value:g}"


def _tidy(axes: Axes) -> None:
    axes.grid(True, which="major", color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(reversed(labels), reversed(handles), strict=True))  # the first of each label
    names = list(dict.fromkeys(labels))
    longest = max(map(len, names), default=1)
    columns = max(1, min(len(names), int(figure.get_figwidth() / (0.55 + 0.085 * longest))))
    figure.legend(
        [unique[name] for name in names], names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
    )
