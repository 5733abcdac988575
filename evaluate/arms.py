"""The arms of an evaluation beside the clean one: their labels, and which ablations the replacements call for."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.evaluate import splice
from thresher.evaluate.checks import Replacement

CLEAN, IDENTITY = "clean", "identity"
CLEAN_SINGLE = "clean|single_site"
"""By position alone: the clean arm in the rows that `single_site` was run on."""


class Plan(NamedTuple):
    """What to run."""

    protocols: tuple[splice.Protocol, ...]
    arms: tuple[str, ...]
    """Of `identity`, `zero`, `mean`, `error_added`; `clean` and the replacements always run."""
    batch_contexts: int
    single_site_share: float


class Ablation(NamedTuple):
    """Constants written in place of activations."""

    values: dict[str, Tensor]
    """[D] by site."""
    single_only: bool
    """Whether `single_site` alone asks for it."""


def patched_label(protocol: str, name: str, site: str | None = None) -> str:
    """Key of a replacement's sums; `single_site` has one per written site."""
    return f"{protocol}|{name}" if site is None else f"{protocol}|{name}|{site}"


def zero_label(sites: Sequence[str]) -> str:
    """Key of the zero ablation of some sites."""
    return "zero|" + ",".join(sites)


def mean_label(sites: Sequence[str], means: Mapping[str, Tensor]) -> str:
    """Key of a mean ablation. Runs of another cache bring other training means, and get an ablation of their own."""
    digest = hashlib.sha256(b"".join(means[site].float().cpu().numpy().tobytes() for site in sites))
    return f"mean|{','.join(sites)}|{digest.hexdigest()[:16]}"


def error_label(name: str) -> str:
    """Key of the check that adds a replacement's errors back."""
    return f"error_added|{name}"


def means_of(replacement: Replacement) -> dict[str, Tensor]:
    """Training means by the sites that a replacement stands for: those it writes, unless it says otherwise."""
    if replacement.means is not None:
        return dict(replacement.means)
    return {site: d.means[site] for d in replacement.dictionaries for site in d.writes}


def ablations(replacements: Sequence[Replacement], plan: Plan) -> dict[str, Ablation]:
    """Every zero and mean ablation needed, by label."""
    out: dict[str, Ablation] = {}
    whole = "cascade" in plan.protocols or "clean_input" in plan.protocols
    for replacement in replacements:
        means = means_of(replacement)
        sets = [(tuple(means), False)] if whole else []
        if "single_site" in plan.protocols:
            sets += [((site,), True) for site in means]
        for sites, single in sets:
            for arm, label in (("zero", zero_label(sites)), ("mean", mean_label(sites, means))):
                if arm in plan.arms:
                    values = {s: means[s] if arm == "mean" else torch.zeros_like(means[s]) for s in sites}
                    out[label] = Ablation(values, single and (label not in out or out[label].single_only))
    return out
