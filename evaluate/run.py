"""The stage: trained dictionaries and a target into results under labelled protocols.

Sees dictionaries and the model only through `cache/contracts.py`: it calls `encode` and `decode`, never rewrites them,
and knows no weight. Order: refuse what cannot work, choose rows and masks, run the passes, turn sums into rows.
"""

import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from thresher.cache.contracts import Site, Target
from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.records import fingerprint, to_dict
from thresher.cache.roster import Roster
from thresher.evaluate import comparison, verdict
from thresher.evaluate.arms import Plan, protocols_that_fit
from thresher.evaluate.causality import Causality, check_causality
from thresher.evaluate.checks import Replacement, check_replacements, check_tokens
from thresher.evaluate.fitting import Fitted
from thresher.evaluate.masks import Scored, scored
from thresher.evaluate.positions import buckets_of
from thresher.evaluate.results import Results
from thresher.evaluate.rounds import run_passes
from thresher.evaluate.seeds import seed_spreads
from thresher.evaluate.splice import Protocol
from thresher.evaluate.statistics import FEW_UNITS
from thresher.evaluate.store import Store
from thresher.evaluate.tally import Tally
from thresher.evaluate.yardsticks import baselines, learned

__all__ = ["EvaluateConfig", "Replacement", "contribute", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How dictionaries are judged."""

    protocols: tuple[Literal["cascade", "clean_input", "single_site"], ...] = ("cascade", "clean_input", "single_site")
    """Ways of patching reconstructions in; each gives its own table, and cascade is the headline."""
    split: Literal["test", "validation", "train"] = "test"
    """Documents to evaluate on; select settings on validation, report on test."""
    together: bool = True
    """Whether the dictionaries of one variant, such as a transcoder per layer, form a set that is patched in together;
    false: each is judged alone."""
    tokens: int = 200_000
    """Scored tokens, about; 0 or more than there are takes the whole split."""
    single_site_share: float = 0.25
    """Part of the rows on which single_site runs: it needs one pass per site."""
    arms: tuple[Literal["identity", "zero", "mean", "error_added"], ...] = ("identity", "zero", "mean")
    """Arms beside clean and the replacements: two ablations, and two checks that must equal clean."""
    batch_contexts: int = 8
    """Contexts per forward pass; memory holds two tensors of batch × context × vocabulary."""
    neurons: tuple[int, ...] = (32, 128)
    """Baselines beside sets of dictionaries that write MLP outputs: so many of the MLP's own neurons, the largest of
    each token."""
    training_tokens: int = 65_536
    """Training tokens, about, on which the best affine map is fitted and the norm of an outlier found; 0: neither."""
    resamples: int = 2000
    """Bootstrap resamples behind every interval."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        least = {"tokens": 0, "training_tokens": 0, "batch_contexts": 1, "resamples": 100, "seed": 0}
        for field, low in least.items():
            value = getattr(self, field)
            if value < low:
                raise UserError(f"evaluate.{field} is {value}; expected at least {low}.")
        if not 0 < self.single_site_share <= 1:
            raise UserError(
                f"evaluate.single_site_share is {self.single_site_share}; expected more than 0 and at most 1. To leave "
                "single_site out, remove it from evaluate.protocols."
            )
        for k in self.neurons:
            if k < 1:
                raise UserError(f"evaluate.neurons is {list(self.neurons)}; expected numbers of neurons, at least 1.")
        if not self.protocols:
            raise UserError("evaluate.protocols is empty; expected at least one of cascade, clean_input, single_site.")
        for field in ("protocols", "arms", "neurons"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise UserError(f"evaluate.{field} is {list(values)}; expected each name at most once.")


class _Measured(NamedTuple):
    """What an evaluation has measured, and what the verdict needs beside it."""

    judged: list[Replacement]
    replacements: list[Replacement]
    """With the baselines beside them."""
    sites: dict[str, Site]
    protocols: tuple[Protocol, ...]
    text: Scored
    plan: Plan
    tally: Tally
    fitted: Fitted
    causality: Causality | None
    notes: list[str]


def evaluate(
    replacements: Sequence[Replacement],
    target: Target,
    contexts: Contexts,
    config: EvaluateConfig,
    *,
    console: Console,
    provenance: Mapping[str, Any],
    training: Contexts | None = None,
    store: Store | None = None,
    roster: Roster | None = None,
) -> Results:
    """Patch every replacement into the target on held-out contexts and measure what is lost.

    From contexts of the `training` split come the affine baseline and the norm of an outlier; without them neither is
    reported. With a `store`, sums that it holds are not computed again, and Ctrl-C or SIGTERM end in Interrupted with
    the sums so far in it. `provenance` is recorded as it is, beside versions, settings, target and masks. `roster`,
    entered: the ranks that measure along (`contribute`); this is rank 0. Raises UserError for replacements that do not
    fit the target, contexts that cannot be scored, and numbers that are not finite.
    """
    found = _measure(replacements, target, contexts, config, console, training, store, roster or Roster())
    judged, replacements, sites, protocols, text, plan, tally, fitted, causality, notes = found
    buckets = buckets_of(text, tally)
    segments = verdict.segments_of(text, tally)
    draw = verdict.Draw(config.resamples, config.seed)
    judges: dict[str, verdict.Judge] = {p: verdict.Judge(segments, p, text.has_documents, draw) for p in protocols}
    whole = verdict.Judge(segments, "cascade", text.has_documents, draw)
    rows = verdict.baseline_rows(judged, tally, plan, judges, buckets)
    rows += verdict.replacement_rows(replacements, tally, plan, sites, judges, buckets)
    target_hash, text_hash = fingerprint(dict(target.identity)), str(text.facts["sha256"])
    excluded = comparison.mark_fronts(rows, (target_hash, text_hash, *_mask_rules(text)))
    groups = comparison.groups(judged, rows, judges)
    comparison.mark_chances(groups)
    facts = verdict.protocol_facts(plan, judges)
    checks = verdict.check_rows(judged, whole)
    return Results(
        provenance={
            **provenance,
            "target": {"name": target.name, "sha256": target_hash, "identity": dict(target.identity)},
            "dtype": str(target.dtype).removeprefix("torch."),
            "dictionary_dtype": "float64" if str(target.dtype) == "torch.float64" else "float32",
            "device": str(target.device),
            "autocast": False,
            "training": fitted.facts,
            "causality": None if causality is None else causality._asdict(),
            "evaluate": to_dict(config),
            "evaluate_versions": versions(),
        },
        masks=text.facts,
        protocols=facts,
        rows=tuple(rows),
        pairs=comparison.ranked_pairs(judged, rows, judges),
        checks=checks,
        seeds=seed_spreads(rows),
        hypervolumes=comparison.hypervolumes(groups, rows),
        matched=comparison.matched(groups),
        excluded=tuple(excluded),
        notes=tuple(notes + _notes(facts, checks, str(text.facts["unit"]))),
        segments=segments,
    )


def contribute(
    replacements: Sequence[Replacement],
    target: Target,
    contexts: Contexts,
    config: EvaluateConfig,
    *,
    roster: Roster,
    store: Store,
    training: Contexts | None = None,
) -> None:
    """On a rank other than 0: measure this rank's share of what `evaluate` measures on rank 0, into the same store."""
    _measure(replacements, target, contexts, config, Console(quiet=True), training, store, roster)


def _measure(
    replacements: Sequence[Replacement],
    target: Target,
    contexts: Contexts,
    config: EvaluateConfig,
    console: Console,
    training: Contexts | None,
    store: Store | None,
    roster: Roster,
) -> _Measured:
    """Refuse what cannot work, choose rows and masks, run the passes."""
    sites = check_replacements(replacements, target)
    protocols, left_out = protocols_that_fit(replacements, config.protocols)
    text = scored(contexts, config.tokens)
    check_tokens(text, target)
    causality = check_causality(target, replacements, text)
    if not roster.world.speaks:
        roster.hear("learned")  # what rank 0 has learned is in the store then
    with roster.phase("fitting the baselines"):
        fitted = learned(replacements, target, training, config.training_tokens, store)
    if roster.world.speaks:
        roster.tell("learned", "")
    beside = baselines(replacements, target, fitted, config.neurons)
    judged, replacements = list(replacements), [*replacements, *beside.replacements]
    sites = {site.name: site for site in target.sites(list({**sites, **beside.sites}))}
    plan = Plan(protocols, config.arms, config.batch_contexts, config.single_site_share)
    with _progress(console) as progress:

        def begin(passes: int, known: int) -> Callable[[], None]:
            if known:
                of = f"{known} of {len(judged)} replacements were measured before: their sums are taken up."
                console.print(of, highlight=False)
            task = progress.add_task("evaluate", total=passes)
            return lambda: progress.advance(task)

        norms = fitted.outlier_norm
        tally = run_passes(text, replacements, target, plan, norms=norms, store=store, begin=begin, roster=roster)
    return _Measured(
        judged, replacements, sites, protocols, text, plan, tally, fitted, causality, left_out + beside.notes
    )


def versions() -> dict[str, str]:
    """Of Python and the libraries that numbers depend on."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in ("torch", "numpy", "transformers", "transformer-lens")
    }


def _mask_rules(text: Scored) -> tuple[str, str]:
    return str(text.facts["patch_rule"]), str(text.facts["score_rule"])


def _notes(protocols: Mapping[str, Mapping[str, Any]], checks: Sequence[Mapping[str, Any]], unit: str) -> list[str]:
    notes = []
    few = [
        f"{p} {facts['units']} {unit}{'s' * (facts['units'] != 1)}"
        for p, facts in protocols.items()
        if facts["few_units"]
    ]
    if few:
        notes.append(f"Fewer than {FEW_UNITS} units to resample, so intervals are rough: {', '.join(few)}.")
    for check in checks:
        if not check["passed"]:
            notes.append(
                f"The arm {check['name']} should equal the clean model and misses it by δ = {check['delta']:.2e}, "
                f"KL = {check['kl']:.2e}; numbers below that size mean nothing."
            )
    return notes


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("passes"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
