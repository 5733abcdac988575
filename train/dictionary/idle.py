"""Settings of a recipe's [dictionary] table that would have no effect: refused, with what they wait for.

Whoever sets one of them believes that it does something. Recipes alone are checked, not saved dictionaries: those are
what they are. `aux = 0` and `resample = 0` turn their part off in so many words, and its settings may stay.

Settings that belong to firing rules only, or to topologies, are refused where those are (rules/base.py, spec.py).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from thresher.cache.errors import UserError
from thresher.train.dictionary import rules
from thresher.train.dictionary.topologies import topology

if TYPE_CHECKING:
    from thresher.train.config import TrainConfig
    from thresher.train.dictionary.spec import DictionaryConfig


class Idle(NamedTuple):
    """Settings that wait for others."""

    fields: tuple[str, ...]
    used: Callable[["DictionaryConfig"], bool]
    """Whether they mean something there."""
    needs: str
    """What they wait for, as a recipe says it."""


def penalty_of(settings: "DictionaryConfig") -> str | None:
    """The sparsity penalty in force."""
    return settings.penalty or next(iter(rules.facts(settings.firing).penalties), None)


def sees_norms(settings: "DictionaryConfig") -> bool:
    """Whether a penalty or the pre-activation loss weighs with the norms of decoder rows."""
    below = settings.preact > 0 and settings.preact_form == "threshold"
    return below or (settings.sparsity > 0 and penalty_of(settings) in ("l1", "tanh", "lp"))


def norms_differ(settings: "DictionaryConfig") -> bool:
    """Whether latents that compete can have decoder rows of different norms."""
    if settings.decoder == "unit_per_target":  # all of a layer have as many parts of norm 1
        return settings.pool == "joint"
    return settings.decoder == "free" or (settings.decoder == "auto" and not topology(settings.kind).unit_rows)


def _of_rule(field: str) -> Idle:
    return Idle(
        (field,),
        lambda settings: field in rules.facts(settings.firing).uses,
        f"firing = {' or '.join(repr(name) for name in rules.users(field))}",
    )


def waiting() -> tuple[Idle, ...]:
    """All of them; after plugins, which may add rules with a use for some."""
    return (
        *(_of_rule(field) for field in ("theta", "bandwidth", "threshold_decay")),
        Idle(("rank_by",), norms_differ, "decoder rows whose norms differ (decoder = 'free')"),
        Idle(("k_start",), lambda s: s.k_anneal > 0, "k_anneal above 0"),
        Idle(("tanh_scale",), lambda s: penalty_of(s) == "tanh", "penalty = 'tanh'"),
        Idle(("p_end", "p_start", "p_updates", "p_offset"), lambda s: penalty_of(s) == "lp", "penalty = 'lp'"),
        Idle(("penalty_warmup",), lambda s: s.sparsity > 0, "a sparsity penalty (sparsity above 0)"),
        Idle(("preact_on", "preact_form"), lambda s: s.preact > 0, "preact above 0"),
        Idle(
            ("norm",),
            lambda s: s.rank_by == "norm" or (sees_norms(s) and s.penalty_norm == "l2"),
            "a use for that norm (rank_by = 'norm', or a penalty with penalty_norm = 'l2')",
        ),
        Idle(
            ("penalty_norm",),
            sees_norms,
            "a penalty that weighs with norms (l1, tanh, lp, or preact with preact_form = 'threshold')",
        ),
    )


def refuse_idle(settings: "DictionaryConfig") -> None:
    """Raise UserError for a setting that would have no effect."""
    for idle in waiting():
        for field in idle.fields:
            value = getattr(settings, field)
            if value != getattr(type(settings), field) and not idle.used(settings):
                raise UserError(
                    f"dictionary.{field} is {value!r}, which has no effect here: expected with it {idle.needs}; got "
                    f"firing = {settings.firing!r}, penalty = {penalty_of(settings)!r}, decoder = "
                    f"{settings.decoder!r}. Remove it, or set what it is for."
                )


def refuse_idle_loss(settings: "DictionaryConfig", train: "TrainConfig") -> None:
    """Raise UserError for a unit of the reconstruction loss where nothing is measured in it.

    Through the language model the reconstruction loss counts with `local_weight` alone. AuxK is in its unit where
    `aux_divisor` says so, and a rule's own terms (gated) always are.
    """
    own_terms = rules.facts(settings.firing).terms is not rules.Rule.terms
    in_its_unit = train.local_weight > 0 or own_terms or (settings.aux > 0 and settings.aux_divisor == "none")
    if settings.loss != type(settings).loss and train.objective != "local" and not in_its_unit:
        raise UserError(
            f"dictionary.loss is {settings.loss!r}, which has no effect here: expected with it train.objective = "
            f"'local', train.local_weight above 0, or aux above 0 with aux_divisor = 'none'; got objective = "
            f"{train.objective!r}, local_weight = {train.local_weight:g}, aux = {settings.aux:g}, aux_divisor = "
            f"{settings.aux_divisor!r}. Remove it, or set what it is for."
        )
