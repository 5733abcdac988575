"""The report's charts as SVG text: no library, no network, colours from the page's own stylesheet.

Marks and lines carry `data-row` (the replacement's key, `views.keys`) and `data-tip` (what hovering says); the page's
script links them to the tables. Colour and shape follow the family: class `c0`, `c1`, … takes its colour from the
theme, light or dark; the shapes stand once in the page (`symbols`) and are used by name. The script's `scatter` draws
what `scatter` here draws, from the same `Panel`, for the axes that a reader chooses.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from thresher.evaluate.palette import HUES
from thresher.evaluate.scales import Scale
from thresher.evaluate.views import AXES, MEASURES, Dot, Height, Panel, Seeds

WIDTH, HEIGHT = 560, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 24, 46
INSIDE = WIDTH - LEFT - RIGHT
"""Pixels between the left and the right end of an x axis."""
RADIUS = 5.2


class Mark(NamedTuple):
    """One point."""

    x: float
    y: float
    tip: str
    row: str = ""
    """The replacement's key, where a line joins several."""


class Series(NamedTuple):
    """Points joined by a thin line."""

    row: str
    """Key of the replacement that all points are of; empty when each has its own."""
    family: int
    """Index that fixes colour and shape."""
    marks: Sequence[Mark]
    tip: str = ""
    """What hovering the line says; a line with a tip is drawn without its points."""


# --- shapes ---------------------------------------------------------------------------------------------------------


def _ring(corners: int, radii: Sequence[float], turn: float = 0.0) -> list[tuple[float, float]]:
    """Corners around the origin, the first one on top unless turned (in corners)."""
    angles = [2 * math.pi * (i + turn) / corners for i in range(corners)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


def _plus(long: float = 1.2, half: float = 0.4) -> list[tuple[float, float]]:
    arms = [(-half, -half), (-half, -long), (half, -long)]
    return [(x * u - y * v, x * v + y * u) for u, v in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in arms]


SHAPES: tuple[Sequence[tuple[float, float]], ...] = (
    _ring(24, [1.0]),  # circle
    _ring(4, [1.27], 0.5),  # square
    _ring(3, [1.35]),
    _ring(4, [1.3]),  # diamond
    _ring(3, [1.35], 0.5),
    _plus(),
    _ring(6, [1.15]),
    _ring(10, [1.35, 0.6]),  # star
)
"""A family's marker as a polygon around the origin, in radii; the same shapes as `palette.HUES` name for matplotlib."""


def symbols() -> str:
    """The shapes and the clipping of charts, once for the whole page."""
    assert len(SHAPES) == len(HUES)
    shapes = "".join(
        f'<path id="s{i}" d="M{"L".join(f"{RADIUS * x:.2f},{RADIUS * y:.2f}" for x, y in shape)}Z"/>'
        for i, shape in enumerate(SHAPES)
    )
    area = f'<rect x="{LEFT}" y="{TOP}" width="{INSIDE + 8}" height="{HEIGHT - TOP - BOTTOM + 7}"/>'
    return f'<svg class="symbols" aria-hidden="true"><defs>{shapes}<clipPath id="inside">{area}</clipPath></defs></svg>'


def icon(family: int) -> str:
    """A family's marker in its colour, for legends and tables."""
    return (
        f'<svg class="icon c{family % len(HUES)}" viewBox="-8 -8 16 16" aria-hidden="true">'
        f'<use class="dot" href="#s{family % len(HUES)}"/></svg>'
    )


# --- charts ---------------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """Both axes, and where their values stand in pixels."""

    x: Scale
    y: Scale

    def px(self, value: float) -> float:
        return LEFT + self.x.share(value) * INSIDE

    def py(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y.share(value) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)

    def drawn(self, x_title: str, y_title: str) -> str:
        """Grid, ticks and titles."""
        floor, parts = HEIGHT - BOTTOM, []
        for value, text in self.y.ticks:
            at = self.py(value)
            parts.append(f'<path class="grid" d="M{LEFT},{at:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_text(text)}</text>')
        for value, text in self.x.ticks:
            at = self.px(value)
            parts.append(f'<path class="grid" d="M{at:.1f},{TOP}V{floor}"/>')
            parts.append(f'<text class="tick" x="{at:.1f}" y="{floor + 17}" text-anchor="middle">{_text(text)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT},{floor}H{WIDTH - RIGHT}"/>')
        middle, half = LEFT + INSIDE / 2, (TOP + floor) / 2
        parts.append(f'<text class="title" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{_text(x_title)}</text>')
        turn = f'transform="rotate(-90 14 {half})"'
        parts.append(f'<text class="title" x="14" y="{half}" text-anchor="middle" {turn}>{_text(y_title)}</text>')
        return "".join(parts)


def chart(series: Sequence[Series], frame: Frame, *, x_title: str, y_title: str, label: str) -> str:
    """A chart of lines with points."""
    lines = "".join(_line(one, frame) for one in series if one.marks)
    return f'{_open(label)}{frame.drawn(x_title, y_title)}<g clip-path="url(#inside)">{lines}</g></svg>'


def _line(one: Series, frame: Frame) -> str:
    marks = sorted(one.marks, key=lambda mark: mark.x)
    path = frame.path((m.x, m.y) for m in marks)
    head = f'<g {_linked(one.row)}class="c{one.family % len(HUES)}"'
    if one.tip:  # a wide unseen stroke, since nobody hits a thin one
        wide = f'<path class="reach" d="{path}"/>'
        return f'{head} data-tip="{_text(one.tip)}">{wide}<path class="join" d="{path}"/></g>'
    rows = "" if one.row else f' data-rows="{" ".join(m.row for m in marks)}"'
    dots = "".join(
        f'<g {_linked(m.row)}data-tip="{_text(m.tip)}">{_dot(one.family, frame.px(m.x), frame.py(m.y))}</g>'
        for m in marks
    )
    return f'{head}><path class="join"{rows} d="{path}"/>{dots}</g>'


def _linked(row: str) -> str:
    return f'data-row="{row}" ' if row else ""


def _dot(family: int, x: float, y: float) -> str:
    return (
        f'<circle class="reach" cx="{x:.1f}" cy="{y:.1f}" r="11"/>'
        f'<use class="dot" href="#s{family % len(HUES)}" x="{x:.1f}" y="{y:.1f}"/>'
    )


def scatter(panel: Panel, axis: str, measure: str, log: bool) -> str:
    """One view of a panel: loss against cost with front, intervals, baselines and the reach of seeds."""
    height = panel.y[measure]["log" if log else "linear"]
    frame = Frame(panel.x[axis], height.scale)
    dots = [dot for dot in panel.dots if measure in dot.y]
    label = f"{MEASURES[measure].short} against {AXES[axis].short} under {panel.protocol}"
    front = [dot for dot in dots if dot.row in panel.fronts[axis].get(measure, ())]
    return "".join(
        [
            _open(label),
            frame.drawn(AXES[axis].title, MEASURES[measure].title),
            _baselines(height, frame),
            '<g clip-path="url(#inside)">',
            _step([(dot.x[axis], dot.y[measure]) for dot in front], frame),
            *(_trail(own, axis, measure, frame) for own in _by_trace(panel.trails, axis, measure)),
            *(_seeds(one, axis, measure, frame) for one in panel.seeds if measure in one.reach),
            *(_trace(own, axis, measure, frame) for own in _by_trace(dots, axis, measure)),
            *(_point(dot, axis, measure, frame) for dot in dots),
            "</g></svg>",
        ]
    )


def _open(label: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(label)}">'


def _text(text: str) -> str:
    return html.escape(text)


def _baselines(height: Height, frame: Frame) -> str:
    parts, end = [], WIDTH - RIGHT
    for value, name in height.bars:
        at = frame.py(value)
        parts.append(f'<path class="bar" d="M{LEFT},{at:.1f}H{end}"/>')
        parts.append(f'<text class="barname" x="{end - 4}" y="{at - 5:.1f}" text-anchor="end">{_text(name)}</text>')
    if height.above:
        parts.append(
            f'<text class="barname" x="{end - 4}" y="{TOP - 9}" text-anchor="end">↑ {_text(height.above)}</text>'
        )
    if height.below:
        at_foot = HEIGHT - BOTTOM - 8
        parts.append(
            f'<text class="barname" x="{end - 4}" y="{at_foot}" text-anchor="end">↓ {_text(height.below)}</text>'
        )
    return f"<g data-baseline>{''.join(parts)}</g>"


def _step(front: Iterable[tuple[float, float]], frame: Frame) -> str:
    points = sorted(front)
    if not points:
        return ""
    (x, y), *rest = points
    path = f"M{frame.px(x):.1f},{frame.py(y):.1f}"
    path += "".join(f"H{frame.px(x):.1f}V{frame.py(y):.1f}" for x, y in rest)
    return f'<path class="front" d="{path}H{WIDTH - RIGHT + 8}"/>'


def _by_trace(dots: Iterable[Dot], axis: str, measure: str) -> list[list[Dot]]:
    """Dots that can be drawn under these axes, by trace and rising cost."""
    out: dict[str, list[Dot]] = {}
    for dot in dots:
        if axis in dot.x and measure in dot.y:
            out.setdefault(dot.trace, []).append(dot)
    return [sorted(own, key=lambda dot: dot.x[axis]) for own in out.values()]


def _trail(own: Sequence[Dot], axis: str, measure: str, frame: Frame) -> str:
    parts = [f'<path class="trail" d="{frame.path((dot.x[axis], dot.y[measure]) for dot in own)}"/>']
    for dot in own:
        x, y = frame.px(dot.x[axis]), frame.py(dot.y[measure])
        parts.append(
            f'<g data-row="{dot.row}" data-tip="{_text(dot.tip)}"><circle class="reach" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="9"/><circle class="trailing" cx="{x:.1f}" cy="{y:.1f}" r="3"/></g>'
        )
    last = own[-1]
    x, y = frame.px(last.x[axis]) - 6, frame.py(last.y[measure]) + 15
    parts.append(f'<text class="barname" x="{x:.1f}" y="{y:.1f}" text-anchor="end">{_text(last.trace)}</text>')
    return f"<g data-baseline>{''.join(parts)}</g>"


def _seeds(one: Seeds, axis: str, measure: str, frame: Frame) -> str:
    low, high = (frame.py(end) for end in one.reach[measure])
    x = frame.px(one.x[axis])
    return (
        f'<path class="seeds c{one.family % len(HUES)}" data-rows="{" ".join(one.rows)}" '
        f'd="M{x - 11:.1f},{low:.1f}h22M{x - 11:.1f},{high:.1f}h22M{x:.1f},{low:.1f}V{high:.1f}"/>'
    )


def _trace(own: Sequence[Dot], axis: str, measure: str, frame: Frame) -> str:
    path = frame.path((dot.x[axis], dot.y[measure]) for dot in own)
    return f'<path class="join c{own[0].family % len(HUES)}" data-rows="{" ".join(d.row for d in own)}" d="{path}"/>'


def _point(dot: Dot, axis: str, measure: str, frame: Frame) -> str:
    x, y = frame.px(dot.x[axis]), frame.py(dot.y[measure])
    whisker = ""
    if measure in dot.span:
        low, high = (frame.py(end) for end in dot.span[measure])
        whisker = f'<path class="whisker" d="M{x:.1f},{low:.1f}V{high:.1f}"/>'
    return (
        f'<g class="mark c{dot.family % len(HUES)}" data-row="{dot.row}" data-tip="{_text(dot.tip)}">'
        f"{whisker}{_dot(dot.family, x, y)}</g>"
    )


# --- histograms -----------------------------------------------------------------------------------------------------

SMALL_WIDTH, SMALL_HEIGHT = 250, 104
DEAD_BIN = 24
"""Pixels that the bin of dead latents takes at the left."""


def histogram(edges: Sequence[float], share: Sequence[float], dead: float, top: float, family: int, label: str) -> str:
    """Latents by log10 density as shares of all, and those that never fired in a bin of their own at the left.

    `top` is the share that fills the height, so that small charts beside each other can be compared.
    """
    floor, left, right = SMALL_HEIGHT - 18, DEAD_BIN + 10.0, SMALL_WIDTH - 17.0
    unit = (right - left) / (edges[-1] - edges[0])

    def bar(start: float, end: float, value: float, kind: str) -> str:
        height = (floor - 8) * value / top
        return (
            f'<rect class="{kind}" x="{start + 0.5:.1f}" y="{floor - height:.1f}" width="{end - start - 1:.1f}" '
            f'height="{height:.1f}"><title>{100 * value:.2f}%</title></rect>'
        )

    ends = [left + (edge - edges[0]) * unit for edge in edges]
    bars = [bar(a, b, value, "density") for a, b, value in zip(ends, ends[1:], share, strict=False) if value]
    bars += [bar(2, DEAD_BIN, dead, "deadbin")] if dead else []
    ticks = []
    for power in range(math.ceil(edges[0]), 1):
        at = left + (power - edges[0]) * unit
        ticks.append(f'<path class="grid" d="M{at:.1f},6V{floor}"/>')
        ticks.append(
            f'<text class="tick" x="{at:.1f}" y="{floor + 14}" text-anchor="middle">{100 * 10.0**power:g}%</text>'
        )
    return (
        f'<svg class="small c{family % len(HUES)}" viewBox="0 0 {SMALL_WIDTH} {SMALL_HEIGHT}" role="img" '
        f'aria-label="{_text(label)}">{"".join(ticks)}<text class="tick" x="{2 + DEAD_BIN / 2}" y="{floor + 14}" '
        f'text-anchor="middle">dead</text>{"".join(bars)}<path class="axis" d="M2,{floor}H{DEAD_BIN}M{left},{floor}'
        f'H{right}"/></svg>'
    )
