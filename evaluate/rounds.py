"""All batches of an evaluation, each run for those ledgers that have not seen it.

Every part keeps its own count of batches (ledger.py). What a store knows is taken from there, and a batch is run only
for those who have not seen it; sums are kept every half minute, when the user stops, and at the end.

Several ranks divide the ledgers by the forward passes that they still need. Each keeps its sums in the store that they
share, where rank 0 finds them when all have ended. Every rank runs the clean pass, which the others are held against.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.contracts import Target
from thresher.cache.interrupts import Interrupted, StopFlag
from thresher.cache.roster import Roster
from thresher.cache.world import divide
from thresher.evaluate import splice
from thresher.evaluate.arms import CLEAN, IDENTITY, Plan, ablations, has_error_arm, means_of, protocols_of
from thresher.evaluate.checks import Replacement
from thresher.evaluate.ledger import Ledger
from thresher.evaluate.masks import Scored
from thresher.evaluate.passes import BatchRunner, Clean, cuts, make_batch
from thresher.evaluate.store import Store
from thresher.evaluate.tally import Tally

KEEP_EVERY_S = 30.0


class Job(NamedTuple):
    """One ledger and how a batch gets into it."""

    ledger: Ledger
    run: Callable[[BatchRunner, Clean], object]
    passes: tuple[int, int]
    """Forward passes of a batch without and with `single_site`."""
    single_only: bool = False


def jobs(tally: Tally, replacements: Sequence[Replacement]) -> list[Job]:
    """Everything but the clean arm."""
    plan, device, out = tally.plan, tally.device, []
    written = list(tally.truth)
    for site, ledger in tally.truth.items():

        def describe(run: BatchRunner, clean: Clean, ledger: Ledger = ledger, site: str = site) -> None:
            run.add_truth(ledger, site, clean)

        out.append(Job(ledger, describe, (0, 0)))
    if IDENTITY in tally.arms:
        ledger = tally.arms[IDENTITY]

        def identity(run: BatchRunner, clean: Clean, ledger: Ledger = ledger) -> None:
            run.run(ledger, IDENTITY, splice.identity_edits(written, run.batch.patch), "The identity arm")

        out.append(Job(ledger, identity, (1, 1)))
    for label, (values, single_only) in ablations(replacements, plan).items():
        constants = {site: value.to(device) for site, value in values.items()}

        def ablate(
            run: BatchRunner, clean: Clean, label: str = label, constants: dict[str, Tensor] = constants
        ) -> None:
            edits = splice.constant_edits(constants, run.batch.patch)
            run.run(tally.arms[label], label, edits, f"The ablation {label!r}")

        out.append(Job(tally.arms[label], ablate, (0 if single_only else 1, 1), single_only))
    for replacement in replacements:
        own = tally.own[replacement.name]

        def judge(run: BatchRunner, clean: Clean, own: Ledger = own, replacement: Replacement = replacement) -> None:
            run.run_replacement(own, replacement, clean)

        out.append(Job(own, judge, _passes(replacement, plan)))
    return out


def _passes(replacement: Replacement, plan: Plan) -> tuple[int, int]:
    protocols = protocols_of(replacement, plan.protocols)
    every = sum(p in protocols for p in ("cascade", "clean_input"))
    every += has_error_arm(replacement, plan)
    sites = len(means_of(replacement))
    extra = sites if "single_site" in protocols and (sites > 1 or "clean_input" not in protocols) else 0
    return every, every + extra


def count_passes(work: Sequence[Job], clean: Ledger, batches: Sequence[tuple[np.ndarray, bool]]) -> int:
    """Forward passes that are left, for the progress bar."""
    total = 0
    for i, (_, single) in enumerate(batches):
        due = [job for job in work if job.ledger.done <= i and (single or not job.single_only)]
        total += sum(job.passes[single] for job in due) + bool(due or clean.done <= i)
    return total


def run_passes(
    scored: Scored,
    replacements: Sequence[Replacement],
    target: Target,
    plan: Plan,
    *,
    norms: Mapping[str, float] | None = None,
    store: Store | None = None,
    begin: Callable[[int, int], Callable[[], None]] = lambda passes, known: lambda: None,
    roster: Roster | None = None,
) -> Tally:
    """Run every arm over all rows and return the sums.

    `norms`: by site, the norm above which a row counts as an outlier. `begin` is told the number of passes to come and
    of replacements whose sums are whole already, and returns what is called after each pass. With a store, what it
    knows is not run again, and SIGINT or SIGTERM end in Interrupted with the sums so far kept. `roster`: the ranks that
    share the work through the store; rank 0 returns all sums, the others only their own.
    """
    roster = roster or Roster()
    assert store is not None or roster.world.alone, "ranks meet in a store"
    tally = Tally(scored, replacements, target, plan, norms or {})
    batches, work = cuts(scored, plan), jobs(tally, replacements)
    ledgers = list(tally.ledgers())
    _take_up(ledgers, store, plan, len(batches), target)
    share = _share(ledgers, work, batches, roster)
    clean = tally.arms[CLEAN]
    known = sum(tally.own[r.name].done == len(batches) for r in replacements if not r.baseline)
    mine = [job for job in work if id(job.ledger) in share]
    advance = begin(count_passes(mine, clean, batches), known)
    sites = tuple(dict.fromkeys([s for r in replacements for s in splice.reads(r.dictionaries)] + list(tally.truth)))
    every = _Rounds(scored, batches, target, tally, sites, store, advance)
    with ExitStack() as stack, torch.inference_mode():
        stop = stack.enter_context(roster.interrupts()) if store is not None else StopFlag()
        _fill(every, mine, id(clean) in share, stop)
        if roster.world.speaks and not roster.world.alone:
            roster.wait()
            _take_up([ledger for ledger in ledgers if id(ledger) not in share], store, plan, len(batches), target)
            _fill(every, work, True, stop)  # of which nothing is left, unless a file of sums was lost meanwhile
    return tally


class _Rounds(NamedTuple):
    """What all batches of an evaluation share."""

    scored: Scored
    batches: Sequence[tuple[np.ndarray, bool]]
    target: Target
    tally: Tally
    sites: tuple[str, ...]
    """What the clean pass records."""
    store: Store | None
    advance: Callable[[], None]


def _fill(on: _Rounds, some: Sequence[Job], with_clean: bool, stop: StopFlag) -> None:
    """Run all batches for those ledgers that have not seen them, of these jobs and, if wanted, of the clean arm."""
    plan, store, clean, count = on.tally.plan, on.store, on.tally.arms[CLEAN], len(on.batches)
    fresh = [job.ledger for job in some if job.ledger.done < count]
    fresh += [clean] if with_clean and clean.done < count else []
    kept = time.monotonic()
    for i, (index, single) in enumerate(on.batches):
        due, clean_due = [job for job in some if job.ledger.done <= i], with_clean and clean.done <= i
        if due or clean_due:
            batch = make_batch(on.scored, index, single, on.target.device)
            runner = BatchRunner(on.target, batch, on.tally, on.advance)
            found = runner.run_clean(on.sites, clean if clean_due else None)
            clean.done = i + 1 if clean_due else clean.done
            for job in due:
                if single or not job.single_only:
                    job.run(runner, found)
                job.ledger.done = i + 1
        last = i + 1 == count
        if store is not None and not last and (stop.requested or time.monotonic() - kept > KEEP_EVERY_S):
            _keep(store, fresh, plan, whole=False)
            kept = time.monotonic()
            if stop.requested:
                raise Interrupted(
                    f"Stopped after {i + 1} of {count} batches; the sums so far are kept in {store.folder}. "
                    "The same command goes on from there."
                )
    if store is not None:
        _keep(store, fresh, plan, whole=True)


def _take_up(ledgers: Sequence[Ledger], store: Store | None, plan: Plan, batches: int, target: Target) -> None:
    """Fill ledgers with what the store knows."""
    if store is not None:
        for ledger in ledgers:
            store.take_up(ledger, plan.batch_contexts, batches, target.device)


def _share(
    ledgers: Sequence[Ledger], work: Sequence[Job], batches: Sequence[tuple[np.ndarray, bool]], roster: Roster
) -> set[int]:
    """Identities of the ledgers that this rank fills, as rank 0 has divided them.

    What has no key cannot be passed on through the store, so rank 0 fills it, and the clean arm.
    """
    if roster.world.alone:
        return {id(ledger) for ledger in ledgers}
    if roster.world.speaks:
        owners = [0] * len(ledgers)
        place = {id(ledger): index for index, ledger in enumerate(ledgers) if ledger.key is not None}
        apart = [job for job in work if id(job.ledger) in place]
        costs = [
            sum(job.passes[single] for i, (_, single) in enumerate(batches) if job.ledger.done <= i) for job in apart
        ]
        for job, rank in zip(apart, divide(costs, roster.world.size), strict=True):
            owners[place[id(job.ledger)]] = rank
        roster.tell("ledgers", json.dumps(owners))
    else:
        owners = json.loads(roster.hear("ledgers"))
    return {id(ledger) for ledger, rank in zip(ledgers, owners, strict=True) if rank == roster.world.rank}


def _keep(store: Store, fresh: Sequence[Ledger], plan: Plan, *, whole: bool) -> None:
    for ledger in fresh:
        if ledger.done:
            store.put(ledger, plan.batch_contexts, whole=whole)
