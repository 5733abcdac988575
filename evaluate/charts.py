"""The report's sections of charts: what is drawn against what, as HTML cards with SVG in them.

A card that is about one protocol or one set of written sites carries `data-protocol` or `data-sites`; the page's script
shows those that the reader chose, and print shows all. A section with nothing to draw is an empty text.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from thresher.evaluate import scales, svg
from thresher.evaluate.columns import chance_text, count, l0_text, sites_label
from thresher.evaluate.headline import each_once, main_protocol
from thresher.evaluate.results import Results, Row
from thresher.evaluate.scales import Form, Scale
from thresher.evaluate.svg import Frame, Mark, Series
from thresher.evaluate.views import AXES, MEASURES, Panel, buckets, families, key_of, keys, trace

POINTS = 160
"""A training curve is drawn with at most about this many points."""


def cards(drawn: Iterable[str]) -> str:
    inside = "".join(drawn)
    return f'<div class="charts">{inside}</div>' if inside else ""


def card(title: str, note: str, drawing: str, protocol: str = "") -> str:
    """One chart with its heading."""
    of = f' data-protocol="{escape(protocol)}"' if protocol else ""
    soft = f' <span class="soft">· {escape(note)}</span>' if note else ""
    return f'<figure class="card"{of}><h3>{escape(title)}{soft}</h3>{drawing}</figure>'


# --- loss against cost ----------------------------------------------------------------------------------------------


def scatters(panels: Mapping[str, Panel], order: Sequence[tuple[str, ...]]) -> str:
    """Two linked plots per protocol and set of sites: losses, and reconstruction."""
    return cards(
        _plot(name, panel, order.index(panel.sites), measure)
        for name, panel in panels.items()
        for measure in ("delta", "fvu")
        if measure in panel.y
    )


def _plot(name: str, panel: Panel, sites: int, measure: str) -> str:
    log = MEASURES[measure].log
    options = "".join(
        f'<option value="{key}"{" selected" * (key == measure)}>{escape(MEASURES[key].short)}</option>'
        for key in panel.y
    )
    where = f"{panel.protocol}, {sites_label(panel.sites)}"
    return (
        f'<figure class="card plot" data-protocol="{escape(panel.protocol)}" data-sites="{sites}" data-panel="{name}">'
        f'<div class="plothead"><h3><span class="what">{escape(MEASURES[measure].short)} against {AXES["l0"].short}'
        f'</span> <span class="soft">· {escape(where)}</span></h3><span class="tools">'
        f'<select aria-label="vertical axis" class="measure">{options}</select>'
        f'<label><input type="checkbox" class="log"{" checked" * log}> log</label></span></div>'
        f'<div class="drawing">{svg.scatter(panel, "l0", measure, log)}</div></figure>'
    )


# --- against sparsity and size --------------------------------------------------------------------------------------


def curves(results: Results) -> str:
    """δ and FVU against k and against dictionary size, where some family has several of either."""
    first, out = main_protocol(results), []
    for of, title in ((_k, "k"), (_size, "dictionary size")):
        for protocol in results.protocols:
            out.append(_curve(results, protocol, "delta", of, f"δ against {title}", protocol))
        out.append(_curve(results, first, "fvu", of, f"FVU against {title}", "clean inputs"))
    return cards(out)


def _k(row: Row) -> tuple[float, str]:
    """The sparsity set, or the L0 found where none was; and what else is equal along a line."""
    k = row.facts.get("k")
    return float(k) if isinstance(k, (int, float)) else row.cost["l0"], trace(row)


def _size(row: Row) -> tuple[float, str]:
    setting = row.facts.get("k", row.facts.get("sparsity"))
    return float(row.metrics.get("n_latents") or 0), f"{row.family}|{setting}|{row.facts.get('seed')}"


def _curve(
    results: Results, protocol: str, key: str, of: Callable[[Row], tuple[float, str]], title: str, note: str
) -> str:
    known, order = keys(results), families(results)
    rows = [r for r in results.table(protocol) if r.kind == "replacement" and r.metrics.get(key) is not None]
    lines: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        x, line = of(row)
        lines.setdefault(f"{row.sites}{line}", []).append((x, row))
    if not any(len({x for x, _ in line}) > 1 for line in lines.values()):
        return ""
    short = "δ" if key == "delta" else "FVU"
    series = [
        Series(
            "",
            order.index(line[0][1].family),
            [
                Mark(x, _number(row, key), f"{row.name}\n{short} {_number(row, key):.4g}", key_of(row, known))
                for x, row in line
            ],
        )
        for line in lines.values()
    ]
    by_size = of is _size
    x_title = "Latents of all sources together" if by_size else "k asked for, or L0 where none was"
    frame = Frame(scales.cost(_xs(series), count if by_size else scales.plain), _height(_ys(series), key == "delta"))
    drawn = svg.chart(series, frame, x_title=x_title, y_title=MEASURES[key].title, label=f"{title}, {note}")
    return card(title, note, drawn, protocol if key == "delta" else "")


def _number(row: Row, key: str) -> float:
    value = row.metrics[key]
    assert value is not None
    return value


def _xs(series: Iterable[Series]) -> list[float]:
    return [mark.x for one in series for mark in one.marks]


def _ys(series: Iterable[Series]) -> list[float]:
    return [mark.y for one in series for mark in one.marks]


def _height(values: Sequence[float], log: bool, form: Form = scales.plain) -> Scale:
    return scales.logarithmic(values, form) if log else scales.linear(values, form=form)


# --- by site --------------------------------------------------------------------------------------------------------


def by_site(results: Results) -> str:
    """Error, loss, L0 and dead latents by site."""
    first = main_protocol(results)
    written, read = (lambda row: row.per_site), (lambda row: row.sources)
    panels = [_strip(results, first, "fvu", written, "Reconstruction error by site", "FVU", False)]
    if "single_site" in results.protocols:
        title = "Loss with one site patched"
        panels.append(_strip(results, "single_site", "delta", written, title, "δ, nats", True, "single_site"))
    panels.append(_strip(results, first, "l0", read, "Active latents by layer read", "L0", False))
    panels.append(_strip(results, first, "dead", read, "Dead latents by layer read", "dead", False))
    return cards(panels)


def _strip(
    results: Results,
    protocol: str,
    key: str,
    entries: Callable[[Row], Sequence[Mapping[str, Any]]],
    title: str,
    y_title: str,
    log: bool,
    note: str = "clean inputs",
) -> str:
    known, order = keys(results), families(results)
    found = [
        (row, entry)
        for row in results.table(protocol)
        if row.kind == "replacement"
        for entry in entries(row)
        if entry.get(key) is not None
    ]
    if not found:
        return ""
    of_sources = key in ("l0", "dead")
    names = sorted({_place(entry["site"], of_sources) for _, entry in found})
    form = scales.percent if key == "dead" else scales.plain
    lines: dict[str, Series] = {}
    for row, entry in found:
        own = lines.setdefault(key_of(row, known), Series(key_of(row, known), order.index(row.family), []))
        text = scales.percent(entry[key]) if key == "dead" else f"{entry[key]:.4g}"
        mark = Mark(names.index(_place(entry["site"], of_sources)), entry[key], f"{row.name}\n{entry['site']}\n{text}")
        lines[own.row] = own._replace(marks=[*own.marks, mark])
    series, x_title = list(lines.values()), "Layer read" if of_sources else "Site written"
    frame = Frame(scales.categories(names, svg.INSIDE), _height(_ys(series), log, form))
    return card(title, note, svg.chart(series, frame, x_title=x_title, y_title=y_title, label=title))


def _place(site: str, of_sources: bool) -> str:
    """Where a site is drawn: sources by layer, so that an SAE and a transcoder of one layer share a column."""
    found = re.match(r"L\d+(?=\.)", site) if of_sources else None
    return found[0] if found else site


# --- by position ----------------------------------------------------------------------------------------------------


def by_position(results: Results) -> str:
    """δ and L0 by position in the context."""
    return cards(
        _positions(results, protocol, key, title, form)
        for protocol in results.protocols
        for key, title, form in (("delta", "δ, nats", scales.plain), ("l0", "L0", scales.plain))
    )


def _positions(results: Results, protocol: str, key: str, y_title: str, form: Form) -> str:
    known, order = keys(results), families(results)
    rows = [r for r in results.table(protocol) if r.kind == "replacement" and r.positions.get(key)]
    names = list(dict.fromkeys(name for row in rows for name in buckets(row)))
    series = []
    for row in rows:
        marks = [
            Mark(names.index(name), value, f"{row.name}\npositions {name}\n{key.replace('delta', 'δ')} {value:.4g}")
            for name, value in zip(buckets(row), row.positions[key], strict=True)
            if value is not None
        ]
        series.append(Series(key_of(row, known), order.index(row.family), marks))
    if not _ys(series):
        return ""
    frame = Frame(scales.categories(names, svg.INSIDE), _height(_ys(series), key == "delta", form))
    title = f"{'Loss' if key == 'delta' else 'Active latents'} by position"
    drawn = svg.chart(series, frame, x_title="Position in the context", y_title=y_title, label=f"{title}, {protocol}")
    return card(title, protocol, drawn, protocol)


# --- latents --------------------------------------------------------------------------------------------------------


def densities(results: Results) -> str:
    """How often latents fire: a small histogram per replacement, all to one scale."""
    known, order = keys(results), families(results)
    rows = each_once(results)
    totals = {key_of(row, known): (row, found) for row in rows if (found := _density(row)) is not None}
    if not totals:
        return ""
    top = max(max(max(share, default=0.0), dead) for _, (_, share, dead) in totals.values()) or 1.0
    drawn = []
    for key, (row, (edges, share, dead)) in totals.items():
        label = f"latents of {row.name} by density"
        picture = svg.histogram(edges, share, dead, top, order.index(row.family), label)
        facts = f"{count(row.metrics.get('n_latents') or 0)} latents, {chance_text(dead)} dead"
        drawn.append(
            f'<figure class="card tiny" data-row="{key}"><h3>{svg.icon(order.index(row.family))}{escape(row.name)}</h3>'
            f'{picture}<p class="soft">{facts}</p></figure>'
        )
    return f'<div class="smalls">{"".join(drawn)}</div>'


def _density(row: Row) -> tuple[list[float], list[float], float] | None:
    """Histogram over all sources of a row: edges, shares, dead share."""
    found = [source["density"] for source in row.sources if source.get("density")]
    if not found or any(one["log10_edges"] != found[0]["log10_edges"] for one in found):
        return None
    latents = [sum(column) for column in zip(*(one["latents"] for one in found), strict=True)]
    dead = sum(sum(one["dead"]) for one in found)
    total = (sum(latents) + dead) or 1.0
    return found[0]["log10_edges"], [value / total for value in latents], dead / total


# --- training -------------------------------------------------------------------------------------------------------

TRAINING = {
    "fvu": ("FVU along training", "FVU on training rows", True, scales.plain),
    "l0": ("L0 along training", "L0", True, scales.plain),
    "dead": ("Dead latents along training", "dead", False, scales.percent),
}


def training(results: Results) -> str:
    """What was logged along training, one line per replacement."""
    known, order = keys(results), families(results)
    rows = [row for row in each_once(results) if row.facts.get("curves")]
    out = []
    for key, (title, y_title, log, form) in TRAINING.items():
        series = []
        for row in rows:
            seen, values = row.facts["curves"].get("rows", []), row.facts["curves"].get(key, [])
            marks = _thinned([Mark(x, y, "") for x, y in zip(seen, values, strict=False) if y is not None])
            if marks:
                last = l0_text(marks[-1].y) if key == "l0" else form(float(f"{marks[-1].y:.4g}"))
                tip = f"{row.name}\n{y_title} {last} at the end"
                series.append(Series(key_of(row, known), order.index(row.family), marks, tip))
        if series:
            frame = Frame(scales.linear([0.0, *_xs(series)], form=count), _height(_ys(series), log, form))
            drawn = svg.chart(series, frame, x_title="Training rows seen", y_title=y_title, label=title)
            out.append(card(title, "", drawn))
    return cards(out)


def _thinned(marks: Sequence[Mark]) -> list[Mark]:
    """Every so many marks, the last one among them."""
    step = max(1, len(marks) // POINTS)
    return list(marks[::-step][::-1])
