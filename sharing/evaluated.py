"""An evaluation as its results.json tells it: the rows of the table, and which run directories stand behind each.

The file describes itself (docs/formats.md), so this reads JSON and needs nothing of the evaluation's code.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from thresher.cache.errors import UserError

FORMAT, VERSION = "thresher.results", 2


class Row(NamedTuple):
    """One line of one protocol's table."""

    name: str
    kind: str
    """`replacement` or `baseline`."""
    family: str
    protocol: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    metrics: Mapping[str, float | None]
    """Keys as in the file's `definitions`."""
    interval: tuple[float, float] | None
    """Of δ, 95 %."""
    on_front: bool
    """Of δ against L0."""
    runs: tuple[str, ...]
    """Names of the run directories behind it; () for baselines."""
    facts: Mapping[str, Any]

    def metric(self, key: str) -> float | None:
        """A number, or None where it is undefined."""
        return self.metrics.get(key)


class Evaluation(NamedTuple):
    """What an evaluation found."""

    rows: tuple[Row, ...]
    protocols: Mapping[str, Mapping[str, Any]]
    """By name: `definition`, scored tokens and more."""
    definitions: Mapping[str, str]
    """Of every metric."""
    masks: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def replacements(self) -> list[Row]:
        """Rows of dictionaries."""
        return [row for row in self.rows if row.kind == "replacement"]


def read_results(text: str | bytes, where: str) -> Evaluation:
    """results.json as an Evaluation; `where` names it in messages. Raises UserError for another format or version."""
    try:
        raw = json.loads(text)
        ours = raw["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{where} is not the results.json of an evaluation. Run `thresher evaluate` again.")
    if raw["version"] > VERSION:
        raise UserError(
            f"{where} has version {raw['version']}; this Thresher reads up to {VERSION}. Update it, or evaluate anew."
        )
    rows = tuple(_row(row) for row in raw["rows"])
    return Evaluation(rows, raw["protocols"], raw["definitions"], raw["masks"], raw["provenance"])


def _row(raw: Mapping[str, Any]) -> Row:
    interval = raw["intervals"].get("delta")
    return Row(
        name=raw["name"],
        kind=raw["kind"],
        family=raw["family"],
        protocol=raw["protocol"],
        reads=tuple(raw["reads"]),
        writes=tuple(raw["sites"]),
        metrics=raw["metrics"],
        interval=None if interval is None else (interval[0], interval[1]),
        on_front=bool(raw["front"].get("l0")),
        runs=tuple(PurePath(path).name for path in raw["facts"].get("runs", ())),
        facts=raw["facts"],
    )


def check_evaluates(evaluation: Evaluation, configs: Mapping[str, Mapping[str, Any]], where: Path | str) -> None:
    """Raise UserError unless the evaluation judges at least one of the runs, and none of another make by their names.

    `configs`: config.json by the run's name.
    """
    known = [row for row in evaluation.replacements if set(row.runs) & set(configs)]
    if not known:
        raise UserError(
            f"{where} judges none of these runs: it names {_listed(evaluation)}. Give the report of an evaluation of "
            "them, or leave it out."
        )
    for row in known:
        for name in row.runs:
            if name in configs and (unlike := _unlike(row, configs[name])):
                raise UserError(
                    f"{where} judges another run that is called {name} as well: {unlike}. Evaluate the runs as they "
                    "are now, or leave the report out."
                )


def _unlike(row: Row, config: Mapping[str, Any]) -> str | None:
    """The first fact of the row that is not the run's."""
    dictionary, training = config["dictionary"], config.get("training", {})
    here = {
        "kind": dictionary.get("kind"),
        "firing": dictionary.get("firing"),
        "n_latents": dictionary.get("n_latents"),
        "seed": training.get("seed"),
        "training_rows": training.get("rows"),
        "cache_fingerprint": (config.get("cache") or {}).get("fingerprint"),
    }
    for key, value in here.items():
        if key in row.facts and value is not None and row.facts[key] != value:
            return f"its {key} is {row.facts[key]!r}, the run's {value!r}"
    return None


def _listed(evaluation: Evaluation) -> str:
    names: Sequence[str] = list(dict.fromkeys(name for row in evaluation.replacements for name in row.runs))
    return (", ".join(names[:6]) + (", …" if len(names) > 6 else "")) or "no run directories at all"
