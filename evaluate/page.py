"""The report as one HTML file that opens anywhere: inline style, script and SVG, nothing fetched.

`report.html` beside this file is the page with named gaps; here the gaps are filled from `Results`. Every text that
came from outside (names, paths, versions) is escaped.
"""

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from html import escape

from thresher.evaluate import foot, svg
from thresher.evaluate.columns import COLUMNS, Column, meaning, sites_label, star
from thresher.evaluate.headline import headline, main_protocol
from thresher.evaluate.plots import families, front_of, site_sets
from thresher.evaluate.results import Results, Row

SHOWN = {column.key for column in COLUMNS if column.terminal} | {"recovered_mean", "acc_drop"}
"""Columns visible before `all columns` is pressed."""


def render(results: Results) -> str:
    """The whole page."""
    template = importlib.resources.files("thresher.evaluate").joinpath("report.html").read_text(encoding="utf-8")
    order = families(results)
    first = main_protocol(results)
    protocols = [first, *(p for p in results.protocols if p != first)]
    tokens = results.protocols[first]["scored_tokens"]
    units, unit = results.protocols[first]["units"], results.masks["unit"]
    replacements = sum(row.kind == "replacement" and row.protocol == first for row in results.rows)
    gaps = {
        "title": escape(f"Dictionaries in {_target_name(results)}"),
        "subtitle": f"{replacements} replacement{'s' * (replacements != 1)}, patched back into the model on "
        f"{tokens:,} held-out tokens of {units:,} {unit}{'s' * (units != 1)}. Headline protocol: {first}.",
        "notes": "".join(f'<p class="note">{escape(note)}</p>' for note in results.notes),
        "headline": "".join(_finding(line.title, line.name, line.text) for line in headline(results)),
        "hint": _hint(results),
        "lead": "δ is what the language model loses when its activations are replaced by their reconstructions. Lower "
        "and further left is better; the pale band joins the replacements that none beats on both. Hover for numbers, "
        "click a column to sort.",
        "tabs": "".join(f'<button type="button" data-tab="{p}" aria-pressed="false">{p}</button>' for p in protocols),
        "legend": "".join(_legend(i, family) for i, family in enumerate(order)),
        "protocols": "".join(_protocol(results, protocol, order) for protocol in protocols),
        "sitelead": _site_lead(results),
        "strips": _strips(results, order),
        "definitions": foot.definitions(results),
        "provenance": foot.provenance(results),
    }
    # one pass, so that a run called like a gap stays what it is
    return re.sub(r"\[\[(\w+)\]\]", lambda gap: gaps[gap[1]], template)


def _target_name(results: Results) -> str:
    return str(results.provenance.get("target", {}).get("name", "a language model")).removeprefix("bundled:")


def _finding(title: str, name: str, text: str) -> str:
    text = text.removeprefix(f"{name}: ") if name else text
    who = f'<div class="who">{escape(name)}</div>' if name else ""
    why = f'<div class="why">{escape(text)}</div>'
    return f'<div class="card find"><div class="what">{escape(title)}</div>{who}{why}</div>'


def _hint(results: Results) -> str:
    """A word of care when rows of the same table do not do the same work."""
    rows = [row for row in results.rows if row.kind == "replacement"]
    own = sorted({row.family for row in rows if set(row.reads) == set(row.sites)})
    others = sorted({row.family for row in rows if set(row.reads) != set(row.sites)})
    if not own or not others:
        return ""
    return (
        f'<p class="soft small">{escape(", ".join(own))}: reads the very activations it reconstructs, the easier task. '
        f"{escape(', '.join(others))}: computes them from other activations. Compare the two with that in mind.</p>"
    )


def _legend(index: int, family: str) -> str:
    name = f'<span style="color:var(--ink)">{escape(family)}</span>'
    return f'<span class="c{index % svg.COLOURS}">{_icon(index)}{name}</span>'


def _icon(index: int) -> str:
    return f'<svg viewBox="0 0 16 16" aria-hidden="true">{svg.shape(index, 8, 8)}</svg>'


# --- one protocol ---------------------------------------------------------------------------------------------------


def _protocol(results: Results, protocol: str, order: Sequence[str]) -> str:
    facts = results.protocols[protocol]
    few = " Few units: intervals are rough." if facts["few_units"] else ""
    unit = results.masks["unit"] + "s" * (facts["units"] != 1)
    charts = "".join(_pair_of_charts(results, protocol, sites, order) for sites in site_sets(results))
    return (
        f'<section data-protocol="{protocol}"><p><b>{protocol}.</b> {escape(facts["definition"])}</p>'
        f'<div class="charts">{charts}</div>{_table(results, protocol, order)}'
        f'<p class="soft small" style="margin-top:8px">{facts["scored_tokens"]:,} scored tokens in {facts["rows"]:,} '
        f"rows, {facts['units']:,} {unit}.{few} Intervals are 95 %, from a paired bootstrap over {unit}; ★ marks the "
        "Pareto front of δ against L0; the best value of a column is set in bold.</p></section>"
    )


def _pair_of_charts(results: Results, protocol: str, sites: tuple[str, ...], order: Sequence[str]) -> str:
    rows = [r for r in results.table(protocol) if r.kind == "replacement" and r.sites == sites]
    bars = [
        svg.Bar(float(row.metrics["delta"] or 0), f"{row.name} ablation")
        for row in results.table(protocol)
        if row.kind == "baseline" and row.name != "clean" and set(row.sites) == set(sites) and row.metrics["delta"]
    ]
    delta = svg.scatter(
        _series(rows, "delta", order),
        x_title="L0: active latents per token and source",
        y_title="δ, nats",
        y_log=True,
        front=[_mark(row, "delta") for row in front_of(rows) if row.metrics["delta"] is not None],
        bars=[bar for bar in bars if bar.y > 0],
        label=f"δ against L0 under {protocol}",
    )
    fvu = svg.scatter(
        _series(rows, "fvu", order),
        x_title="L0: active latents per token and source",
        y_title="FVU on clean inputs",
        y_log=False,
        label="fraction of variance unexplained against L0",
    )
    where = escape(sites_label(sites))
    return (
        f'<div class="card"><h3>Loss against sparsity <span class="soft">· {protocol}, {where}</span></h3>{delta}</div>'
        f'<div class="card"><h3>Reconstruction against sparsity <span class="soft">· clean inputs, {where}</span></h3>'
        f"{fvu}</div>"
    )


def _series(rows: Sequence[Row], key: str, order: Sequence[str]) -> list[svg.Series]:
    out = []
    for index, family in enumerate(order):
        marks = [_mark(row, key) for row in rows if row.family == family and row.metrics[key] is not None]
        if marks:
            out.append(svg.Series(index, marks))
    return out


def _mark(row: Row, key: str) -> svg.Mark:
    found = row.intervals.get(key)
    value = row.metrics[key]
    assert value is not None
    low, high = (found.low, found.high) if found else (None, None)
    return svg.Mark(row.cost["l0"], value, low, high, row.name, _tip(row), str(row.facts.get("label", "")))


def _tip(row: Row) -> str:
    lines = [row.name, row.family]
    for column in COLUMNS:
        if column.key in SHOWN and row.metrics.get(column.key) is not None:
            found = row.intervals.get(column.key)
            span = f" [{column.form(found.low)}, {column.form(found.high)}]" if found else ""
            lines.append(f"{column.title} {column.text(row)}{span}")
    return "\n".join(lines)


def _table(results: Results, protocol: str, order: Sequence[str]) -> str:
    rows = results.table(protocol)
    several = len({row.sites for row in rows if row.kind == "replacement"}) > 1
    best = _best(rows)
    heads = ['<th></th><th class="name sorts" tabindex="0">replacement</th>']
    heads += ['<th class="left sorts" tabindex="0">sites</th>'] if several else []
    for column in COLUMNS:
        more = "" if column.key in SHOWN else " more"
        text = escape(meaning(column.key))
        heads.append(f'<th class="sorts{more}" tabindex="0" title="{text}">{escape(column.title)}</th>')
        if column.key == "delta":
            heads.append('<th class="left" title="95 % interval of δ">95 %</th>')
    scale = _delta_scale(rows)
    body = "".join(_line(row, best, order, several, scale) for row in rows)
    return (
        f'<div class="scroll"><table class="results"><thead><tr>{"".join(heads)}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _best(rows: Sequence[Row]) -> dict[str, float]:
    """Best value by column among the replacements, where there is something to choose."""
    out = {}
    for column in COLUMNS:
        values = [row.metrics.get(column.key) for row in rows if row.kind == "replacement"]
        known = [value for value in values if value is not None]
        if column.better and len(set(known)) > 1:
            out[column.key] = max(known) if column.better > 0 else min(known)
    return out


def _delta_scale(rows: Sequence[Row]) -> float:
    ends = [row.intervals["delta"] for row in rows if row.kind == "replacement"]
    return max([end.high for end in ends if end is not None], default=1.0) or 1.0


def _line(row: Row, best: Mapping[str, float], order: Sequence[str], several: bool, scale: float) -> str:
    baseline = row.kind == "baseline"
    icon, colour = "", ""
    if not baseline:
        index = order.index(row.family)
        icon, colour = f'<span class="c{index % svg.COLOURS}">{_icon(index)}</span>', f"c{index % svg.COLOURS}"
    name = row.name if not baseline or row.name == "clean" else f"{row.name} ablation"
    cells = [f'<td class="star">{star(row)}</td><td class="name">{icon}{escape(name)}</td>']
    cells += [f'<td class="left">{escape(sites_label(row.sites))}</td>'] if several else []
    for column in COLUMNS:
        cells.append(_cell(row, column, best))
        if column.key == "delta":
            cells.append(f'<td class="left">{_span(row, scale, colour)}</td>')
    attributes = ' class="baseline"' if baseline else f' data-row="{escape(row.name)}"'
    return f"<tr{attributes}>{''.join(cells)}</tr>"


def _cell(row: Row, column: Column, best: Mapping[str, float]) -> str:
    value = row.metrics.get(column.key)
    more = "" if column.key in SHOWN else ' class="more"'
    text = column.text(row)
    if row.kind == "replacement" and column.key in best and value == best[column.key]:
        text = f'<span class="best">{text}</span>'
    return f'<td{more} data-value="{"" if value is None else repr(value)}">{text}</td>'


def _span(row: Row, scale: float, colour: str) -> str:
    """The interval of δ drawn to the table's common scale, from 0 to the largest; in words for a baseline."""
    found, value = row.intervals.get("delta"), row.metrics["delta"]
    if found is None or value is None or (row.kind == "baseline" and row.name == "clean"):
        return ""
    text = f"{found.low:.4f} to {found.high:.4f}"
    if row.kind == "baseline":
        return escape(f"{found.low:.2f}–{found.high:.2f}")
    low, high, at = (104 * max(0.0, v) / scale + 2 for v in (found.low, found.high, value))
    return (
        f'<span class="span {colour}" title="{text}"><svg viewBox="0 0 108 14" role="img" aria-label="{text}">'
        f'<path class="grid" d="M2,7H106"/><path class="whisker" d="M{low:.1f},7H{high:.1f}" style="stroke-width:4;'
        f'stroke-opacity:.45"/><circle class="dot" cx="{at:.1f}" cy="7" r="3.6"/></svg></span>'
    )


# --- sites ----------------------------------------------------------------------------------------------------------


def _site_lead(results: Results) -> str:
    parts = [
        "Which layers are hard to reconstruct is not which layers hurt: the left panel shows error, the right one "
    ]
    parts.append("what that error costs the model when only this site is patched.")
    if "single_site" not in results.protocols:
        return "How hard each site is to reconstruct, on clean inputs."
    return "".join(parts)


def _strips(results: Results, order: Sequence[str]) -> str:
    first = main_protocol(results)
    panels = [_strip(results, first, "fvu", "FVU", "Reconstruction error by site", False, order)]
    if "single_site" in results.protocols:
        panels.append(_strip(results, "single_site", "delta", "δ, nats", "Loss with one site patched", True, order))
    panels.append(_strip(results, first, "l0", "L0", "Active latents by layer read", False, order))
    panels.append(_strip(results, first, "dead", "share", "Dead latents by layer read", False, order))
    return "".join(panels)


def _strip(results: Results, protocol: str, key: str, y_title: str, title: str, log: bool, order: Sequence[str]) -> str:
    rows = [row for row in results.table(protocol) if row.kind == "replacement"]
    of_sources = key in ("l0", "dead")
    entries = [(row, row.sources if of_sources else row.per_site) for row in rows]
    names = sorted({_place(entry["site"], of_sources) for _, own in entries for entry in own})
    series = []
    for row, own in entries:
        marks = [
            svg.Mark(
                names.index(_place(e["site"], of_sources)),
                e[key],
                None,
                None,
                row.name,
                f"{row.name}\n{e['site']}\n{y_title} {e[key]:.4g}",
            )
            for e in own
            if e.get(key) is not None
        ]
        series.append(svg.Series(order.index(row.family), marks))
    chart = svg.strip(names, series, y_title=y_title, y_log=log, label=title)
    where = "single_site" if key == "delta" else "clean inputs"
    return f'<div class="card"><h3>{title} <span class="soft">· {where}</span></h3>{chart}</div>'


def _place(site: str, of_sources: bool) -> str:
    """Where a site is drawn: sources by layer, so that an SAE and a transcoder of one layer share a column."""
    found = re.match(r"L\d+(?=\.)", site) if of_sources else None
    return found[0] if found else site
