"""The columns of the results table, once for the terminal, Markdown and the report.

A column is a title, what it means, how its value is read from a row and how it is written, so that no two tables can
disagree. Its explanation in the report is the definition of its key in `results.DEFINITIONS`.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from thresher.evaluate.results import DEFINITIONS, Row

FRONT_AXIS = "l0"
STAR = "★"
ABLATIONS = ("zero", "mean")
MEANING = DEFINITIONS | {
    "chance": "Probability of being on the Pareto front of δ against the cost shown: the share of bootstrap resamples "
    "in which no other replacement of the same sites is better on both.",
}


class Column(NamedTuple):
    """One column."""

    key: str
    """A key of `Row.metrics`, or `chance`; also the sort key in the report."""
    title: str
    form: Callable[[float], str]
    better: int
    """-1: lower is better, 1: higher, 0: neither."""
    terminal: bool
    """Whether it fits the terminal's 100 columns; the report shows all."""

    def value(self, row: Row) -> float | None:
        """The cell's number, if the row has it."""
        return row.chance.get(FRONT_AXIS) if self.key == "chance" else row.metrics.get(self.key)

    def text(self, row: Row) -> str:
        """The cell's text; a dash where the row has no such number."""
        value = self.value(row)
        return "–" if value is None else self.form(value)


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def chance_text(value: float) -> str:
    """A share of resamples in whole percent; all and none are said of all and none alone."""
    if 0 < value < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= value < 1 else f"{value:.0%}"


def count(value: float) -> str:
    """12,288 as 12.3k; whole numbers below 10,000 as they are."""
    for limit, divisor, unit in ((1e4, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if value < limit:
            return f"{value / divisor:.0f}" if divisor == 1 else f"{value / divisor:.3g}{unit}"
    return f"{value / 1e9:.3g}B"


def l0_text(value: float) -> str:
    """Three digits where they matter."""
    return f"{value:.1f}" if value < 1000 else count(value)


COLUMNS = (
    Column("chance", "P(★)", chance_text, 0, True),
    Column("l0", "L0", l0_text, -1, True),
    Column("delta", "δ", _fixed(4), -1, True),
    Column("recovered_zero", "rec. zero", _percent, 1, True),
    Column("recovered_mean", "rec. mean", _percent, 1, False),
    Column("kl", "KL", _fixed(4), -1, True),
    Column("acc_drop", "acc drop", _percent, -1, False),
    Column("agree", "agree", _percent, 1, True),
    Column("fvu", "FVU", _fixed(3), -1, True),
    Column("dead", "dead", _percent, -1, True),
    Column("dense_10", "dense>10%", _percent, -1, False),
    Column("n_latents", "latents", count, 0, True),
    Column("ce", "CE", _fixed(4), -1, False),
    Column("ppl_ratio", "ppl ratio", _fixed(3), -1, False),
    Column("l0_patched", "L0 live", l0_text, 0, False),
    Column("active_per_mlp", "per MLP", l0_text, -1, False),
    Column("active_parameters", "act. params", count, -1, False),
    Column("n_parameters", "params", count, 0, False),
)


def filled(rows: Sequence[Row]) -> list[Column]:
    """The columns that some row has a number for."""
    return [column for column in COLUMNS if any(column.value(row) is not None for row in rows)]


def meaning(key: str) -> str:
    """A column in plain words."""
    return MEANING[key]


def interval_text(row: Row, key: str = "delta", digits: int = 3) -> str:
    """`0.412–0.437`, empty for baselines without one."""
    found = row.intervals.get(key)
    return "" if found is None else f"{found.low:.{digits}f}–{found.high:.{digits}f}"


def star(row: Row) -> str:
    """★ on the front of δ against L0."""
    return STAR if row.front.get(FRONT_AXIS) else ""


def label(row: Row, several: bool = False) -> str:
    """What a row is called; ablations say what they ablate where there are `several` sets of sites."""
    if row.kind == "replacement" or row.name == "clean":
        return row.name
    name = f"{row.name} ablation" if row.name in ABLATIONS else row.name
    return name + (f" ({sites_label(row.sites)})" if several else "")


def sites_label(sites: Sequence[str]) -> str:
    """`mlp_out L0–3` for a run of layers of one tap, else the names."""
    found = [re.fullmatch(r"L(\d+)\.(\w+)", site) for site in sites]
    if sites and all(found) and len({m[2] for m in found if m}) == 1:
        layers, tap = [int(m[1]) for m in found if m], next(m[2] for m in found if m)
        if layers == list(range(layers[0], layers[-1] + 1)):
            return f"{tap} L{layers[0]}" + (f"–{layers[-1]}" if len(layers) > 1 else "")
        return f"{tap} L" + ",".join(map(str, layers))
    return ", ".join(sites)
