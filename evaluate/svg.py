"""The report's charts as SVG text: no library, no network, colours from the page's own stylesheet.

Marks carry `data-row` (the replacement's name) and `data-tip` (what hovering shows); the page's script links them to
the tables. Colour and shape follow the family: class `c0`, `c1`, … takes its colour from the theme, light or dark.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 560, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 16, 46
COLOURS = 8
FAR = 3
"""A baseline more than this many times above everything else is off the chart."""
FLOOR = 1e-4
"""Smallest value that a log axis shows; anything below is drawn there."""


class Mark(NamedTuple):
    """One point."""

    x: float
    y: float
    low: float | None
    high: float | None
    row: str
    """Name of the replacement, to link point and table row."""
    tip: str
    label: str = ""
    """Short text beside the point."""


class Series(NamedTuple):
    """Points of one family, joined by a thin line."""

    family: int
    """Index that fixes colour and shape."""
    marks: Sequence[Mark]


class Bar(NamedTuple):
    """A labelled horizontal line: a baseline."""

    y: float
    label: str


class Scale(NamedTuple):
    """Data to pixels along one axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        if self.log:
            value = max(value, FLOOR)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the range: powers of two for narrow log ranges, 1-2-5 for wide ones."""
        if not self.log:
            return linear_ticks(self.low, self.high)
        decades = math.log10(self.high / self.low)
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if decades < 0.8 else (1, 2, 5) if decades < 3.2 else (1,)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p * (1 + 1e-9) <= self.high * 1.001]


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round values from low to high."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Sequence[float], log: bool, from_zero: bool = False) -> tuple[float, float]:
    """A range that leaves air around the values."""
    if log:
        low, high = max(min(values), FLOOR), max(max(values), FLOOR)
        air = max((high / low) ** 0.08, 1.25)
        return low / air, high * air
    low, high = (0.0 if from_zero else min(values)), max(values)
    span = (high - low) or abs(high) or 1.0
    return (0.0 if from_zero else low - 0.08 * span), high + 0.08 * span


def scatter(
    series: Sequence[Series],
    *,
    x_title: str,
    y_title: str,
    y_log: bool,
    front: Sequence[Mark] = (),
    bars: Sequence[Bar] = (),
    label: str,
) -> str:
    """A chart of y against a logarithmic x, with a step line through `front` and baselines."""
    marks = [mark for one in series for mark in one.marks]
    if not marks:
        return "<p>Nothing to draw.</p>"
    ys = [v for m in marks for v in (m.y, m.low, m.high) if v is not None]
    # a baseline far above would squeeze everything else together: it is named at the edge instead
    far = [bar for bar in bars if bar.y > FAR * max(ys)]
    bars = [bar for bar in bars if bar not in far]
    ys += [bar.y for bar in bars]
    x = Scale(*padded([m.x for m in marks], True), LEFT, WIDTH - RIGHT, True)
    y = Scale(*padded(ys, y_log, from_zero=not y_log), HEIGHT - BOTTOM, TOP, y_log)
    ticks = powers_of_two(x) if x.high / x.low < 2000 else x.ticks()
    parts = [_open(label), _grid(x, y, ticks, [f"{t:g}" for t in ticks], x_title, y_title)]
    parts += [_bar(bar, x, y) for bar in bars]
    if far:
        names = ", ".join(f"{bar.label} {bar.y:.2f}" for bar in far)
        parts.append(
            f'<text class="barname" x="{x.end - 4}" y="{TOP + 11}" text-anchor="end">↑ {html.escape(names)}</text>'
        )
    if front:
        parts.append(_step(front, x, y))
    parts += [_series(one, x, y) for one in series]
    return "".join([*parts, "</svg>"])


def strip(names: Sequence[str], series: Sequence[Series], *, y_title: str, y_log: bool, label: str) -> str:
    """A chart of y by category; a mark's x is the index of its name."""
    marks = [mark for one in series for mark in one.marks]
    if not marks:
        return "<p>Nothing to draw.</p>"
    x = Scale(-0.5, len(names) - 0.5, LEFT, WIDTH - RIGHT, False)
    y = Scale(*padded([m.y for m in marks], y_log, from_zero=not y_log), HEIGHT - BOTTOM, TOP, y_log)
    every = max(1, math.ceil(len(names) * max(map(len, names)) * 7 / (WIDTH - LEFT - RIGHT)))
    ticks = [float(i) for i in range(0, len(names), every)]
    parts = [_open(label), _grid(x, y, ticks, [names[int(t)] for t in ticks], "", y_title)]
    parts += [_series(one, x, y) for one in series]
    return "".join([*parts, "</svg>"])


def powers_of_two(scale: Scale) -> list[float]:
    """1, 2, 4, … inside a log range; with halves between when there are fewer than three."""
    first, last = math.ceil(math.log2(scale.low)), math.floor(math.log2(scale.high))
    ticks = [2.0**p for p in range(first, last + 1)]
    return ticks if len(ticks) >= 3 else sorted({*ticks, *[round(t, 3) for t in scale.ticks()]})


def _open(label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    )


def _grid(x: Scale, y: Scale, ticks: Sequence[float], names: Sequence[str], x_title: str, y_title: str) -> str:
    floor, parts = HEIGHT - BOTTOM, []
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value, name in zip(ticks, names, strict=True):
        at = x(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{floor + 17}" text-anchor="middle">{html.escape(name)}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="title" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_title)}</text>'
    )
    half = (TOP + floor) / 2
    turn = f'transform="rotate(-90 14 {half})"'
    parts.append(f'<text class="title" x="14" y="{half}" text-anchor="middle" {turn}>{html.escape(y_title)}</text>')
    return "".join(parts)


def _bar(bar: Bar, x: Scale, y: Scale) -> str:
    at = y(bar.y)
    return (
        f'<line class="bar" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="barname" x="{x.end - 4}" y="{at - 5:.1f}" text-anchor="end">{html.escape(bar.label)}</text>'
    )


def _step(front: Sequence[Mark], x: Scale, y: Scale) -> str:
    path = f"M{x(front[0].x):.1f},{y(front[0].y):.1f}"
    for mark in front[1:]:
        path += f"H{x(mark.x):.1f}V{y(mark.y):.1f}"
    return f'<path class="front" d="{path}H{x.end}"/>'


def _series(one: Series, x: Scale, y: Scale) -> str:
    marks = sorted(one.marks, key=lambda mark: mark.x)
    points = " ".join(f"{x(m.x):.1f},{y(m.y):.1f}" for m in marks)
    parts = [f'<g class="c{one.family % COLOURS}"><polyline class="join" points="{points}"/>']
    for mark in marks:
        px, py = x(mark.x), y(mark.y)
        parts.append(f'<g class="mark" data-row="{html.escape(mark.row)}" data-tip="{html.escape(mark.tip)}">')
        if mark.low is not None and mark.high is not None:
            parts.append(f'<path class="whisker" d="M{px:.1f},{y(mark.low):.1f}V{y(mark.high):.1f}"/>')
        parts.append(f'<circle class="reach" cx="{px:.1f}" cy="{py:.1f}" r="11"/>{shape(one.family, px, py)}')
        if mark.label:
            parts.append(f'<text class="label" x="{px + 8:.1f}" y="{py - 7:.1f}">{html.escape(mark.label)}</text>')
        parts.append("</g>")
    return "".join([*parts, "</g>"])


def shape(family: int, x: float, y: float, r: float = 5.2) -> str:
    """A family's marker around (x, y)."""
    kind = family % COLOURS
    if kind == 0:
        return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    spokes = {
        1: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2: [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        3: [(0, -1.3), (1.15, 0), (0, 1.3), (-1.15, 0)],
        4: [(0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
        5: [p for u, v in ((0, -1), (1, 0), (0, 1), (-1, 0)) for p in _arm(u, v)],
        6: [(math.sin(i * math.pi / 3), -math.cos(i * math.pi / 3)) for i in range(6)],
        7: _star(),
    }[kind]
    points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in spokes)
    return f'<polygon class="dot" points="{points}"/>'


def _arm(u: int, v: int, long: float = 1.2, half: float = 0.4) -> list[tuple[float, float]]:
    """The inner corner and the two ends of one arm of a plus, clockwise; (u, v) is where it points."""
    side = (-v * half, u * half)
    return [
        (u * half - side[0], v * half - side[1]),
        (u * long - side[0], v * long - side[1]),
        (u * long + side[0], v * long + side[1]),
    ]


def _star() -> list[tuple[float, float]]:
    radii = (1.3, 0.55)
    return [(radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]
