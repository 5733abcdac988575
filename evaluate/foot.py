"""The foot of the report: what the words mean, which tokens count, which runs these were, and under which versions."""

import json
import re
from html import escape
from typing import Any

from thresher.evaluate.columns import filled, l0_text, meaning, sites_label
from thresher.evaluate.headline import each_once
from thresher.evaluate.results import Results, Row


def definitions(results: Results) -> str:
    columns = "".join(f"<dt>{escape(c.title)}</dt><dd>{escape(meaning(c.key))}</dd>" for c in filled(results.rows))
    protocols = "".join(
        f"<dt>{name}</dt><dd>{escape(facts['definition'])}</dd>" for name, facts in results.protocols.items()
    )
    masks = "".join(f"<dt>{escape(_words(key))}</dt><dd>{_plain(value)}</dd>" for key, value in results.masks.items())
    return (
        f"<details open><summary>Columns</summary><dl>{columns}</dl></details>"
        f"<details><summary>Protocols</summary><dl>{protocols}</dl></details>"
        f"<details><summary>Which tokens are patched and scored</summary><dl>{masks}</dl></details>"
    )


def provenance(results: Results) -> str:
    checks = "".join(
        f"<dt>{escape(check['name'])}</dt><dd>δ {check['delta']:.2e}, KL {check['kl']:.2e}, "
        f"{'equals clean as it must' if check['passed'] else 'does not equal clean'}</dd>"
        for check in results.checks
    )
    runs = "".join(f"<dt>{escape(row.name)}</dt><dd>{escape(_facts(row))}</dd>" for row in each_once(results))
    text = escape(json.dumps(results.provenance, indent=2, ensure_ascii=False, default=str))
    parts = [f"<details><summary>Runs</summary><dl>{runs}</dl></details>"]
    if checks:
        parts.append(
            f"<details open><summary>Checks: arms that must equal the clean model</summary><dl>{checks}</dl></details>"
        )
    parts.append(f"<details><summary>Target, versions, settings</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _facts(row: Row) -> str:
    pairs = {
        "writes": sites_label(row.sites),
        "reads": sites_label(row.reads),
        "L0": l0_text(row.cost["l0"]),
        **{key: value for key, value in row.facts.items() if key != "curves"},
    }
    return "; ".join(f"{_words(key)}: {_short(value)}" for key, value in pairs.items())


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value))
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{40,64}", text) else text


def _words(key: str) -> str:
    return key.replace("_", " ")


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return escape(f"{value:,}" if isinstance(value, int) else str(value))
