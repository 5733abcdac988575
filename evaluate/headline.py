"""Which dictionary is best at what, in sentences computed from the numbers.

Every sentence names the protocol it is about and the numbers it rests on.
"""

from collections.abc import Sequence
from typing import NamedTuple

from thresher.evaluate.columns import ABLATIONS, l0_text, sites_label
from thresher.evaluate.matching import matched_l0
from thresher.evaluate.results import Results, Row

SPARSEST = 1.25
"""Rows within this factor of the smallest L0 count as the sparsest setting."""
MANY_SETS = 3
"""With more sets of written sites than this only the lowest δ of each is told."""


class Line(NamedTuple):
    """One finding."""

    title: str
    name: str
    """The replacement it is about; empty when about all."""
    text: str


def main_protocol(results: Results) -> str:
    """cascade when it was run, else the first protocol."""
    return "cascade" if "cascade" in results.protocols else next(iter(results.protocols))


def each_once(results: Results) -> list[Row]:
    """Replacements for what does not depend on the protocol: those of the main table, then those that are not in it."""
    first = main_protocol(results)
    tables = [results.table(p) for p in (first, *(p for p in results.protocols if p != first))]
    out: dict[str, Row] = {}
    for row in (row for table in tables for row in table if row.kind == "replacement"):
        out.setdefault(row.name, row)
    return list(out.values())


def headline(results: Results) -> list[Line]:
    """The findings, for every set of written sites."""
    protocol = main_protocol(results)
    rows = [row for row in results.table(protocol) if row.kind == "replacement" and row.metrics["delta"] is not None]
    sets = list(dict.fromkeys(row.sites for row in rows))
    lines: list[Line] = []
    for sites in sets:
        where = f" at {sites_label(sites)}" if len(sets) > 1 else ""
        group = _of_group(results, [row for row in rows if row.sites == sites], protocol, where)
        lines += group if len(sets) <= MANY_SETS else group[:1]
    return lines


def _of_group(results: Results, rows: Sequence[Row], protocol: str, where: str) -> list[Line]:
    best = min(rows, key=lambda row: _value(row, "delta"))
    lines = [Line(f"Lowest δ{where}", best.name, f"{_with_delta(best)} ({protocol}){_lead(results, protocol, best)}")]
    if len(rows) > 1:
        least = min(row.cost["l0"] for row in rows)
        sparse = min((r for r in rows if r.cost["l0"] <= SPARSEST * least), key=lambda row: _value(row, "delta"))
        lines.append(Line(f"Best where sparsest{where}", sparse.name, _with_delta(sparse)))
        matched = matched_l0(rows)
        if matched is not None:
            lines.append(_matched_line(*matched, where))
        fitted = [row for row in rows if row.metrics["fvu"] is not None]
        if fitted:
            close = min(fitted, key=lambda row: _value(row, "fvu"))
            text = f"{close.name}: {_value(close, 'fvu'):.3f} at L0 {l0_text(close.cost['l0'])}"
            lines.append(Line(f"Lowest FVU{where}", close.name, text))
        lines.append(_dead_line(rows, where))
    return [*lines, *_ablation_line(results, rows, protocol, where)]


def _value(row: Row, key: str) -> float:
    value = row.metrics[key]
    assert value is not None
    return value


def _with_delta(row: Row) -> str:
    found = row.intervals.get("delta")
    span = f" [{found.low:.4f}, {found.high:.4f}]" if found else ""
    return f"{row.name}: δ {_value(row, 'delta'):.4f}{span} at L0 {l0_text(row.cost['l0'])}"


def _lead(results: Results, protocol: str, best: Row) -> str:
    """How far the best is ahead of the next, if that is known."""
    for pair in results.pairs:
        if pair["protocol"] == protocol and pair["a"] == best.name:
            sure = "ahead of" if pair["low"] > 0 else "not clearly ahead of"
            return f", {sure} {pair['b']} by {pair['difference']:.4f} [{pair['low']:.4f}, {pair['high']:.4f}]"
    return ""


def _dead_line(rows: Sequence[Row], where: str) -> Line:
    least = min(_value(row, "dead") for row in rows)
    names = [row.name for row in rows if _value(row, "dead") == least]
    tokens = rows[0].sources[0]["tokens"]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return Line(f"Fewest dead latents{where}", names[0], f"{shown}: {least:.1%} silent on {tokens:,.0f} tokens")


def _ablation_line(results: Results, rows: Sequence[Row], protocol: str, where: str) -> list[Line]:
    baselines = [r for r in results.rows if r.kind == "baseline" and r.protocol == protocol and r.name in ABLATIONS]
    bars = {r.name: r.metrics["delta"] for r in baselines if set(r.sites) == set(rows[0].sites)}
    known = {name: value for name, value in bars.items() if value is not None}
    if not known:
        return []
    worse = [row.name for row in rows if _value(row, "delta") >= min(known.values())]
    spelled = " and ".join(f"{name} ablation (δ {value:.3f})" for name, value in known.items())
    who = "the only replacement beats" if len(rows) == 1 else f"all {len(rows)} replacements beat"
    text = f"{', '.join(worse)} do not beat {spelled}" if worse else f"{who} {spelled}"
    return [Line(f"Against ablation{where}", worse[0] if worse else "", text)]


def _matched_line(l0: float, found: dict[str, float], where: str) -> Line:
    ranked = sorted(found.items(), key=lambda item: item[1])
    text = f"at L0 {l0_text(l0)}: " + ", ".join(f"{name} δ {delta:.4f}" for name, delta in ranked)
    return Line(f"At matched L0{where}", ranked[0][0], text)
