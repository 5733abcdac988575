"""The arms of an evaluation beside the clean one: their labels, and which ablations the replacements call for."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.cache.errors import UserError
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


def protocols_of(replacement: Replacement, protocols: Sequence[splice.Protocol]) -> tuple[splice.Protocol, ...]:
    """Those that a replacement can be judged under: not `cascade`, where a dictionary reads what comes only later."""
    able = replacement.protocols
    if able is None:
        able = tuple(p for p in splice.PROTOCOLS if p != "cascade" or all(d.causal for d in replacement.dictionaries))
    return tuple(protocol for protocol in protocols if protocol in able)


def protocols_that_fit(
    replacements: Sequence[Replacement], protocols: tuple[splice.Protocol, ...]
) -> tuple[tuple[splice.Protocol, ...], list[str]]:
    """Those that some replacement can be judged under, and notes on who is left out of which.

    Raises UserError for a replacement that none is left for.
    """
    notes = []
    for replacement in replacements:
        own = protocols_of(replacement, protocols)
        reason = (
            f"{replacement.name!r} reads sites that the model reaches only after what is computed from them, so it "
            "cannot run along in a forward pass"
        )
        if not own:
            raise UserError(f"evaluate.protocols is {list(protocols)}, but {reason}. Add clean_input or single_site.")
        if own != protocols:
            notes.append(f"{reason[0].upper()}{reason[1:]}: it is left out of cascade.")
    possible = {protocol for replacement in replacements for protocol in protocols_of(replacement, protocols)}
    return tuple(protocol for protocol in protocols if protocol in possible), notes


def has_error_arm(replacement: Replacement, plan: Plan) -> bool:
    """Whether its errors are added back under cascade, as a check."""
    causal = all(dictionary.causal for dictionary in replacement.dictionaries)
    return "error_added" in plan.arms and not replacement.baseline and causal


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
    for replacement in replacements:
        means, protocols = means_of(replacement), protocols_of(replacement, plan.protocols)
        sets = [(tuple(means), False)] if "cascade" in protocols or "clean_input" in protocols else []
        if "single_site" in protocols:
            sets += [((site,), True) for site in means]
        for sites, single in sets:
            for arm, label in (("zero", zero_label(sites)), ("mean", mean_label(sites, means))):
                if arm in plan.arms:
                    values = {s: means[s] if arm == "mean" else torch.zeros_like(means[s]) for s in sites}
                    out[label] = Ablation(values, single and (label not in out or out[label].single_only))
    return out
