"""From sums to rows: every metric, interval and cost of a finished tally. No model is run here.

The same lines compute a point estimate and its resamples, so an interval can never describe another formula than its
number. Under `single_site` an arm's sums are the mean over its sites, which makes every number of the row a mean over
sites taken before any ratio.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from thresher.cache.contracts import Site
from thresher.evaluate import metrics
from thresher.evaluate.arms import (
    CLEAN,
    CLEAN_SINGLE,
    IDENTITY,
    Plan,
    error_label,
    mean_label,
    means_of,
    patched_label,
    protocols_of,
    zero_label,
)
from thresher.evaluate.checks import Replacement
from thresher.evaluate.clean_facts import clean_input_facts, write_norms
from thresher.evaluate.masks import Scored
from thresher.evaluate.positions import Buckets, positions
from thresher.evaluate.results import PROTOCOLS, Row, Segments
from thresher.evaluate.statistics import FEW_UNITS, Interval, interval, resampled_sums, unit_sums
from thresher.evaluate.tally import Tally

INTERVALS = ("ce", "delta", "ppl_ratio", "kl", "acc_drop", "agree", "recovered_zero", "recovered_mean")
TRANSPARENT = 1e-5
"""|δ| in nats up to which an arm that should change nothing counts as doing so in float32."""

SPELLED = {
    "sae": "SAE",
    "clt": "CLT",
    "molt": "MoLT",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "relu": "ReLU",
}


class Draw(NamedTuple):
    """Settings of the bootstrap."""

    resamples: int
    seed: int


class Sums(NamedTuple):
    """Segment sums of one arm and what it is compared with, under one protocol."""

    arm: np.ndarray
    zero: np.ndarray | None
    mean: np.ndarray | None


def segments_of(scored: Scored, tally: Tally) -> Segments:
    """The tally's per-segment sums as plain arrays."""
    tokens = np.bincount(scored.segment[scored.score], minlength=len(scored.segment_row))
    single = np.isin(scored.segment_row, tally.single_rows)
    return Segments(
        scored.segment_row,
        scored.segment_document,
        tokens,
        tokens * single,
        {label: sums.cpu().numpy() for label, sums in tally.language.items()},
        {name: own.counts["segment_l0"].cpu().numpy() for name, own in tally.own.items() if "segment_l0" in own.counts},
    )


class Judge:
    """Turns segment sums into metrics under one protocol, over the segments that protocol was run on."""

    def __init__(self, segments: Segments, protocol: str, by_document: bool, draw: Draw) -> None:
        self.segments, self.draw = segments, draw
        tokens = segments.tokens_single if protocol == "single_site" else segments.tokens
        self.used = tokens > 0
        self.unit = (segments.document if by_document else segments.row)[self.used]
        self.tokens = tokens[self.used].astype(np.float64)
        self.units = len(np.unique(self.unit))

    def arm(self, labels: Sequence[str]) -> np.ndarray | None:
        """Mean of some arms' sums, [G', 4]; None when one was not run."""
        if any(label not in self.segments.arms for label in labels):
            return None
        first, *rest = [self.segments.arms[label][self.used] for label in labels]
        # around the first, so that the mean of equal arms is that arm to the last bit
        return np.asarray(first + sum(other - first for other in rest) / len(labels))

    def metrics(self, sums: Sums) -> tuple[dict[str, float | None], dict[str, Interval | None]]:
        """Point estimates and intervals."""
        clean = self.arm([CLEAN])
        assert clean is not None
        columns = {"clean": clean, "arm": sums.arm, "zero": sums.zero, "mean": sums.mean}
        present = {name: value for name, value in columns.items() if value is not None}
        stacked = np.concatenate([self.tokens[:, None], *present.values()], axis=1)
        totals = unit_sums(stacked, self.unit)
        point = self._language(totals.sum(axis=0), list(present))
        samples = self._language(resampled_sums(totals, self.draw.resamples, self.draw.seed), list(present))
        return metrics.finite(point), {key: interval(samples[key]) for key in INTERVALS}

    def difference(self, first: np.ndarray, second: np.ndarray) -> tuple[float, Interval]:
        """CE of the second arm minus CE of the first, and its interval under shared resamples."""
        totals = unit_sums(np.stack([self.tokens, second[:, 0] - first[:, 0]], axis=1), self.unit)
        samples = resampled_sums(totals, self.draw.resamples, self.draw.seed)
        found = interval(samples[:, 1] / samples[:, 0])
        assert found is not None
        return float(totals[:, 1].sum() / totals[:, 0].sum()), found

    @staticmethod
    def _language(totals: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        parts = {name: totals[..., 1 + 4 * k : 5 + 4 * k] for k, name in enumerate(names)}
        return metrics.language_metrics(
            totals[..., 0], parts["clean"], parts["arm"], parts.get("zero"), parts.get("mean")
        )


def family(replacement: Replacement) -> str:
    """`transcoder BatchTopK`: the label under which rows are grouped."""
    facts = replacement.facts
    words = ["skip"] if facts.get("skip") else []
    words += [SPELLED.get(str(facts[key]), str(facts[key])) for key in ("kind", "firing") if key in facts]
    return str(facts.get("family") or " ".join(words) or "–")


def replacement_rows(
    replacements: Sequence[Replacement],
    tally: Tally,
    plan: Plan,
    sites: Mapping[str, Site],
    judges: Mapping[str, Judge],
    buckets: Buckets,
) -> list[Row]:
    """One row per replacement and protocol, fronts not marked yet; of baselines too."""
    order = list(sites)
    rows = []
    for replacement in replacements:
        written = tuple(sorted(means_of(replacement), key=order.index))
        own = clean_input_facts(replacement, tally, written)
        for protocol in protocols_of(replacement, plan.protocols):
            judge = judges[protocol]
            all_sites = tuple(means_of(replacement))
            language, intervals = judge.metrics(_sums(judge, replacement, protocol, all_sites))
            numbers = language | own.numbers
            if protocol == "cascade" and own.sources:
                patched = int(tally.own[replacement.name].counts["cascade_l0"])
                numbers["l0_patched"] = patched / own.sources[0]["tokens"] / len(own.sources)
            singles: list[dict[str, Any]] = [{} for _ in written]
            if protocol == "single_site":
                singles = [judge.metrics(_sums(judge, replacement, protocol, (site,)))[0] for site in written]
            labels = _labels(replacement.name, protocol, all_sites)
            l0_P = tally.own[replacement.name].counts.get("position_l0")
            l0_P = None if l0_P is None else l0_P / len(own.sources)
            rows.append(
                Row(
                    name=str(replacement.facts.get("title", replacement.name)),
                    kind="baseline" if replacement.baseline else "replacement",
                    family="baseline" if replacement.baseline else family(replacement),
                    protocol=protocol,
                    reads=tuple(sorted({s for d in replacement.dictionaries for s in d.reads}, key=order.index)),
                    sites=written,
                    metrics=numbers,
                    intervals=intervals,
                    cost=own.cost,
                    front={},
                    per_site=tuple(a | b for a, b in zip(own.per_site, singles, strict=True)),
                    sources=own.sources,
                    facts=replacement.facts,
                    positions=positions(tally, labels, protocol, buckets, l0_P),
                    chance={},
                    write_norms=write_norms(replacement),
                )
            )
    return rows


def _labels(name: str, protocol: str, sites: Sequence[str]) -> list[str]:
    if protocol == "single_site":
        return [patched_label(protocol, name, site) for site in sites]
    return [patched_label(protocol, name)]


def replacement_sums(judge: Judge, replacement: Replacement, protocol: str) -> Sums:
    """Segment sums of a replacement with all its sites, and of the ablations of the same sites."""
    return _sums(judge, replacement, protocol, tuple(means_of(replacement)))


def _sums(judge: Judge, replacement: Replacement, protocol: str, sites: tuple[str, ...]) -> Sums:
    means, name = means_of(replacement), replacement.name
    if protocol == "single_site":
        patched = [patched_label(protocol, name, site) for site in sites]
        zero = [zero_label([site]) for site in sites]
        mean = [mean_label([site], means) for site in sites]
    else:
        patched, zero, mean = [patched_label(protocol, name)], [zero_label(sites)], [mean_label(sites, means)]
    arm = judge.arm(patched)
    assert arm is not None
    return Sums(arm, judge.arm(zero), judge.arm(mean))


def baseline_rows(
    replacements: Sequence[Replacement], tally: Tally, plan: Plan, judges: Mapping[str, Judge], buckets: Buckets
) -> list[Row]:
    """Clean, and zero and mean ablation of every set of written sites, under each protocol."""
    rows: list[Row] = []
    for protocol in plan.protocols:
        judge = judges[protocol]
        seen: set[tuple[str, ...]] = set()
        for replacement in replacements:
            if protocol not in protocols_of(replacement, plan.protocols):
                continue
            sites = tuple(means_of(replacement))
            sums = _sums(judge, replacement, protocol, sites)
            means, parts = means_of(replacement), [sites]
            if protocol == "single_site":
                parts = [(site,) for site in sites]
            arms: list[tuple[str, list[str], np.ndarray | None]] = [
                ("clean", [CLEAN_SINGLE if protocol == "single_site" else CLEAN], judge.arm([CLEAN])),
                ("zero", [zero_label(part) for part in parts], sums.zero),
                ("mean", [mean_label(part, means) for part in parts], sums.mean),
            ]
            for name, labels, arm in arms:
                key = (name,) if name == "clean" else (name, *labels)
                if arm is None or key in seen:
                    continue
                seen.add(key)
                numbers, intervals = judge.metrics(Sums(arm, sums.zero, sums.mean))
                rows.append(
                    Row(
                        name=name,
                        kind="baseline",
                        family="baseline",
                        protocol=protocol,
                        reads=(),
                        sites=sites,
                        metrics=numbers,
                        intervals=intervals,
                        cost={},
                        front={},
                        per_site=(),
                        sources=(),
                        facts={},
                        positions=positions(tally, labels, protocol, buckets),
                        chance={},
                        write_norms=(),
                    )
                )
    return rows


def check_rows(replacements: Sequence[Replacement], judge: Judge) -> tuple[dict[str, Any], ...]:
    """Arms that must equal the clean model, and by how much they miss it."""
    labels = {"identity": IDENTITY} | {f"error_added: {r.name}": error_label(r.name) for r in replacements}
    out = []
    for name, label in labels.items():
        arm = judge.arm([label])
        if arm is not None:
            numbers, _ = judge.metrics(Sums(arm, None, None))
            delta, kl = numbers["delta"], numbers["kl"]
            assert delta is not None
            assert kl is not None
            passed = abs(delta) <= TRANSPARENT and abs(kl) <= TRANSPARENT
            out.append({"name": name, "delta": delta, "kl": kl, "agree": numbers["agree"], "passed": passed})
    return tuple(out)


def protocol_facts(plan: Plan, judges: Mapping[str, Judge]) -> dict[str, dict[str, Any]]:
    """By protocol: definition, counts, and whether the bootstrap has few units."""
    return {
        protocol: {
            "definition": PROTOCOLS[protocol],
            "scored_tokens": int(judges[protocol].tokens.sum()),
            "rows": len(np.unique(judges[protocol].segments.row[judges[protocol].used])),
            "units": judges[protocol].units,
            "few_units": judges[protocol].units < FEW_UNITS,
        }
        for protocol in plan.protocols
    }
