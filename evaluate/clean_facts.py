"""What was measured of a replacement on clean inputs: reconstruction by site and slice, codes by source, costs.

Other tools' explained variances stand beside them under `compat`; nothing is ranked by those.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from thresher.cache.contracts import Dictionary
from thresher.evaluate import metrics
from thresher.evaluate.checks import Replacement
from thresher.evaluate.compat import COMPAT
from thresher.evaluate.costs import costs
from thresher.evaluate.ledger import BESIDE, FIRST, OUTLIERS, PATCHED, Ledger
from thresher.evaluate.metrics import finite_or_none
from thresher.evaluate.tally import Tally


class CleanFacts(NamedTuple):
    """What was measured of a replacement on clean inputs."""

    numbers: dict[str, float | None]
    """Of its rows."""
    per_site: tuple[dict[str, Any], ...]
    sources: tuple[dict[str, Any], ...]
    """Empty for a baseline."""
    cost: dict[str, float]


def clean_input_facts(replacement: Replacement, tally: Tally, written: Sequence[str]) -> CleanFacts:
    """Reconstruction by written site, codes by source, costs, and their summary."""
    own = tally.own[replacement.name]
    per_site = tuple({"site": site} | site_facts(tally, own, site) for site in written)
    shared: dict[str, float | None] = {
        key: _mean_or_none([site.get(key) for site in per_site]) for key in RECONSTRUCTION
    }
    shared["n_parameters"] = float(sum(d.n_parameters for d in replacement.dictionaries))
    if replacement.baseline:
        given = replacement.facts.get("cost", {})
        assert isinstance(given, dict)
        return CleanFacts({**shared, **given}, per_site, (), given)
    sources, l0, used = [], [], []
    for i, dictionary in enumerate(replacement.dictionaries):
        codes = [own.codes[i, s] for s in range(len(dictionary.inputs))]
        numbers = [metrics.code_metrics(sums) for sums in codes]
        l0.append([n["l0"] for n in numbers])
        used.append([_weights_used(dictionary, s, sums) for s, sums in enumerate(codes)])
        for name, sums, n in zip(source_labels(dictionary), codes, numbers, strict=True):
            assert not isinstance(sums.firings, int)
            density = metrics.density_histogram(sums.firings.cpu().numpy(), sums.tokens)
            sources.append({"dictionary": dictionary.name, "site": name, **n, "density": density})
    cost = costs(replacement.dictionaries, l0, used)
    total = metrics.l0_metrics(own.counts["total_l0"].cpu().numpy())
    shared |= cost
    shared |= {f"{key}_total": value for key, value in total.items()}
    shared["l0_median"] = float(np.mean([source["l0_median"] for source in sources]))
    latents = np.array([source["n_latents"] for source in sources])
    for key in ("alive", "dead", "dense_1", "dense_10"):
        shared[key] = float(np.average([source[key] for source in sources], weights=latents))
    shared["n_latents"] = float(latents.sum())
    return CleanFacts(shared, per_site, tuple(sources), cost)


def source_labels(dictionary: Dictionary) -> list[str]:
    """By source, the site that it reads, numbered where several read it; `all sites` for one that reads several."""
    labels = [sites[0] if len(sites) == 1 else "all sites" for sites in dictionary.inputs]
    return [
        f"{label} ({labels[: s + 1].count(label)})" if labels.count(label) > 1 else label
        for s, label in enumerate(labels)
    ]


def _weights_used(dictionary: Dictionary, source: int, sums: metrics.CodeSums) -> float:
    """Weights that the active latents of a source bring into play, mean over tokens."""
    assert not isinstance(sums.firings, int)
    return float(sums.firings.double().cpu() @ dictionary.latent_costs(source).double().cpu()) / sums.tokens


RECONSTRUCTION = (
    "fvu", "fvu_dim_mean", "fvu_token_median", "fvu_uncentred", "offset_share", "cosine", "norm_ratio", "gamma",
)  # fmt: skip
"""Metrics of a row that are means over its written sites."""


def site_facts(tally: Tally, own: Ledger, site: str) -> dict[str, Any]:
    """Reconstruction metrics of one site, by slice too, and other tools' numbers; empty if it was not reconstructed."""
    sums = own.reconstruction.get((site, PATCHED))
    if sums is None:
        return {}
    truth = tally.true(site, PATCHED)
    out: dict[str, Any] = metrics.reconstruction_metrics(truth, sums)
    out["slices"] = _slices(tally, own, site, truth, sums)
    *found, batches = own.counts[f"compat|{site}"].tolist()
    out["compat"] = {key: finite_or_none(value / batches) for key, value in zip(COMPAT, found, strict=True)}
    out["compat"]["batch"] = truth.count / batches
    return out


def _slices(
    tally: Tally, own: Ledger, site: str, truth: metrics.TargetSums, sums: metrics.ReconstructionSums
) -> dict[str, dict[str, float | None]]:
    """Of all real tokens, of the first ones of rows alone, and of patched ones without outliers of the norm."""
    whole, every, out = truth.copy(), sums, {}
    for group in BESIDE:
        beside, their = own.reconstruction.get((site, group)), tally.true(site, group)
        if beside is not None:
            every = every.plus(beside)
            whole.merge(their)
            if group == FIRST:
                out["first"] = _slice(their, beside)
    if every is not sums:
        out["all"] = _slice(whole, every)
    if site in tally.norms:
        outlying = own.reconstruction.get((site, OUTLIERS))
        typical = sums if outlying is None else sums.plus(outlying, -1)
        out["typical"] = _slice(truth.without(tally.true(site, OUTLIERS)), typical)
    return out


def _slice(truth: metrics.TargetSums, sums: metrics.ReconstructionSums) -> dict[str, float | None]:
    return {"tokens": float(truth.count), **metrics.reconstruction_metrics(truth, sums)} if truth.count else {}


def write_norms(replacement: Replacement) -> tuple[dict[str, Any], ...]:
    """How each dictionary with several destinations spreads its squared decoder norm."""
    out = []
    for dictionary in replacement.dictionaries:
        if len(dictionary.writes) > 1 and not replacement.baseline:
            norms = dictionary.write_norms().double().cpu().numpy()
            share = norms / np.nansum(norms)
            table = [[finite_or_none(float(value)) for value in row] for row in share]
            names = {"reads": source_labels(dictionary), "writes": list(dictionary.writes)}
            out.append({"dictionary": dictionary.name, **names, "share": table})
    return tuple(out)


def _mean_or_none(values: Sequence[Any]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if len(defined) == len(values) else None
