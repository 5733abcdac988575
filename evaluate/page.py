"""The report as one HTML file that opens anywhere: inline style, script and SVG, nothing fetched.

`report.html` beside this file is the page with named gaps, `report.css` its style and `report.js` its script; here they
become one file and the gaps are filled from `Results`. Every text that came from outside (names, paths, versions) is
escaped. What the script needs to draw other axes than the first is in the page as one block of JSON.
"""

import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from thresher.evaluate import charts, foot, palette, svg, tables
from thresher.evaluate.columns import sites_label
from thresher.evaluate.headline import headline, main_protocol
from thresher.evaluate.results import Results
from thresher.evaluate.views import AXES, MEASURES, Panel, families, key_of, keys, panel, site_sets


class Section(NamedTuple):
    """One part of the page under a heading."""

    name: str
    """Anchor."""
    title: str
    lead: str
    """A sentence or two; text, not markup."""
    body: str
    """Markup; a section without is left out."""


def render(results: Results) -> str:
    """The whole page."""
    sections = [section for section in _sections(results) if section.body]
    gaps = {
        "title": escape(f"Dictionaries in {_target_name(results)}"),
        "subtitle": escape(_subtitle(results)),
        "style": f"{palette.stylesheet()}\n{_file('report.css')}",
        "symbols": svg.symbols(),
        "notes": "".join(f'<p class="note">{escape(note)}</p>' for note in results.notes),
        "headline": "".join(_finding(line.title, line.name, line.text) for line in headline(results)),
        "hint": _hint(results),
        "contents": "".join(f'<a href="#{s.name}">{escape(s.title)}</a>' for s in sections),
        "tools": _tools(results),
        "legend": _legend(results),
        "sections": "".join(
            f'<section id="{s.name}"><h2>{escape(s.title)}</h2><p class="soft">{escape(s.lead)}</p>{s.body}</section>'
            for s in sections
        ),
        "data": _json(_data(results)),
        "script": _file("report.js"),
    }
    # one pass, so that a run called like a gap stays what it is
    return re.sub(r"\[\[(\w+)\]\]", lambda gap: gaps[gap[1]], _file("report.html"))


def _file(name: str) -> str:
    return importlib.resources.files("thresher.evaluate").joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


# --- head -----------------------------------------------------------------------------------------------------------


def _target_name(results: Results) -> str:
    return str(results.provenance.get("target", {}).get("name", "a language model")).removeprefix("bundled:")


def _subtitle(results: Results) -> str:
    first = main_protocol(results)
    tokens, units = results.protocols[first]["scored_tokens"], results.protocols[first]["units"]
    many = sum(row.kind == "replacement" and row.protocol == first for row in results.rows)
    return (
        f"{many} replacement{'s' * (many != 1)}, patched back into the model on {tokens:,} held-out tokens of "
        f"{units:,} {results.masks['unit']}{'s' * (units != 1)}. Headline protocol: {first}."
    )


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


def _protocols(results: Results) -> list[str]:
    first = main_protocol(results)
    return [first, *(protocol for protocol in results.protocols if protocol != first)]


def _tools(results: Results) -> str:
    """What the reader chooses for the whole page."""
    tabs = "".join(
        f'<button type="button" data-tab="{escape(p)}" aria-pressed="false">{escape(p)}</button>'
        for p in _protocols(results)
    )
    axes = "".join(f'<option value="{key}">{escape(axis.short)}</option>' for key, axis in AXES.items())
    sets = "".join(f'<option value="{i}">{escape(sites_label(s))}</option>' for i, s in enumerate(site_sets(results)))
    sites = f'<label>sites <select id="bysites"><option value="">all</option>{sets}</select></label>'
    return (
        f'<span role="group" aria-label="protocol" class="tabs">{tabs}</span>'
        f'<label>cost <select id="byaxis">{axes}</select></label>{sites if len(site_sets(results)) > 1 else ""}'
        '<label>filter <input id="filter" type="search" placeholder="name, kind, site …" autocomplete="off"></label>'
        '<output id="shown" class="soft small"></output>'
    )


def _legend(results: Results) -> str:
    """Families with their markers; also buttons that hide and show them."""
    chips = [(f, svg.icon(i), f) for i, f in enumerate(families(results))]
    chips += [("baseline", '<span class="dash"></span>', "baselines")]
    return "".join(
        f'<button type="button" class="chip" data-family="{escape(family)}" aria-pressed="true">{mark}{escape(name)}'
        "</button>"
        for family, mark, name in chips
    )


# --- sections -------------------------------------------------------------------------------------------------------


def _panels(results: Results) -> dict[str, Panel]:
    return {
        f"{protocol}-{i}": panel(results, protocol, sites)
        for protocol in _protocols(results)
        for i, sites in enumerate(site_sets(results))
    }


def _sections(results: Results) -> list[Section]:
    single = "single_site" in results.protocols
    hard = "Which layers are hard to reconstruct is not which layers hurt: one panel shows the error, the next what it "
    hard += "costs the model when only that site is patched."
    return [
        Section(
            "costs",
            "What patching costs",
            "δ is what the language model loses when its activations are replaced by their reconstructions. Lower and "
            "further left is better; the pale band joins the replacements that none beats on both axes. Bars are 95 % "
            "intervals. Point at anything for its numbers, click it to keep it marked. Filters hide; they never change "
            "a front.",
            "".join(_protocol(results, protocol) for protocol in _protocols(results))
            + charts.scatters(_panels(results), site_sets(results))
            + "".join(_table(results, protocol) for protocol in _protocols(results)),
        ),
        Section(
            "matched",
            "Families at equal cost and equal loss",
            "Between neighbours of one family values are interpolated, never beyond the range a family was run in. "
            "Hypervolume is the area a family's front cuts off below the reference point: more is better.",
            _group(tables.matched(results) + tables.hypervolumes(results)),
        ),
        Section(
            "curves",
            "Sparsity and size",
            "What a looser sparsity buys at equal size, and what more latents buy at equal sparsity.",
            charts.curves(results),
        ),
        Section(
            "sites",
            "Site by site",
            hard if single else "How hard each site is to reconstruct, on clean inputs.",
            charts.by_site(results),
        ),
        Section(
            "positions",
            "Along the context",
            "Scored tokens by the position of their source; the first position of a row is never patched.",
            charts.by_position(results),
        ),
        Section(
            "latents",
            "How often latents fire",
            "Latents by the share of tokens they fire on, as a share of all, to one scale; those that never fired "
            "stand apart at the left.",
            charts.densities(results),
        ),
        Section(
            "writes",
            "Where cross-layer latents write",
            "Percent of the squared decoder norm by the layer that latents read and the layer they write to. Weight "
            "far from the diagonal warns of computation that is skipped.",
            tables.write_norms(results),
        ),
        Section(
            "training",
            "Along training",
            "As logged by the runs on training rows; no number here enters a table.",
            charts.training(results),
        ),
        Section(
            "others",
            "Other choices of tokens, other tools' numbers",
            "For comparison with what is printed elsewhere. Nothing in here ranks anything.",
            _folded("Slices of the tokens", tables.slices(results))
            + _folded("Numbers as other tools define them: never ranked", tables.compat(results)),
        ),
        Section("words", "What the words mean", "", foot.definitions(results)),
        Section("origin", "Where the numbers come from", "", foot.provenance(results)),
    ]


def _group(parts: str) -> str:
    return f'<div class="parts">{parts}</div>' if parts else ""


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>" if body else ""


def _protocol(results: Results, protocol: str) -> str:
    definition = escape(results.protocols[protocol]["definition"])
    return f'<p data-protocol="{escape(protocol)}"><b>{escape(protocol)}.</b> {definition}</p>'


def _table(results: Results, protocol: str) -> str:
    facts = results.protocols[protocol]
    few = " Few units: intervals are rough." if facts["few_units"] else ""
    unit = results.masks["unit"] + "s" * (facts["units"] != 1)
    return (
        f'<div data-protocol="{escape(protocol)}"><div class="tablehead"><h3>Results <span class="soft">· '
        f'{escape(protocol)}</span></h3><button type="button" class="wide tools" aria-pressed="false">all columns'
        f'</button></div>{tables.results_table(results, protocol)}<p class="soft small foot">'
        f"{facts['scored_tokens']:,} scored tokens in {facts['rows']:,} rows, {facts['units']:,} {unit}.{few} "
        f"Intervals are 95 %, from a paired bootstrap over {unit}; ★ marks the Pareto front of δ against "
        f'<span class="axisname">{AXES["l0"].short}</span>; the best value of a column is set in bold.</p></div>'
    )


# --- what the script reads ------------------------------------------------------------------------------------------


def _data(results: Results) -> dict[str, Any]:
    """Everything the script draws and filters by; described in `report.js`."""
    return {
        "axes": {key: {"title": axis.title, "short": axis.short} for key, axis in AXES.items()},
        "measures": {key: {"title": m.title, "short": m.short, "log": m.log} for key, m in MEASURES.items()},
        "rows": _rows(results),
        "panels": {name: one.json() for name, one in _panels(results).items()},
    }


def _rows(results: Results) -> Mapping[str, Mapping[str, Any]]:
    known, sets = keys(results), site_sets(results)
    out: dict[str, dict[str, Any]] = {}
    for row in results.rows:
        words: Sequence[object] = (
            row.name,
            row.family,
            sites_label(row.sites),
            *row.sites,
            row.facts.get("sparsity", ""),
        )
        out[key_of(row, known)] = {
            "family": row.family if row.kind == "replacement" else "baseline",
            "sites": next((str(i) for i, sites in enumerate(sets) if set(sites) == set(row.sites)), ""),
            "find": " ".join(map(str, words)).lower(),
        }
    return out
