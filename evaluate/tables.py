"""The report's tables as HTML: results by protocol, families compared, what cross-layer latents write, other slices.

Lines carry `data-row`, the key that links them to the charts; cells carry `data-value`, by which the script sorts.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from thresher.evaluate import svg
from thresher.evaluate.columns import STAR, Column, chance_text, filled, label, meaning, sites_label, star
from thresher.evaluate.headline import each_once
from thresher.evaluate.palette import HUES
from thresher.evaluate.results import Results, Row
from thresher.evaluate.scales import brief
from thresher.evaluate.views import AXES, Keys, families, key_of, keys, site_sets

SHOWN = {"chance", "l0", "delta", "recovered_zero", "kl", "acc_drop", "agree", "fvu", "dead", "n_latents"}
"""Columns visible before `all columns` is pressed."""


# --- results --------------------------------------------------------------------------------------------------------


def results_table(results: Results, protocol: str) -> str:
    """Every replacement and baseline of a protocol, sortable and filterable."""
    rows, columns = results.table(protocol), filled(results.rows)
    several = len(site_sets(results)) > 1
    heads = ['<th title="Pareto front of δ against the chosen cost"></th>']
    heads.append('<th class="name sorts" tabindex="0">replacement</th>')
    heads += ['<th class="left sorts" tabindex="0">sites</th>'] if several else []
    for column in columns:
        more = "" if column.key in SHOWN else " more"
        text = escape(meaning(column.key))
        heads.append(
            f'<th class="sorts{more}" data-key="{column.key}" tabindex="0" title="{text}">{escape(column.title)}</th>'
        )
        if column.key == "delta":
            heads.append('<th class="left" title="95 % interval of δ">95 %</th>')
    best, scale = _best(rows, columns), _delta_scale(rows)
    known, order = keys(results), families(results)
    body = "".join(_line(row, columns, best, scale, known, order, several) for row in rows)
    return (
        f'<div class="scroll"><table class="results"><thead><tr>{"".join(heads)}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _best(rows: Sequence[Row], columns: Sequence[Column]) -> dict[str, float]:
    """Best value by column among the replacements, where there is something to choose."""
    out = {}
    for column in columns:
        values = [column.value(row) for row in rows if row.kind == "replacement"]
        known = [value for value in values if value is not None]
        if column.better and len(set(known)) > 1:
            out[column.key] = max(known) if column.better > 0 else min(known)
    return out


def _delta_scale(rows: Sequence[Row]) -> float:
    ends = [row.intervals.get("delta") for row in rows if row.kind == "replacement"]
    return max([end.high for end in ends if end is not None], default=1.0) or 1.0


def _line(
    row: Row,
    columns: Sequence[Column],
    best: Mapping[str, float],
    scale: float,
    known: Keys,
    order: Sequence[str],
    several: bool,
) -> str:
    baseline = row.kind == "baseline"
    family = None if baseline else order.index(row.family)
    marker = "" if family is None else svg.icon(family)
    stars = _by_axis({axis: STAR if on else "" for axis, on in row.front.items()}, {})
    cells = [f'<td class="star"{stars}>{star(row)}</td><td class="name">{marker}{escape(label(row))}</td>']
    cells += [f'<td class="left">{escape(sites_label(row.sites))}</td>'] if several else []
    for column in columns:
        cells.append(_cell(row, column, best))
        if column.key == "delta":
            cells.append(f'<td class="left">{_span(row, scale, family)}</td>')
    kind = ' class="baseline"' if baseline else ' tabindex="0"'
    return f'<tr{kind} data-row="{key_of(row, known)}">{"".join(cells)}</tr>'


def _by_axis(text: Mapping[str, str], value: Mapping[str, float]) -> str:
    """An attribute with text and sort value of a cell by cost axis, for cells that depend on the chosen one."""
    if not text:
        return ""
    cells = {axis: [text[axis], brief(value[axis]) if axis in value else ""] for axis in AXES if axis in text}
    return f' data-axes="{escape(json.dumps(cells, ensure_ascii=False))}"'


def _cell(row: Row, column: Column, best: Mapping[str, float]) -> str:
    value, text = column.value(row), escape(column.text(row))
    more = "" if column.key in SHOWN else ' class="more"'
    if row.kind == "replacement" and column.key in best and value == best[column.key]:
        text = f'<span class="best">{text}</span>'
    by_axis = ""
    if column.key == "chance":
        by_axis = _by_axis({axis: chance_text(share) for axis, share in row.chance.items()}, row.chance)
    return f'<td{more}{by_axis} data-value="{"" if value is None else brief(value)}">{text}</td>'


def _span(row: Row, scale: float, family: int | None) -> str:
    """The interval of δ drawn to the table's common scale, from 0 to the largest; in words for a baseline."""
    found, value = row.intervals.get("delta"), row.metrics.get("delta")
    if found is None or value is None or row.name == "clean":
        return ""
    if family is None:
        return f"{found.low:.2f}–{found.high:.2f}"
    text = f"{found.low:.4f} to {found.high:.4f}"
    low, high, at = (104 * max(0.0, v) / scale + 2 for v in (found.low, found.high, value))
    return (
        f'<span class="span c{family % len(HUES)}" title="{text}"><svg viewBox="0 0 108 14" role="img" '
        f'aria-label="{text}"><path class="grid" d="M2,7H106"/><path class="reached" d="M{low:.1f},7H{high:.1f}"/>'
        f'<circle class="dot" cx="{at:.1f}" cy="7" r="3.6"/></svg></span>'
    )


# --- small tables ---------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One line of a small table."""

    cells: Sequence[str]
    row: str = ""
    """Key of the replacement it is about, if of one."""


def small_table(heads: Sequence[str], lines: Iterable[Line], caption: str, attributes: str = "") -> str:
    """A table of texts; the first column names the line. The caption may hold markup, cells may not."""
    top = "".join(f"<th{' class=name' * (i == 0)}>{escape(head)}</th>" for i, head in enumerate(heads))
    body = "".join(
        f"<tr{f' data-row={line.row}' if line.row else ''}>"
        + "".join(f"<td{' class=name' * (i == 0)}>{_two_lines(cell)}</td>" for i, cell in enumerate(line.cells))
        + "</tr>"
        for line in lines
    )
    return (
        f'<div class="scroll part"{attributes}><table><caption>{caption}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _two_lines(cell: str) -> str:
    first, _, second = cell.partition("\n")
    return escape(first) + (f'<br><span class="soft">{escape(second)}</span>' if second else "")


def matched(results: Results) -> str:
    """Families at equal cost and at equal loss: a table per protocol, sites, axis and kind of match."""
    groups: dict[tuple[str, tuple[str, ...], str, str], list[Mapping[str, Any]]] = {}
    for entry in results.matched:
        group = (entry["protocol"], tuple(entry["sites"]), entry["axis"], entry["at"])
        groups.setdefault(group, []).append(entry)
    return "".join(_matched(results, *group, entries) for group, entries in groups.items())


def _matched(
    results: Results, protocol: str, sites: tuple[str, ...], axis: str, at: str, entries: Sequence[Mapping[str, Any]]
) -> str:
    names = list(dict.fromkeys(value["family"] for entry in entries for value in entry["values"]))
    at_cost, cost = at == "cost", AXES[axis]
    form: Callable[[float], str] = (lambda v: f"{v:.4f}") if at_cost else _cost_text
    lines = []
    for entry in sorted(entries, key=lambda entry: entry["where"]):
        found = {value["family"]: value for value in entry["values"]}
        where = _cost_text(entry["where"]) if at_cost else f"{entry['where']:.4g}"
        lines.append(Line([where, *(_with_span(found.get(n), form) + _behind(found.get(n), form) for n in names)]))
    what = f"δ at equal {cost.short}" if at_cost else f"{cost.short} at equal δ"
    behind = "; second line: behind the best" if any("\n" in cell for line in lines for cell in line.cells) else ""
    caption = f"<b>{escape(what)}</b> · {escape(protocol)}, {escape(sites_label(sites))}{behind}"
    return small_table([cost.short if at_cost else "δ", *names], lines, caption, _where(results, protocol, axis, sites))


def _cost_text(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _with_span(found: Mapping[str, Any] | None, form: Callable[[float], str]) -> str:
    if found is None or found["value"] is None:
        return "n/a"
    span = "" if found.get("low") is None else f" [{form(found['low'])}, {form(found['high'])}]"
    return form(found["value"]) + span


def _behind(found: Mapping[str, Any] | None, form: Callable[[float], str]) -> str:
    """How far a family is behind the best, on a second line."""
    if found is None or found.get("difference") is None:
        return ""
    low, high = found["difference_low"], found["difference_high"]
    span = "" if low is None else f" [{form(low)}, {form(high)}]"
    return f"\n+{form(found['difference'])}{span}"


def hypervolumes(results: Results) -> str:
    """Area behind each family's front: a table per protocol, sites and axis."""
    groups: dict[tuple[str, tuple[str, ...], str], list[Mapping[str, Any]]] = {}
    for entry in results.hypervolumes:
        groups.setdefault((entry["protocol"], tuple(entry["sites"]), entry["axis"]), []).append(entry)
    out = []
    for (protocol, sites, axis), entries in groups.items():
        ranked = sorted(entries, key=lambda entry: -(entry["value"] or 0.0))
        lines = [Line([entry["family"], _with_span(entry, lambda v: f"{v:.3f}")]) for entry in ranked]
        at = entries[0]["reference"]
        caption = (
            f"<b>Hypervolume</b> · {escape(protocol)}, {escape(sites_label(sites))}; behind "
            f"{escape(AXES[axis].short)} {_cost_text(at['cost'])}, δ {at['loss']:.3g}"
        )
        out.append(small_table(["family", "area [95 %]"], lines, caption, _where(results, protocol, axis, sites)))
    return "".join(out)


def _where(results: Results, protocol: str, axis: str, sites: tuple[str, ...]) -> str:
    order = site_sets(results)
    own = f' data-sites="{order.index(sites)}"' if sites in order else ""
    return f' data-protocol="{escape(protocol)}" data-axis="{escape(axis)}"{own}'


# --- where cross-layer latents write --------------------------------------------------------------------------------


def write_norms(results: Results) -> str:
    """A map per dictionary with several destinations: share of squared decoder norm from each source to each site."""
    known, maps = keys(results), []
    for row in each_once(results):
        maps += [_write_map(row, one, key_of(row, known)) for one in row.write_norms]
    return f'<div class="charts">{"".join(maps)}</div>' if maps else ""


def _write_map(row: Row, one: Mapping[str, Any], key: str) -> str:
    top = max((share for line in one["share"] for share in line if share is not None), default=0.0) or 1.0
    heads = "".join(f'<th scope="col">{escape(_layer(site, one["writes"]))}</th>' for site in one["writes"])
    lines = []
    for site, line in zip(one["reads"], one["share"], strict=True):
        cells = "".join(_heat(share, top) for share in line)
        total = 100 * sum(share for share in line if share is not None)
        lines.append(f'<tr><th scope="row">{escape(_layer(site, one["reads"]))}</th>{cells}<td>{total:.1f}</td></tr>')
    name = row.name if one["dictionary"] in ("", row.name) else f"{row.name}: {one['dictionary']}"
    return (
        f'<figure class="card" data-row="{key}"><h3>{escape(name)}</h3><table class="heat"><thead><tr>'
        f'<th scope="col" class="soft">from \\ to</th>{heads}<th scope="col" class="soft">sum</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></figure>"
    )


def _layer(site: str, among: Sequence[str]) -> str:
    """`L03` where all sites are of one tap, else the whole name."""
    same_tap = len({name.partition(".")[2] for name in among}) == 1
    return site.partition(".")[0] if same_tap else site


def _heat(share: float | None, top: float) -> str:
    if share is None:
        return '<td class="none"></td>'
    return f'<td style="--share:{100 * share / top:.0f}%">{100 * share:.1f}</td>'


# --- other slices, other tools --------------------------------------------------------------------------------------

SLICES = ("all", "typical", "first")


def slices(results: Results) -> str:
    """FVU and cosine by slice of the tokens; empty where slices were not kept."""
    lines, known = [], keys(results)
    for row, site in _sites(results):
        kept = site.get("slices") or {}
        if kept:
            parts = [site, *(kept.get(name) or {} for name in SLICES)]
            cells = [_number(part.get(key)) for key in ("fvu", "cosine") for part in parts]
            lines.append(Line([row.name, site["site"], *cells], key_of(row, known)))
    heads = ["replacement", "site", *(f"{key} {name}".strip() for key in ("FVU", "cosine") for name in ("", *SLICES))]
    caption = (
        "The numbers that rank leave the first position of each row out. <b>All</b>: every real token; <b>typical</b>: "
        "without outliers of the norm; <b>first</b>: first positions of rows alone."
    )
    return small_table(heads, lines, caption) if lines else ""


def compat(results: Results) -> str:
    """What other tools would print, for comparing with their published numbers."""
    found = [(row, site, site["compat"]) for row, site in _sites(results) if site.get("compat")]
    if not found:
        return ""
    names = list(dict.fromkeys(key for _, _, kept in found for key in kept if key != "batch"))
    known, lines = keys(results), []
    for row, site, kept in found:
        cells = [row.name, site["site"], *(_number(kept.get(name)) for name in names), f"{kept.get('batch', 0):,}"]
        lines.append(Line(cells, key_of(row, known)))
    caption = (
        "As other tools define and batch them, to compare with numbers they published. They depend on the batch, are "
        "blind to a constant offset or to scale, and <b>never enter a ranking, a front or a star here</b>."
    )
    return small_table(["replacement", "site", *names, "tokens in a batch"], lines, caption)


def _sites(results: Results) -> list[tuple[Row, Mapping[str, Any]]]:
    return [(row, site) for row in each_once(results) for site in row.per_site]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
