"""The plots of a report as files for papers, PNG and SVG: loss and FVU against cost, by site, by position, write norms.

Points, fronts, baselines and ticks are those of the page (`views`, `scales`), colours and markers too (`palette`). Each
picture is a `Figure` of its own: no window, no state shared with a caller's pyplot. Text in the SVG is drawn as paths,
and neither file holds a date, so equal results give equal bytes under one version of matplotlib.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from thresher.evaluate import scales
from thresher.evaluate.columns import sites_label
from thresher.evaluate.headline import each_once, main_protocol
from thresher.evaluate.palette import CARD_LIGHT, hue
from thresher.evaluate.results import Results, Row
from thresher.evaluate.scales import Scale
from thresher.evaluate.views import AXES, MEASURES, Dot, Panel, buckets, families, panel, site_sets

DPI = 160
MAPS = 6
"""At most so many write-norm maps in one picture."""
DASHES = {"mean ablation": "--", "zero ablation": ":"}
AXIS = "l0"
"""The cost of the pictures' horizontal axis."""


def write_plots(results: Results, folder: Path) -> tuple[Path, ...]:
    """Draw every plot that there is something to draw for into `folder`, each as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    first = main_protocol(results)
    figures: dict[str, Figure | None] = {
        "delta_l0": delta_figure(results),
        "fvu_l0": fvu_figure(results),
        "fvu_sites": sites_figure(results, first, "fvu", "FVU on clean inputs"),
        "delta_sites": sites_figure(results, "single_site", "delta", "δ with one site patched at a time, nats"),
        "delta_positions": positions_figure(results, first),
        "write_norms": norms_figure(results),
    }
    paths: list[Path] = []
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "thresher"}):
        for name, figure in figures.items():
            if figure is not None:
                FigureCanvasAgg(figure)
                for end, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                    paths.append(folder / f"{name}.{end}")
                    figure.savefig(paths[-1], dpi=DPI, metadata=metadata)
    return tuple(paths)


# --- against cost ---------------------------------------------------------------------------------------------------


def delta_figure(results: Results) -> Figure | None:
    """δ against L0: a panel per protocol, a row of panels per set of written sites."""
    return _scatters(results, list(results.protocols), "delta")


def fvu_figure(results: Results) -> Figure | None:
    """FVU against L0; the same under every protocol, since both are measured on clean inputs."""
    return _scatters(results, [main_protocol(results)], "fvu")


def _scatters(results: Results, protocols: Sequence[str], measure: str) -> Figure | None:
    rows = [[panel(results, protocol, sites) for protocol in protocols] for sites in site_sets(results)]
    rows = [line for line in rows if all(measure in one.y for one in line)]
    if not rows:
        return None
    wide = 5.2 if len(protocols) == 1 else 3.6 * len(protocols)
    figure = Figure(figsize=(1.2 + wide, 0.9 + 3.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(protocols), squeeze=False, sharey="row")
    kind = "log" if MEASURES[measure].log else "linear"
    for line, panels in zip(grid, rows, strict=True):
        heights = [one.y[measure][kind].scale for one in panels]
        common = _common(heights)
        for axes, one in zip(line, panels, strict=True):
            where = f", {sites_label(one.sites)}" if len(rows) > 1 else ""
            title = ("clean inputs" if measure == "fvu" else one.protocol) + where
            _scatter(axes, one, measure, common, families(results), title)
        line[0].set_ylabel(MEASURES[measure].title)
    _legend(figure, grid.flat, families(results))
    return figure


def _common(heights: Sequence[Scale]) -> Scale:
    """One scale for panels beside each other."""
    low, high = min(one.low for one in heights), max(one.high for one in heights)
    ticks = scales.log_ticks(low, high) if heights[0].log else scales.linear_ticks(low, high)
    return Scale(low, high, heights[0].log, tuple((tick, scales.plain(tick)) for tick in ticks))


def _scatter(axes: Axes, one: Panel, measure: str, y: Scale, order: Sequence[str], title: str) -> None:
    _axis(axes, "x", one.x[AXIS], AXES[AXIS].title)
    _axis(axes, "y", y, "")
    dots = [dot for dot in one.dots if measure in dot.y]
    front = sorted(_at(dot, measure, y) for dot in dots if dot.row in one.fronts[AXIS].get(measure, ()))
    if front:
        cost, loss = [*(x for x, _ in front), one.x[AXIS].high], [*(v for _, v in front), front[-1][1]]
        axes.step(cost, loss, where="post", color="#F5DFB0", lw=5, zorder=1, label="Pareto front")
    flat = one.y[measure]["linear"].flat
    for value, name in flat:
        if y.low <= value <= y.high:
            axes.axhline(value, color="0.45", ls=DASHES.get(name, "-."), lw=1, label=name, zorder=2)
    far = ", ".join(f"{name} {value:.3g}" for value, name in flat if value > y.high)
    if far:
        axes.text(1, 1.01, f"↑ {far}", transform=axes.transAxes, ha="right", va="bottom", fontsize=7.5, color="0.35")
    axes.set_title(title, fontsize=10, pad=17 if far else 6)
    for own in _traces([dot for dot in one.trails if measure in dot.y]):
        points = [_at(dot, measure, y) for dot in own]
        axes.plot(
            *zip(*points, strict=True), color="0.45", ls=(0, (1, 2)), lw=1, marker=".", label=own[0].trace, zorder=2
        )
    for seeds in one.seeds:
        if measure in seeds.reach:
            low, high = (max(end, y.low) for end in seeds.reach[measure])
            x = seeds.x[AXIS]
            colour = hue(seeds.family).light
            spread = [[0.0], [high - low]]
            axes.errorbar([x], [low], yerr=spread, color=colour, capsize=7, lw=1.2, ls="none", alpha=0.8, zorder=2)
    for own in _traces(dots):
        _trace(axes, own, measure, y, order)


def _at(dot: Dot, measure: str, y: Scale) -> tuple[float, float]:
    return dot.x[AXIS], max(dot.y[measure], y.low) if y.log else dot.y[measure]


def _traces(dots: Sequence[Dot]) -> list[list[Dot]]:
    out: dict[str, list[Dot]] = {}
    for dot in dots:
        out.setdefault(dot.trace, []).append(dot)
    return [sorted(own, key=lambda dot: dot.x[AXIS]) for own in out.values()]


def _trace(axes: Axes, own: Sequence[Dot], measure: str, y: Scale, order: Sequence[str]) -> None:
    family = own[0].family
    points = [_at(dot, measure, y) for dot in own]
    spans = [dot.span.get(measure, (dot.y[measure],) * 2) for dot in own]
    low = [max(0.0, v - (max(s[0], y.low) if y.log else s[0])) for (_, v), s in zip(points, spans, strict=True)]
    high = [max(0.0, s[1] - v) for (_, v), s in zip(points, spans, strict=True)]
    axes.errorbar(
        [x for x, _ in points],
        [v for _, v in points],
        yerr=[low, high],
        capsize=2.5,
        elinewidth=1,
        zorder=3,
        **_style(family),
        label=order[family],
    )


def _style(family: int) -> dict[str, Any]:
    one = hue(family)
    return {"color": one.light, "marker": one.marker, "ms": 5.5, "lw": 1, "mec": CARD_LIGHT, "mew": 0.6}


# --- by site and position -------------------------------------------------------------------------------------------

Entries = Callable[[Row], Sequence[tuple[str, float]]]


def sites_figure(results: Results, protocol: str, key: str, title: str) -> Figure | None:
    """A metric by written site, one line per replacement; None where that protocol was not run."""

    def entries(row: Row) -> list[tuple[str, float]]:
        return [(site["site"], site[key]) for site in row.per_site if site.get(key) is not None]

    rows = [row for row in results.table(protocol) if row.kind == "replacement"]
    names = sorted({name for row in rows for name, _ in entries(row)})
    return _strip(results, rows, entries, names, title, log=key == "delta")


def positions_figure(results: Results, protocol: str) -> Figure | None:
    """δ by position in the context, one line per replacement; None where positions are unknown."""

    def entries(row: Row) -> list[tuple[str, float]]:
        pairs = zip(buckets(row), row.positions["delta"], strict=True)
        return [(name, value) for name, value in pairs if value is not None]

    rows = [row for row in results.table(protocol) if row.kind == "replacement" and row.positions.get("delta")]
    names = list(dict.fromkeys(name for row in rows for name in buckets(row)))
    return _strip(
        results, rows, entries, names, f"δ under {protocol}, nats", log=True, x_title="Position in the context"
    )


def _strip(
    results: Results,
    rows: Sequence[Row],
    entries: Entries,
    names: Sequence[str],
    title: str,
    log: bool,
    x_title: str = "",
) -> Figure | None:
    values = [value for row in rows for _, value in entries(row)]
    if not values:
        return None
    figure = Figure(figsize=(max(5.0, 2.2 + 0.8 * len(names)), 4.2), layout="constrained")
    axes, order = figure.subplots(), families(results)
    y = scales.logarithmic(values) if log else scales.linear(values)
    for row in rows:
        points = [(names.index(name), max(value, y.low) if log else value) for name, value in entries(row)]
        if points:
            axes.plot(*zip(*points, strict=True), **_style(order.index(row.family)), alpha=0.85, label=row.family)
    _axis(axes, "y", y, title)
    turned = any(len(name) > 12 for name in names) or len(names) > 8
    axes.set_xticks(range(len(names)), names, rotation=35 if turned else 0, ha="right" if turned else "center")
    axes.set_xlim(-0.4, len(names) - 0.6)
    axes.set_xlabel(x_title)
    _legend(figure, [axes], order)
    return figure


# --- write norms ----------------------------------------------------------------------------------------------------


def norms_figure(results: Results) -> Figure | None:
    """Share of squared decoder norm by source and target layer, of dictionaries that write to several sites."""
    maps = [(row.name, one) for row in each_once(results) for one in row.write_norms][:MAPS]
    if not maps:
        return None
    side = 1.2 + 0.42 * max(len(one["writes"]) for _, one in maps)
    columns = min(len(maps), 3)
    lines = -(-len(maps) // columns)
    figure = Figure(figsize=(columns * (side + 0.5), lines * (side + 0.4)), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    for axes, (name, one) in zip(grid.flat, maps, strict=False):
        share = [[float("nan") if value is None else 100 * value for value in line] for line in one["share"]]
        axes.imshow(share, cmap="Blues", vmin=0, vmax=2 * max(v for line in share for v in line if v == v))
        for i, line in enumerate(share):
            for j, value in enumerate(line):
                if value == value:
                    axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(one["writes"])), [site.partition(".")[0] for site in one["writes"]], fontsize=8)
        axes.set_yticks(range(len(one["reads"])), [site.partition(".")[0] for site in one["reads"]], fontsize=8)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("to", fontsize=8)
        axes.set_ylabel("from (% of squared norm)", fontsize=8)
    return figure


# --- axes -----------------------------------------------------------------------------------------------------------


def _axis(axes: Axes, which: str, scale: Scale, title: str) -> None:
    """Range, ticks and title of one axis as the page has them."""
    names = dict(scale.ticks)
    if scale.log:
        getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(scale.low, scale.high)
    if title:
        getattr(axes, f"set_{which}label")(title)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator([value for value, _ in scale.ticks]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: names.get(value, f"{value:g}")))
    axes.grid(True, which="major", color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Figure, panels: Any, order: Sequence[str]) -> None:
    """One legend under all panels, families first."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    found = {name: found[name] for name in sorted(found, key=lambda name: (name not in order, list(found).index(name)))}
    longest = max(map(len, found), default=1)
    columns = max(1, min(len(found), int(figure.get_figwidth() / (0.55 + 0.085 * longest))))
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
    )
