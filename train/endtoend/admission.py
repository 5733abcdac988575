"""What cannot be trained through the language model, told from plans alone, before anything is loaded."""

from collections.abc import Sequence

import torch

from thresher.cache.errors import UserError
from thresher.train.dictionary import rules
from thresher.train.dictionary.topologies import topology
from thresher.train.plan import RunPlan

_TOKENS = 1024
"""Of the batch that rules are asked about; any number does."""


def check_group(plans: Sequence[RunPlan]) -> None:
    """Raise UserError, with the reason and a remedy, for plans that cannot share their passes of the model."""
    _check_sites(plans)
    for plan in plans:
        _check_codes(plan)
        if plan.train.mode == "cascade":
            _check_cascade(plan)


def _check_sites(plans: Sequence[RunPlan]) -> None:
    written = [site for plan in plans for site in plan.spec.writes]
    twice = sorted({site for site in written if written.count(site) > 1})
    if twice:
        raise UserError(
            f"Dictionaries of the group {plans[0].group!r} write to the same site ({', '.join(twice)}), so they "
            "cannot be patched in together. Expected one writer per site: narrow dictionary.reads, or give them names "
            "of their own in [[sweep]] blocks."
        )


def _check_codes(plan: RunPlan) -> None:
    """Raise UserError for further codes of a dictionary, each of which would need a pass of the model."""
    further = {"prefixes": plan.spec.prefixes is not None, "multi_topk": plan.spec.multi_topk > 0}
    for name, given in further.items():
        if given:
            raise UserError(
                f"dictionary.{name} of {plan.name!r} asks for reconstructions beside the main one, but with "
                f"train.objective = {plan.train.objective!r} only the main one is patched into the model. Remove it, "
                "or train with objective = 'local'."
            )


def _check_cascade(plan: RunPlan) -> None:
    spec = plan.spec
    if not topology(spec.kind).causal:
        raise UserError(
            f"dictionary.kind of {plan.name!r} is {spec.kind!r}, which reads sites that the model reaches only "
            "after those it writes, so it cannot run along in a pass. Set train.mode = 'clean_input' or 'single_site'."
        )
    if spec.pool == "joint":
        raise UserError(
            f"dictionary.pool of {plan.name!r} is 'joint', but in mode = 'cascade' what later layers read follows "
            "from what earlier ones have selected, so they cannot compete. Set pool = 'layer' or another mode."
        )
    if plan.train.part_rows == plan.train.batch_rows:
        return
    with torch.device("meta"):
        competing = rules.rule(spec, deployed=False).budget(_TOKENS) is not None
    couplings = {
        f"firing = {spec.firing!r} selects over the whole batch": competing,
        "penalty = 'target_l0' takes the mean L0 of the whole batch": spec.resolved_penalty == "target_l0",
        "AuxK divides by the residual's variance over the whole batch (aux_divisor)": spec.aux > 0
        and spec.aux_divisor == "residual",
    }
    found = [why for why, holds in couplings.items() if holds]
    if found:
        raise UserError(
            f"train.micro_rows = {plan.train.micro_rows} cuts the batches of {plan.name!r} into parts, but in "
            f"mode = 'cascade' {'; '.join(found)}, which a part does not see: what later sites read follows from "
            "earlier selections of the same part. Leave micro_rows out and take a smaller batch_rows, or change that."
        )
