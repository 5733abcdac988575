"""The study's figures, drawn from data. Colours and markers are those of the reports (`evaluate/palette.py`).

Every figure is a `Figure` of its own, without a window and without the caller's pyplot; `save` writes it as PNG and SVG
without a date, so equal data give equal bytes under one version of matplotlib.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from thresher.evaluate.palette import CARD_LIGHT, hue

DPI = 160
LOSS = "loss per feature, L/p"
Points = Sequence[tuple[float, float]]
Trace = tuple[str, Points]


def save(named: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write every figure as NAME.png and NAME.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "thresher"}):
        for name, figure in named.items():
            FigureCanvasAgg(figure)
            for end, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                paths.append(folder / f"{name}.{end}")
                figure.savefig(paths[-1], dpi=DPI, metadata=metadata, facecolor=CARD_LIGHT)
    return paths


def loss_curves(
    traces: Sequence[Trace],
    x_title: str,
    *,
    dashed: Sequence[Trace] = (),
    level: tuple[str, float] | None = None,
    log: bool = True,
    title: str = "measured under Bernoulli inputs",
) -> Figure:
    """L/p against something, one line per trace; `level` is a horizontal one."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    _curves(axes, traces, dashed, log=log)
    _level(axes, level)
    _labels(axes, x_title, LOSS, title)
    _legend(figure, [axes])
    return figure


def loss_panels(panels: Sequence[tuple[str, Sequence[Trace], Sequence[Trace]]], x_title: str) -> Figure:
    """Panels of one height beside each other, each measured in one mode."""
    figure = Figure(figsize=(4.4 * len(panels), 4.4), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, traces, dashed) in zip(grid, panels, strict=True):
        _curves(axes, traces, dashed, log=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _labels(axes, x_title, LOSS if axes is grid[0] else "", title)
    _legend(figure, grid)
    return figure


def sparsity_curves(models: Sequence[tuple[str, float, Points]], naive: float) -> Figure:
    """Log-log L/p against p of models from sparse (dark) to dense; a dot and a dotted line where each trained."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"](np.linspace(0.02, 0.86, len(models)))
    for colour, (name, p, points) in zip(colours, models, strict=True):
        axes.plot(*zip(*points, strict=True), color=colour, lw=1.5, label=f"trained at {name}")
        axes.axvline(p, color=colour, ls=":", lw=0.9, zorder=1)
        nearest = int(np.abs(np.log([x / p for x, _ in points])).argmin())
        axes.plot([p], [points[nearest][1]], color=colour, marker="o", ms=5, mec=CARD_LIGHT, zorder=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.14]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    _level(axes, ("naive", naive))
    _labels(axes, "p of the inputs", LOSS, "measured under Bernoulli inputs")
    _legend(figure, [axes])
    return figure


def input_output(views: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Output f for x = a e_f, a from -1 to 1, a line per feature."""
    figure = Figure(figsize=(4.2 * len(views), 4.0), layout="constrained")
    grid = figure.subplots(1, len(views), sharey=True, squeeze=False)[0]
    for axes, (title, (slopes, below)) in zip(grid, views.items(), strict=True):
        for up, down in zip(slopes, below, strict=True):
            axes.plot([-1, 0, 1], [down, 0, up], color=hue(0).light, lw=0.8, alpha=0.45)
        axes.plot([-1, 0, 1], [0, 0, 1], color="0.25", lw=1.2, ls="--", label="relu")
        axes.plot([], [], color=hue(0).light, lw=1.2, label="a feature's own output")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _labels(axes, "input a of the only active feature", "its output" if axes is grid[0] else "", title)
    _legend(figure, grid)
    return figure


def stacked_gains(views: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Per feature f the pieces W_in[f, k] W_out[k, f], stacked: positive ones up, negative ones down."""
    figure = Figure(figsize=(9.6, 2.9 * len(views)), layout="constrained")
    grid = figure.subplots(len(views), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, pieces) in zip(grid, views.items(), strict=True):
        values = np.asarray(pieces)
        places = np.arange(len(values))
        for part in (np.clip(values, 0, None), np.clip(values, None, 0)):
            part = np.take_along_axis(part, np.argsort(-np.abs(part), axis=1), axis=1)
            bottom = np.zeros(len(values))
            for k in range(values.shape[1]):
                if np.abs(part[:, k]).max() < 1e-3:
                    break
                colour = _shade(k)
                axes.bar(places, part[:, k], bottom=bottom, width=1.0, color=colour, edgecolor=CARD_LIGHT, lw=0.15)
                bottom += part[:, k]
        _labels(
            axes, "feature f" if axes is grid[-1] else "", "W_in[f, k] · W_out[k, f]", f"{title}: a piece per neuron"
        )
        axes.set_xlim(-0.5, len(values) - 0.5)
    return figure


def heat_grid(panels: Sequence[tuple[str, Any]], names: tuple[str, str], columns: int) -> Figure:
    """Matrices as heat maps on one symmetric scale; `names` are those of columns and rows."""
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.1 * columns + 0.8, 3.7 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    reach = max(float(np.abs(np.asarray(matrix)).max()) for _, matrix in panels)
    image: Any = None
    for i, (axes, (title, matrix)) in enumerate(zip(grid.flat, panels, strict=True)):
        image = axes.imshow(
            np.asarray(matrix), cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest", aspect="auto"
        )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(names[0] if i // columns == lines - 1 else "")
        axes.set_ylabel(names[1] if i % columns == 0 else "")
    figure.colorbar(image, ax=grid, shrink=0.7, pad=0.02)
    return figure


def histories(named: Mapping[str, Sequence[float]], naive: float, window: int = 100) -> Figure:
    """Running means of training losses one after another, steps on a logarithmic axis each."""
    figure = Figure(figsize=(4.2 * len(named), 4.0), layout="constrained")
    grid = figure.subplots(1, len(named), sharey=True, squeeze=False)[0]
    for i, (axes, (title, losses)) in enumerate(zip(grid, named.items(), strict=True)):
        values = np.asarray(losses)
        sums = np.concatenate([[0.0], np.cumsum(values)])
        ends = np.arange(1, len(values) + 1)
        begins = np.maximum(ends - window, 0)
        axes.plot(ends, (sums[ends] - sums[begins]) / (ends - begins), color=hue(i).light, lw=1.6, label=title)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _level(axes, ("naive on clean labels", naive))
        ticks = [0.07, 0.08, 0.09, 0.1, 0.15, 0.2, 0.4]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        _labels(axes, "step", f"{LOSS}, mean of {window} steps" if i == 0 else "", title)
    grid[0].set_ylim(0.065, 0.45)
    _legend(figure, grid)
    return figure


def cosines(singular: Sequence[float], eigen: Sequence[float]) -> Figure:
    """How much of each direction of I + σM the model keeps."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(
        (("singular pairs: cos(U_i, A V_i)", singular), ("eigenvectors of the symmetric part: cos(v_i, A v_i)", eigen))
    ):
        axes.plot(values, ls="none", label=name, **_dots(i))
    axes.axvline(len(singular) / 2 - 0.5, color="0.45", ls=":", lw=1, label="number of neurons")
    _labels(axes, "i, by size", "cosine", "the trained map A on directions of I + σM")
    _legend(figure, [axes])
    return figure


def entries(mixed: Any, gains: Any, slope: float) -> Figure:
    """A_ij against σM_ij, the diagonal apart."""
    x, y = np.asarray(mixed), np.asarray(gains)
    off = ~np.eye(len(x), dtype=bool)
    figure = Figure(figsize=(6.0, 4.6), layout="constrained")
    axes = figure.subplots()
    style: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 2.2, "mew": 0}
    axes.plot(x[off], y[off], color=hue(0).light, alpha=0.25, label="i ≠ j", rasterized=True, **style)
    axes.plot(x[~off], y[~off], color=hue(1).light, label="i = j", **{**style, "marker": "s", "ms": 3.5})
    ends = np.array([x.min(), x.max()])
    axes.plot(ends, slope * ends, color="0.2", lw=1.2, label=f"slope {slope:.2f}")
    _labels(axes, "σM_ij", "A_ij", "entries of the trained map and of the mixing")
    _legend(figure, [axes])
    return figure


def rank_panels(points: Sequence[tuple[float, float, float]], spectra: Mapping[str, Sequence[float]]) -> Figure:
    """L/p, σ√r and the spectra."""
    figure = Figure(figsize=(12.0, 4.2), layout="constrained")
    loss, scale, values = figure.subplots(1, 3)
    ordered = sorted(points)
    for i, (axes, which, title) in enumerate(((loss, 1, LOSS), (scale, 2, "σ√r, learned"))):
        axes.plot([p[0] for p in ordered], [p[which] for p in ordered], lw=1.2, **_dots(i, 5.5))
        _labels(axes, "effective rank of M", title, "single-active inputs" if i == 0 else "root mean square of σM")
    colours = matplotlib.colormaps["viridis"](np.linspace(0.02, 0.86, len(spectra)))
    for colour, (name, shares) in zip(colours, spectra.items(), strict=True):
        values.plot(range(1, len(shares) + 1), shares, color=colour, lw=1.4, label=name)
    values.set_yscale("log")
    values.set_ylim(bottom=2e-4)
    _labels(values, "index", "share of the singular values' sum", "spectra")
    values.legend(frameon=False, fontsize=8)
    return figure


def rank_seeds(groups: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean and standard error over seeds of L/p and σ√r against effective rank."""
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    grid = figure.subplots(1, 2)
    for axes, key, title in zip(grid, ("loss", "scale_rms"), (LOSS, "σ√r, learned"), strict=True):
        for i, zero in enumerate((True, False)):
            own = sorted((one for one in groups if one["zero_diagonal"] is zero), key=lambda one: one["effective_rank"])
            axes.errorbar(
                [one["effective_rank"] for one in own],
                [one[key] for one in own],
                xerr=[one["effective_rank_sem"] for one in own],
                yerr=[one[f"{key}_sem"] for one in own],
                capsize=2.5,
                lw=1.2,
                label="zero diagonal" if zero else "with diagonal",
                **_dots(i, 5.5),
            )
        _labels(axes, "effective rank of M", title, "single-active inputs, mean ± SEM")
    _legend(figure, grid[:1])
    return figure


# --- parts ----------------------------------------------------------------------------------------------------------


def _curves(axes: Axes, traces: Sequence[Trace], dashed: Sequence[Trace], *, log: bool) -> None:
    for i, (name, points) in enumerate(traces):
        marks = _dots(i, 3.5) if len(points) < 60 else {"color": hue(i).light}
        axes.plot(*zip(*points, strict=True), lw=1.5, label=name, **marks)
    for i, (name, points) in enumerate(dashed):
        axes.plot(*zip(*points, strict=True), lw=1.3, ls="--", color=hue(i + 4).light, label=name)
    if log:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        if high < 100 * low:  # labels of minor ticks would run into each other
            ticks = [digit * 10.0**power for power in range(-4, 1) for digit in (1, 2, 5)]
            axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())


def _level(axes: Axes, level: tuple[str, float] | None) -> None:
    if level is not None:
        axes.axhline(level[1], color="0.45", ls="--", lw=1, label=level[0], zorder=1)


def _dots(i: int, size: float = 4.0) -> dict[str, Any]:
    one = hue(i)
    return {"color": one.light, "marker": one.marker, "ms": size, "mec": CARD_LIGHT, "mew": 0.5}


def _shade(k: int) -> tuple[float, float, float]:
    """The k-th largest piece's colour: hues in turn, paler each round."""
    pale = min(0.75, 0.3 * (k // 6))
    red, green, blue = (channel + (1 - channel) * pale for channel in to_rgb(hue(k % 6).light))
    return red, green, blue


def _labels(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="major", color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Figure, panels: Any) -> None:
    """One legend under all panels."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    longest = max(map(len, found), default=1)
    columns = max(1, min(len(found), int(figure.get_figwidth() / (0.55 + 0.085 * longest))))
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
    )
