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
from thresher.evaluate.checks import Replacement
from thresher.evaluate.costs import costs
from thresher.evaluate.masks import Scored
from thresher.evaluate.passes import (
    CLEAN,
    IDENTITY,
    Plan,
    Tally,
    error_label,
    mean_label,
    means_of,
    patched_label,
    zero_label,
)
from thresher.evaluate.results import PROTOCOLS, Row, Segments
from thresher.evaluate.statistics import FEW_UNITS, Interval, interval, resampled_sums, unit_sums

INTERVALS = ("ce", "delta", "ppl_ratio", "kl", "acc_drop", "agree", "recovered_zero", "recovered_mean")
TRANSPARENT = 1e-5
"""|δ| in nats up to which an arm that should change nothing counts as doing so in float32."""

SPELLED = {"sae": "SAE", "clt": "CLT", "topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "relu": "ReLU"}


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
        {name: sums.cpu().numpy() for name, sums in tally.segment_l0.items()},
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
    words = [SPELLED.get(str(facts[key]), str(facts[key])) for key in ("kind", "firing") if key in facts]
    return str(facts.get("family") or " ".join(words) or "–")


def replacement_rows(
    replacements: Sequence[Replacement],
    tally: Tally,
    segments: Segments,
    plan: Plan,
    sites: Mapping[str, Site],
    judges: Mapping[str, Judge],
) -> list[Row]:
    """One row per replacement and protocol, fronts not marked yet."""
    order = list(sites)
    rows = []
    for replacement in replacements:
        written = tuple(sorted(means_of(replacement), key=order.index))
        shared, per_site, sources, cost = clean_input_facts(replacement, tally, written, sites)
        for protocol in plan.protocols:
            judge = judges[protocol]
            language, intervals = judge.metrics(_sums(judge, replacement, protocol, tuple(means_of(replacement))))
            numbers = language | shared
            if protocol == "cascade":
                patched = int(tally.cascade_l0[replacement.name])
                numbers["l0_patched"] = patched / sources[0]["tokens"] / len(sources)
            singles: list[dict[str, Any]] = [{} for _ in written]
            if protocol == "single_site":
                singles = [judge.metrics(_sums(judge, replacement, protocol, (site,)))[0] for site in written]
            rows.append(
                Row(
                    name=replacement.name,
                    kind="replacement",
                    family=family(replacement),
                    protocol=protocol,
                    reads=tuple(sorted({s for d in replacement.dictionaries for s in d.reads}, key=order.index)),
                    sites=written,
                    metrics=numbers,
                    intervals=intervals,
                    cost=cost,
                    front={},
                    per_site=tuple(own | single for own, single in zip(per_site, singles, strict=True)),
                    sources=sources,
                    facts=replacement.facts,
                    positions={},
                    chance={},
                    write_norms=(),
                )
            )
    return rows


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


def clean_input_facts(
    replacement: Replacement, tally: Tally, written: Sequence[str], sites: Mapping[str, Site]
) -> tuple[dict[str, float | None], tuple[dict[str, Any], ...], tuple[dict[str, Any], ...], dict[str, float]]:
    """What was measured on clean inputs: (numbers of the row, per written site, per source, costs)."""
    per_site: tuple[dict[str, Any], ...] = tuple(
        {"site": site} | metrics.reconstruction_metrics(tally.truth[site], tally.reconstruction[replacement.name, site])
        for site in written
    )
    sources, l0 = [], []
    for i, dictionary in enumerate(replacement.dictionaries):
        own = [tally.codes[replacement.name, i, s] for s in range(len(dictionary.reads))]
        numbers = [metrics.code_metrics(sums) for sums in own]
        l0.append([n["l0"] for n in numbers])
        for name, sums, n in zip(dictionary.reads, own, numbers, strict=True):
            assert not isinstance(sums.firings, int)
            density = metrics.density_histogram(sums.firings.cpu().numpy(), sums.tokens)
            sources.append({"dictionary": dictionary.name, "site": name, **n, "density": density})
    cost = costs(replacement.dictionaries, l0, {name: site.width for name, site in sites.items()})
    shared: dict[str, float | None] = dict(cost)
    total = metrics.l0_metrics(tally.total_l0[replacement.name].cpu().numpy())
    shared |= {f"{key}_total": value for key, value in total.items()}
    shared["l0_median"] = float(np.mean([source["l0_median"] for source in sources]))
    latents = np.array([source["n_latents"] for source in sources])
    for key in ("alive", "dead", "dense_1", "dense_10"):
        shared[key] = float(np.average([source[key] for source in sources], weights=latents))
    for key in ("fvu", "fvu_dim_mean", "fvu_token_median", "fvu_uncentred", "offset_share", "cosine", "gamma"):
        shared[key] = _mean_or_none([site[key] for site in per_site])
    shared["n_latents"] = float(latents.sum())
    shared["n_parameters"] = float(sum(d.n_parameters for d in replacement.dictionaries))
    return shared, per_site, tuple(sources), cost


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if len(defined) == len(values) else None


def baseline_rows(replacements: Sequence[Replacement], plan: Plan, judges: Mapping[str, Judge]) -> list[Row]:
    """Clean, and zero and mean ablation of every set of written sites, under each protocol."""
    rows: list[Row] = []
    for protocol in plan.protocols:
        judge = judges[protocol]
        seen: set[tuple[str, ...]] = set()
        for replacement in replacements:
            sites = tuple(means_of(replacement))
            sums = _sums(judge, replacement, protocol, sites)
            arms: list[tuple[str, str, np.ndarray | None]] = [
                ("clean", CLEAN, judge.arm([CLEAN])),
                ("zero", zero_label(sites), sums.zero),
                ("mean", mean_label(sites, means_of(replacement)), sums.mean),
            ]
            for name, label, arm in arms:
                key = (name,) if name == "clean" else (name, label)
                if arm is not None and key not in seen:
                    seen.add(key)
                    rows.append(_baseline_row(name, protocol, sites, judge, Sums(arm, sums.zero, sums.mean)))
    return rows


def _baseline_row(name: str, protocol: str, sites: tuple[str, ...], judge: Judge, sums: Sums) -> Row:
    numbers, intervals = judge.metrics(sums)
    return Row(name, "baseline", "baseline", protocol, (), sites, numbers, intervals, {}, {}, (), (), {}, {}, {}, ())


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
