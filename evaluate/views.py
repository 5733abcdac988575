"""What the scatter plots show: points, fronts, baselines and axes of one protocol and one set of written sites.

A `Panel` holds every choice of axes at once. The server draws one of them into the page (`svg.scatter`), so that print
and readers without scripts have it; the page's script draws the others from the same numbers as JSON.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from thresher.evaluate import scales
from thresher.evaluate.columns import COLUMNS, count, label
from thresher.evaluate.pareto import Point, fronts
from thresher.evaluate.results import Results, Row
from thresher.evaluate.scales import FLOOR, Form, Scale, brief

FAR = 3
"""On a log axis a baseline more than this many times outside all points is named at the edge instead of drawn."""
CLOSE = 0.05
"""Share of the height that the name of a line takes."""
TIP = ("l0", "delta", "recovered_zero", "kl", "agree", "fvu", "dead", "n_latents")
"""Columns that hovering shows."""


class Axis(NamedTuple):
    """A cost that points may be drawn against."""

    title: str
    short: str
    form: Form


AXES = {
    "l0": Axis("L0: active latents per token and source", "L0", scales.plain),
    "active_per_mlp": Axis("Active latents that one reconstruction sums over", "active per MLP", scales.plain),
    "active_parameters": Axis("Active parameters per token", "active parameters", count),
}


class Measure(NamedTuple):
    """A number that points may be drawn by."""

    title: str
    short: str
    form: Form = scales.percent
    log: bool = False
    """Whether its axis is logarithmic until the reader says otherwise."""
    front: bool = False
    """Whether a front is drawn: losses by which replacements are ranked."""
    less: bool = True
    """Whether less is better; then a linear axis starts at zero."""


MEASURES = {
    "delta": Measure("δ, nats", "δ", scales.plain, log=True, front=True),
    "kl": Measure("KL, nats", "KL", scales.plain, log=True, front=True),
    "fvu": Measure("FVU on clean inputs", "FVU", scales.plain, front=True),
    "acc_drop": Measure("Drop of next-token accuracy", "accuracy drop"),
    "agree": Measure("Agreement with the clean model", "agreement", less=False),
    "recovered_zero": Measure("Recovered from zero ablation", "recovered (zero)", less=False),
    "recovered_mean": Measure("Recovered from mean ablation", "recovered (mean)", less=False),
    "dead": Measure("Dead latents", "dead latents"),
}


class Dot(NamedTuple):
    """One replacement, or one setting of a baseline that has a cost."""

    row: str
    """Its key in the page (`keys`)."""
    family: int
    """Index that fixes colour and shape; -1 for a baseline."""
    trace: str
    """Dots of one trace are joined by a line."""
    x: Mapping[str, float]
    """By axis."""
    y: Mapping[str, float]
    """By measure, where defined."""
    span: Mapping[str, tuple[float, float]]
    """95 % interval by measure."""
    tip: str


class Seeds(NamedTuple):
    """The reach of replacements that differ in the seed alone."""

    rows: Sequence[str]
    family: int
    x: Mapping[str, float]
    """Mean cost by axis."""
    reach: Mapping[str, tuple[float, float]]
    """Lowest and highest by measure."""


class Height(NamedTuple):
    """A y axis and what is written at it."""

    scale: Scale
    flat: Sequence[tuple[float, str]]
    """Baselines without a cost: value and name, wherever they are."""
    bars: Sequence[tuple[float, str]]
    """Those inside the axis; lines too close for two names share the name of the highest."""
    above: str
    """Baselines that are off the chart, in words."""
    below: str

    def json(self) -> dict[str, Any]:
        return {"scale": self.scale.json(), "bars": self.bars, "above": self.above, "below": self.below}


class Panel(NamedTuple):
    """One scatter plot under every choice of axes."""

    protocol: str
    sites: tuple[str, ...]
    dots: Sequence[Dot]
    trails: Sequence[Dot]
    """Baselines with a cost, such as the k largest neurons."""
    seeds: Sequence[Seeds]
    fronts: Mapping[str, Mapping[str, Sequence[str]]]
    """Rows that none beats on both, by axis and measure."""
    x: Mapping[str, Scale]
    y: Mapping[str, Mapping[str, Height]]
    """By measure, then `linear` or `log`."""

    def json(self) -> dict[str, Any]:
        """The numbers as the script reads them; `svg.scatter` draws the same ones."""
        return {
            "dots": [dot._asdict() for dot in self.dots],
            "trails": [dot._asdict() for dot in self.trails],
            "seeds": [seeds._asdict() for seeds in self.seeds],
            "fronts": self.fronts,
            "x": {axis: scale.json() for axis, scale in self.x.items()},
            "y": {key: {kind: height.json() for kind, height in kinds.items()} for key, kinds in self.y.items()},
        }


Keys = Mapping[tuple[str, str, tuple[str, ...]], str]
"""`keys`: what links a point, a line of a table and a curve of one replacement."""


def families(results: Results) -> list[str]:
    """Families in the order that fixes their colour."""
    return sorted({row.family for row in results.rows if row.kind == "replacement"})


def site_sets(results: Results) -> list[tuple[str, ...]]:
    """Sets of written sites; each is a comparison of its own."""
    return sorted({row.sites for row in results.rows if row.kind == "replacement"})


def buckets(row: Row) -> list[str]:
    """The names of the buckets of `Row.positions`: `4–7`."""
    pairs = zip(row.positions["first"], row.positions["last"], strict=True)
    return [f"{a:.0f}" if a == b else f"{a:.0f}–{b:.0f}" for a, b in pairs if a is not None and b is not None]


def keys(results: Results) -> Keys:
    """A short key by kind, name and sites."""
    order = dict.fromkeys((row.kind, row.name, row.sites) for row in results.rows)
    return {identity: f"r{i}" for i, identity in enumerate(order)}


def key_of(row: Row, known: Keys) -> str:
    return known[row.kind, row.name, row.sites]


def trace(row: Row) -> str:
    """Rows that differ in sparsity alone: one family, size and seed."""
    return f"{row.family}|{row.metrics.get('n_latents')}|{row.facts.get('seed')}"


def panel(results: Results, protocol: str, sites: tuple[str, ...]) -> Panel:
    """The scatter of one protocol and set of written sites."""
    known, order = keys(results), families(results)
    rows = [row for row in results.table(protocol) if set(row.sites) == set(sites)]
    own = [row for row in rows if row.kind == "replacement"]
    costed = [row for row in rows if row.kind == "baseline" and row.cost]
    flat = [row for row in rows if row.kind == "baseline" and not row.cost and row.name != "clean"]
    dots = [_dot(row, key_of(row, known), order.index(row.family), trace(row)) for row in own]
    trails = [_dot(row, key_of(row, known), -1, method(row)) for row in costed]
    seeds = _seeds(results, protocol, own, order)
    return Panel(
        protocol,
        sites,
        dots,
        trails,
        seeds,
        {axis: {key: _front(own, axis, key, known) for key, m in MEASURES.items() if m.front} for axis in AXES},
        {
            axis: scales.cost([dot.x[axis] for dot in [*dots, *trails] if axis in dot.x], AXES[axis].form)
            for axis in AXES
        },
        {key: heights for key in MEASURES if (heights := _heights(key, dots, trails, seeds, flat))},
    )


def method(row: Row) -> str:
    """What a baseline with several settings is called: `neurons` of `neurons k=16`."""
    return re.sub(r"\s+\w+=\S+$", "", row.name)


def _dot(row: Row, key: str, family: int, joined: str) -> Dot:
    values = {m: brief(value) for m in MEASURES if (value := row.metrics.get(m)) is not None}
    ends = {m: found for m in values if (found := row.intervals.get(m)) is not None}
    span = {m: (brief(found.low), brief(found.high)) for m, found in ends.items()}
    return Dot(key, family, joined, {axis: brief(row.cost[axis]) for axis in row.cost}, values, span, tip(row))


def tip(row: Row) -> str:
    """What hovering a point says."""
    lines = [label(row), row.family] if row.kind == "replacement" else [label(row)]
    for column in COLUMNS:
        if column.key in TIP and column.value(row) is not None:
            found = row.intervals.get(column.key)
            span = f" [{column.form(found.low)}, {column.form(found.high)}]" if found else ""
            lines.append(f"{column.title} {column.text(row)}{span}")
    return "\n".join(lines)


def _front(rows: Sequence[Row], axis: str, key: str, known: Keys) -> list[str]:
    """The front of δ as the results mark it; that of another loss by the same rule."""
    if key == "delta":
        on = [row.front.get(axis, False) for row in rows]
    else:
        values = [row.metrics.get(key) for row in rows]
        points = [
            Point(row.name, (), row.cost[axis], float("nan") if value is None else value)
            for row, value in zip(rows, values, strict=True)
        ]
        on = fronts(points).on
    return [key_of(row, known) for row, yes in zip(rows, on, strict=True) if yes]


def _seeds(results: Results, protocol: str, rows: Sequence[Row], order: Sequence[str]) -> list[Seeds]:
    known, by_name = keys(results), {row.name: row for row in rows}
    out = []
    for entry in results.seeds:
        own = [by_name[name] for name in entry["names"] if name in by_name]
        if entry["protocol"] == protocol and own:
            mean = {axis: brief(sum(row.cost[axis] for row in own) / len(own)) for axis in AXES}
            reach = {m: (brief(entry[m][0]), brief(entry[m][1])) for m in MEASURES if entry.get(m)}
            out.append(Seeds([key_of(row, known) for row in own], order.index(own[0].family), mean, reach))
    return out


def _heights(
    key: str, dots: Sequence[Dot], trails: Sequence[Dot], seeds: Sequence[Seeds], flat: Sequence[Row]
) -> dict[str, Height]:
    """The y axes of a measure; no log axis where values may be negative or where more is better."""
    values = [dot.y[key] for dot in dots if key in dot.y]
    if not values:
        return {}
    values += [end for dot in dots if key in dot.span for end in dot.span[key]]
    values += [end for one in seeds if key in one.reach for end in one.reach[key]]
    bars = [(brief(value), label(row)) for row in flat if (value := row.metrics.get(key)) is not None]
    points = [(dot.y[key], dot.trace) for dot in trails if key in dot.y]
    measure = MEASURES[key]
    out = {"linear": _height(values, bars, points, False, measure)}
    if measure.log or (measure.front and min(values) > 0):
        out["log"] = _height(values, bars, points, True, measure)
    return out


Named = Sequence[tuple[float, str]]


def _height(values: Sequence[float], bars: Named, points: Named, log: bool, measure: Measure) -> Height:
    near = _near_log(values) if log else _near_linear(values)
    shown = [*values, *(value for value, _ in [*bars, *points] if near(value))]
    form = measure.form
    scale = scales.logarithmic(shown, form) if log else scales.linear(shown, from_zero=measure.less, form=form)
    lines = sorted((bar for bar in bars if scale.low <= bar[0] <= scale.high), reverse=True)
    above = [bar for bar in bars if bar[0] > scale.high]
    below = [bar for bar in bars if bar[0] < scale.low]
    for name in dict.fromkeys(name for _, name in points):
        own = [value for value, trail in points if trail == name]
        if min(own) > scale.high:
            above.append((min(own), f"{name} from"))
        elif max(own) < scale.low:
            below.append((max(own), f"{name} up to"))
    return Height(scale, bars, _apart(lines, scale), _words(above, form), _words(below, form))


def _apart(lines: Named, scale: Scale) -> list[tuple[float, str]]:
    """Lines so close that their names would overlap share one name, written at the highest."""
    out: list[tuple[float, str]] = []
    top = 0
    for value, name in lines:
        if out and scale.share(out[top][0]) - scale.share(value) < CLOSE:
            out[top] = (out[top][0], f"{out[top][1]}, {name}")
            out.append((value, ""))
        else:
            top = len(out)
            out.append((value, name))
    return out


def _near_log(values: Sequence[float]) -> Callable[[float], bool]:
    low, high = max(min(values), FLOOR), max(max(values), FLOOR)
    return lambda value: low / FAR <= value <= high * FAR


def _near_linear(values: Sequence[float]) -> Callable[[float], bool]:
    low, high = min(values), max(values)
    room = (high - min(low, 0.0)) / 2
    return lambda value: low - room <= value <= high + room


def _words(bars: Named, form: Form) -> str:
    return ", ".join(f"{name} {form(float(f'{value:.3g}'))}" for value, name in bars)
