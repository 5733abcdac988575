"""The results of one evaluation as a record, and its documented JSON form.

Everything a number depends on travels with it: target, text, masks and their counts, protocol, versions and settings.
`DEFINITIONS` says in plain words what each key means; it is written into the JSON and shown in the report, so that a
number and its meaning cannot drift apart. `SCHEMA` describes the JSON file itself.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from thresher.cache.errors import UserError
from thresher.evaluate.statistics import Interval

FORMAT, VERSION = "thresher.results", 2

Kind = Literal["replacement", "baseline"]

DEFINITIONS: dict[str, str] = {
    "ce": "Cross-entropy of the patched model: mean -log p of the next token, in nats.",
    "ce_clean": "Cross-entropy of the untouched model on the same tokens.",
    "ce_zero": "Cross-entropy when zeros are written at the same sites.",
    "ce_mean": "Cross-entropy when each site's training mean is written instead.",
    "delta": "δ: patched minus clean cross-entropy, in nats. 0 is perfect; this ranks the table.",
    "ppl": "Perplexity of the patched model, exp(ce).",
    "ppl_ratio": "By what factor patching raises perplexity, exp(δ).",
    "recovered_zero": "Share of the zero-ablation damage undone: 1 is the clean model, 0 no better than zeros. "
    "Saturates near 1, so compare δ instead.",
    "recovered_mean": "The same against mean ablation.",
    "kl": "KL(clean ‖ patched) of the next-token distributions, in nats per token.",
    "kl_score": "1 - kl/kl of zero ablation.",
    "acc": "How often the patched model's most likely next token is the actual next token.",
    "acc_clean": "The same for the untouched model.",
    "acc_drop": "Clean minus patched next-token accuracy.",
    "agree": "How often patched and clean model agree on the most likely next token.",
    "l0": "Active latents per token and source, mean over patched positions, on clean inputs.",
    "l0_median": "Median over tokens of the active latents of one source (mean over sources).",
    "l0_patched": "Active latents per token and source as they arise on the patched stream (cascade only).",
    "fvu": "Fraction of variance unexplained on clean inputs, mean over sites: squared error over squared distance "
    "from the mean of the evaluated tokens. 0 is perfect, 1 no better than that mean.",
    "fvu_dim_mean": "FVU of each dimension, averaged; constant dimensions dropped.",
    "fvu_token_median": "Median over tokens of squared error over squared norm.",
    "fvu_uncentred": "Squared error over squared norm, without removing the mean.",
    "offset_share": "Part of fvu that is a constant offset.",
    "cosine": "Mean cosine between true and reconstructed activation.",
    "norm_ratio": "Mean of reconstructed over true norm.",
    "gamma": "Σ‖ŷ‖²/Σ y·ŷ: 1 means no shrinkage.",
    "alive": "Share of latents that fired at least once on the evaluated tokens.",
    "dead": "Share of latents that never fired on the evaluated tokens; rare ones are among them, so compare only at "
    "equal token counts.",
    "dense_1": "Share of latents firing on more than 1 % of tokens.",
    "dense_10": "Share of latents firing on more than 10 % of tokens.",
    "active_per_mlp": "Active latents that one reconstruction sums over, mean over written sites.",
    "active_parameters": "Weights of the active latents per token (encoder, decoder, transforms), and of "
    "skip connections, of all sites together.",
    "ev_legacy_token": "SAELens up to 6.17 and SAEBench's paper: mean over tokens of 1 - ‖r‖²/‖y - ȳ‖², ȳ the batch's "
    "mean, then the mean over batches. Never ranked.",
    "fve_centred": "dictionary_learning: mean over batches of 1 - Σ_d var(r_d)/Σ_d var(y_d). Does not see a constant "
    "offset. Never ranked.",
    "ev_second_moment": "SAELens 6.18 and SAEBench 0.6: 1 - mean ‖r‖²/(mean ‖y‖² - (mean of all y²)²), mean over "
    "batches. Changes when y is scaled. Never ranked.",
    "n_latents": "Number of latents of all sources together.",
    "n_parameters": "All parameters of the dictionaries.",
}

PROTOCOLS: dict[str, str] = {
    "cascade": "All dictionaries in place at once in one pass; each reads the stream as the earlier ones left it. "
    "Errors add up as they would in use: the headline.",
    "clean_input": "Every dictionary reads the untouched model's activations; all reconstructions are written at once.",
    "single_site": "One site patched at a time, the rest of the model its own; numbers are means over the sites.",
}

SCHEMA: dict[str, str] = {
    "format, version": "thresher.results and the version of this layout.",
    "provenance": "Versions, commit, recipe, target identity, settings and whatever the caller recorded.",
    "masks": "Patch and scoring rule, row rule, token counts, excluded share, unit of the bootstrap, SHA-256 of the "
    "evaluated rows.",
    "protocols": "By protocol: definition, scored tokens, rows, bootstrap units and whether those are few.",
    "definitions": "Every metric key in plain words.",
    "rows": "One per replacement or baseline and protocol: name, kind, family, protocol, reads, sites, metrics {key: "
    "number or null}, intervals {key: [low, high] or null} (95 %, paired bootstrap), cost {axis: number}, front {axis: "
    "bool}, chance {axis: P(on front)}, positions {first, last, tokens, ce, delta, kl, l0: lists}, per_site and "
    "sources (lists of {site, …}), write_norms, facts of the runs.",
    "pairs": "Neighbours in the ranking by δ of a protocol and set of sites: δ of b minus δ of a, with its interval.",
    "checks": "Arms that must equal clean (identity, error_added) and by how much they miss it.",
    "seeds": "Replacements that differ in the seed alone: protocol, family, names, and by metric [lowest, highest].",
    "hypervolumes": "By protocol, written sites, family and cost axis: area between the family's front and the "
    "reference point in log2 cost and log10 δ, with its interval.",
    "matched": "Families at equal cost (values are δ) or at equal δ (values are costs), interpolated inside their "
    "ranges only, the best first, with intervals, lowest and highest over seeds, and differences to the best.",
    "excluded": "Rows on no front because a number is undefined, as name, protocol and axis.",
    "notes": "Warnings a reader should know.",
    "documents.npz": "Beside the JSON: sums by segment (part of one document in one row), for paired comparisons "
    "without running the model again.",
}


class Row(NamedTuple):
    """One line of one protocol's table."""

    name: str
    kind: Kind
    family: str
    """Topology and firing rule; the rows of one colour in the plots."""
    protocol: str
    reads: tuple[str, ...]
    """Sites read, in forward order; the written ones themselves for SAEs."""
    sites: tuple[str, ...]
    """Sites written, in forward order."""
    metrics: dict[str, float | None]
    """Keys of `DEFINITIONS`."""
    intervals: dict[str, Interval | None]
    """95 % bootstrap intervals of some of the metrics."""
    cost: dict[str, float]
    """By axis of `costs.AXES`; empty for baselines."""
    front: dict[str, bool]
    """Whether on the Pareto front of δ against each cost axis."""
    per_site: tuple[dict[str, Any], ...]
    """By written site: `site`, reconstruction metrics on clean inputs; `slices` (the same by slice: `all` real tokens,
    `first` positions of rows alone, `typical` without outliers of the norm); `compat` (other tools' numbers by their
    batches, and `batch`, the tokens in one); under single_site also its language metrics."""
    sources: tuple[dict[str, Any], ...]
    """By read site of each dictionary: `dictionary`, `site`, code metrics, `density` histogram."""
    facts: dict[str, Any]
    """What the caller knows of the runs; `curves`, if present: numbers along training, lists of equal length by key,
    `rows` (training rows seen) among them."""
    positions: dict[str, list[float | None]]
    """By buckets of the source position: `first` and `last` (inclusive), `tokens` scored there, `ce`, `delta`, `kl`,
    `l0`; empty if unknown."""
    chance: dict[str, float]
    """Probability of being on the front by cost axis: the share of bootstrap resamples. Empty for baselines."""
    write_norms: tuple[dict[str, Any], ...]
    """Of every dictionary with several destinations: `dictionary`, `reads`, `writes`, and `share` [source][destination]
    of the squared decoder norm, null where a source does not write; all of a dictionary add up to 1."""


class Segments(NamedTuple):
    """Sums per segment, the material of every interval."""

    row: np.ndarray
    """[G] row of the split."""
    document: np.ndarray
    """[G] document, -1 without documents."""
    tokens: np.ndarray
    """[G] scored tokens."""
    tokens_single: np.ndarray
    """[G] scored tokens under single_site: 0 in rows it was not run on."""
    arms: dict[str, np.ndarray]
    """[G, 4] nll, kl, correct, agree by arm label (`passes`)."""
    l0: dict[str, np.ndarray]
    """[G] active latents over all sources, summed over scored tokens, by replacement."""


class Results(NamedTuple):
    """Everything an evaluation found."""

    provenance: dict[str, Any]
    masks: dict[str, Any]
    protocols: dict[str, dict[str, Any]]
    rows: tuple[Row, ...]
    pairs: tuple[dict[str, Any], ...]
    """Neighbours in the ranking by δ: `protocol`, `a`, `b`, `difference` (δ of b minus δ of a), `low`, `high`."""
    checks: tuple[dict[str, Any], ...]
    seeds: tuple[dict[str, Any], ...]
    """Replacements that differ in the seed alone: `protocol`, `sites`, `family`, `names`, `seeds`, and by metric (those
    of `seeds.METRICS` that all of them define) [lowest, highest]."""
    hypervolumes: tuple[dict[str, Any], ...]
    """By `protocol`, written `sites` and `family`, on the cost axis `axis`: `value`, `low`, `high`, and the `reference`
    point {cost, loss}."""
    matched: tuple[dict[str, Any], ...]
    """Families compared at equal cost or equal loss: `protocol`, `sites`, `axis`, `at` (`cost` or `loss`), `where`, and
    `values`, the best first: `family`, `value`, `low`, `high` (null outside its range); `lowest`, `highest` over its
    seeds (null for one seed); `difference`, `difference_low`, `difference_high` to the first (null for the first);
    `n_latents` of the size that represents the family; `reached`, the share of resamples inside its range."""
    excluded: tuple[str, ...]
    notes: tuple[str, ...]
    segments: Segments | None
    """None when read back from JSON alone."""

    def table(self, protocol: str) -> list[Row]:
        """Rows of one protocol as they are shown: by written sites, family and rising L0; baselines last."""
        rows = [row for row in self.rows if row.protocol == protocol]
        baselines = [row for row in rows if row.kind == "baseline"]
        replacements = [row for row in rows if row.kind == "replacement"]
        return sorted(replacements, key=lambda row: (row.sites, row.family, row.cost["l0"], row.name)) + baselines

    def find(self, name: str, protocol: str) -> Row:
        """The row of that name and protocol; a replacement before a baseline that is called the same."""
        found = [row for row in self.rows if row.name == name and row.protocol == protocol]
        return min(found, key=lambda row: row.kind == "baseline")


def to_json(results: Results) -> dict[str, Any]:
    """JSON values as `SCHEMA` describes."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "schema": SCHEMA,
        "provenance": results.provenance,
        "masks": results.masks,
        "protocols": results.protocols,
        "definitions": DEFINITIONS,
        "rows": [
            row._asdict() | {"intervals": {key: value and list(value) for key, value in row.intervals.items()}}
            for row in results.rows
        ],
        "pairs": list(results.pairs),
        "checks": list(results.checks),
        "seeds": list(results.seeds),
        "hypervolumes": list(results.hypervolumes),
        "matched": list(results.matched),
        "excluded": list(results.excluded),
        "notes": list(results.notes),
    }


def from_json(raw: Mapping[str, Any]) -> Results:
    """Read `to_json` back, without segments. Raises UserError for another format or a newer version."""
    if raw.get("format") != FORMAT:
        raise UserError(f"Expected results of format {FORMAT!r}, got {raw.get('format')!r}. Give a results.json.")
    if raw["version"] > VERSION:
        raise UserError(f"These results have version {raw['version']}; this program reads up to {VERSION}. Update it.")
    return Results(
        provenance=raw["provenance"],
        masks=raw["masks"],
        protocols=raw["protocols"],
        rows=tuple(_row(row) for row in raw["rows"]),
        pairs=tuple(raw["pairs"]),
        checks=tuple(raw["checks"]),
        seeds=tuple(raw["seeds"]),
        hypervolumes=tuple(raw["hypervolumes"]),
        matched=tuple(raw["matched"]),
        excluded=tuple(raw["excluded"]),
        notes=tuple(raw["notes"]),
        segments=None,
    )


def _row(raw: Mapping[str, Any]) -> Row:
    fields = dict(raw)
    fields["intervals"] = {key: value and Interval(*value) for key, value in raw["intervals"].items()}
    for key in ("reads", "sites", "per_site", "sources", "write_norms"):
        fields[key] = tuple(raw[key])
    return Row(**fields)
