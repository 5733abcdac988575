"""Replacements that differ in their seed alone, and how far apart they come out.

A seed is no resample of the text: it says how much of a number is the luck of the training. So seeds are shown as the
lowest and the highest of each metric, and nowhere pooled into one number.
"""

import json
from collections.abc import Sequence
from typing import Any

from thresher.evaluate.results import Row

APART = ("seed", "name", "label", "runs", "git_commit", "curves")
"""Facts in which siblings may differ: the seed, what follows from it, and what names or locates a run."""

METRICS = (
    *("ce", "delta", "ppl_ratio", "recovered_zero", "recovered_mean", "kl", "acc", "acc_drop", "agree"),
    *("l0", "active_per_mlp", "active_parameters", "fvu", "cosine", "gamma", "alive", "dead", "dense_1", "dense_10"),
)
"""Metrics whose lowest and highest value is told."""


def siblings(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of replacements that differ in their seed alone, a list per group of two seeds or more.

    They agree in protocol, sites, family and all facts but those in `APART`. A row without a seed among its facts has
    no siblings.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if row.kind == "replacement" and "seed" in row.facts:
            facts = {key: value for key, value in row.facts.items() if key not in APART}
            rest = json.dumps(facts, sort_keys=True, default=str)
            alike.setdefault((row.protocol, row.reads, row.sites, row.family, rest), []).append(i)
    return [group for group in alike.values() if len({str(rows[i].facts["seed"]) for i in group}) > 1]


def seed_spreads(rows: Sequence[Row]) -> tuple[dict[str, Any], ...]:
    """`Results.seeds`: by group of siblings [lowest, highest] of every metric that all of them define."""
    out = []
    for group in siblings(rows):
        members = [rows[i] for i in group]
        entry: dict[str, Any] = {
            "protocol": members[0].protocol,
            "sites": list(members[0].sites),
            "family": members[0].family,
            "names": [row.name for row in members],
            "seeds": [row.facts["seed"] for row in members],
        }
        for key in METRICS:
            values = [row.metrics.get(key) for row in members]
            defined = [value for value in values if value is not None]
            if len(defined) == len(values):
                entry[key] = [min(defined), max(defined)]
        out.append(entry)
    return tuple(out)
