"""The training stage: every dictionary of a sweep from one stream of batches.

Dictionaries that share batch size and seed form a pass: one `Batches` feeds them all, step by step, and each keeps its
own optimiser, schedule and length. What they do not share is trained in a further pass. The language model is only
needed by plans with an objective that goes through it (train/endtoend/), whose groups follow one after the other.

A run directory belongs to one resolved recipe. Finished: it is reused. Unfinished: it goes on from its last checkpoint
when `resume` is set. Made from another recipe: refused. A dictionary whose loss or gradient stops being finite is set
aside with its last good state; the others go on.

Ranks of a job that share dictionaries (train/mesh.py) go through all of this side by side, the one that leads writing.
Before it writes into a directory of an earlier job, all of them have read what they need there.
"""

import math
import shutil
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console

from thresher.cache.contracts import Target
from thresher.cache.devices import resolve_device
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.roster import Roster
from thresher.cache.source import Source
from thresher.train.calibrate import HeldOut, RowsOf, calibrate, difference, held_out
from thresher.train.config import TrainConfig
from thresher.train.crew import Crew, give_back_freed_memory
from thresher.train.dictionary.topologies import topology
from thresher.train.division import agreed, cells_for, division, show_all, spoken, work
from thresher.train.endtoend.decomposed import DecompositionFit
from thresher.train.endtoend.feed import common_step, feed_group
from thresher.train.endtoend.setting import Setting, together
from thresher.train.feed import Shared, Stream, feed
from thresher.train.files import CONFIG, read_config, save_run, write_config
from thresher.train.finetune import Origin, origin
from thresher.train.fit import Fit
from thresher.train.jobs import Job
from thresher.train.kernels.workspace import Workspace
from thresher.train.mesh import ParallelConfig, cell_of, formed
from thresher.train.metrics import MetricLog, Silence, last_metrics
from thresher.train.plan import RunPlan
from thresher.train.standing import config_of, reusable
from thresher.train.state import load_checkpoint
from thresher.train.tracking import WandbMode, check_trial

__all__ = ["RunResult", "TrainConfig", "train"]


class RunResult(NamedTuple):
    """What became of one plan."""

    name: str
    group: str
    path: Path
    """Run directory."""
    status: Literal["trained", "reused", "failed"]
    metrics: dict[str, Any]
    """`training` of its config.json: steps, rows, last training metrics, held-out FVU and L0."""


def train(
    plans: Sequence[RunPlan],
    reader: Source,
    *,
    out: Path,
    device: str = "auto",
    resume: bool = False,
    wandb: WandbMode = "disabled",
    profile: bool = False,
    console: Console,
    target: Target | None = None,
    roster: Roster | None = None,
    parallel: ParallelConfig | None = None,
) -> list[RunResult]:
    """Train all plans from the cache into `out`/<name>; results in the order of the plans.

    `target`: the language model, frozen, on `device`; needed where a plan's objective is not local. `profile` writes a
    trace of some steps into the first run directory of every pass (train/profile.py). `roster`, entered: the ranks that
    the plans are divided among (train/division.py); rank 0 returns all results, the others those of their share.
    `parallel`: how many of them share one dictionary; None: none do.
    Raises UserError before any work for duplicate names, for directories that hold something else, and for unfinished
    runs without `resume`. Raises Interrupted after SIGINT or SIGTERM, with everything saved.
    """
    names = [plan.name for plan in plans]
    _check_names(names, wandb)
    where = resolve_device(device, "--device")
    groups = together(plans)
    if groups and target is None:
        raise UserError(
            f"Group {next(iter(groups))!r} is trained through the language model, which was not given. Pass `target`, "
            "or set train.objective = 'local'."
        )
    setting = Setting(target, reader, where) if groups and target is not None else None
    origins = {plan.name: origin(plan) for plan in plans}
    totals = [_total(plan, reader, setting) for plan in plans]
    configs = [
        config_of(plan, origins[plan.name], total, reader, where, groups)
        for plan, total in zip(plans, totals, strict=True)
    ]
    roster, parallel = roster or Roster(), parallel or ParallelConfig()
    console = spoken(roster.world, console)
    cells, cell = cells_for(parallel, groups, roster.world, console), cell_of(roster.world, parallel)
    owners, results = {}, {}
    if roster.world.speaks:
        results = _reused(plans, configs, groups, out, resume)
        if results:
            console.print(f"Reusing {len(results)} finished of {len(plans)} runs in {out}.")
        owners = division([w for w in work(plans, totals, out) if w.name not in results], cells)
    owners = agreed(owners, roster, where, console, parallel)
    todo = [(plan, config) for plan, config in zip(plans, configs, strict=True) if owners.get(plan.name) == cell]
    for members in groups.values():
        if owners.get(members[0].name) == cell:
            common_step([out / plan.name for plan in members])
    with ExitStack() as stack, roster.interrupts() as stop, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        mesh = stack.enter_context(formed(roster, parallel, where))
        crew = stack.enter_context(Crew(where, in_turn=not mesh.alone))
        shared, workspace = Shared(reader, where, crew, stop, console, profile, mesh), Workspace()
        with roster.phase("opening the runs"):
            fits = [_fit(*one, out / one[0].name, origins[one[0].name], shared, workspace, target) for one in todo]
            mesh.everyone.wait()
        jobs = [_open(*one, out / one[0].name, fit, wandb, stack) for one, fit in zip(todo, fits, strict=True)]
        give_back_freed_memory()
        results |= _fed(jobs, groups, setting, out, shared)
        if roster.world.speaks:
            roster.wait()
    elsewhere = [plan for plan in plans if roster.world.speaks and owners.get(plan.name, cell) != cell]
    results |= {plan.name: _done_elsewhere(plan, out / plan.name) for plan in elsewhere}
    if elsewhere:
        show_all(results, names, console)
    return [results[name] for name in names if name in results]


def _check_names(names: Sequence[str], wandb: WandbMode) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"Several dictionaries have the name {twice[0]!r}. Give their [[sweep]] blocks different names."
        )
    if wandb != "disabled":
        check_trial(names)


def _fed(
    jobs: Sequence[Job], groups: Collection[str], setting: Setting | None, out: Path, on: Shared
) -> dict[str, RunResult]:
    """Results by name of all jobs: stream by stream, then group by group of those trained through the model."""
    results: dict[str, RunResult] = {}
    streams: dict[Stream, list[Job]] = {}
    for job in jobs:
        if job.plan.group in groups:
            continue
        key = Stream(job.plan.train.batch_rows, job.plan.seed, job.fit.position)
        streams.setdefault(key, []).append(job)
    for stream, group in streams.items():
        feed(group, stream, on)
        results |= _finished(group, out, on)
    for name in groups:
        group = [job for job in jobs if job.plan.group == name]
        if group:
            assert setting is not None
            joint = setting.group([job.fit for job in group])
            feed_group(group, joint, on)
            results |= _finished(group, out, on, joint.trained_rows if _reads_patched(group) else None)
    return results


def _reused(
    plans: Sequence[RunPlan],
    configs: Sequence[dict[str, Any]],
    groups: Mapping[str, Sequence[RunPlan]],
    out: Path,
    resume: bool,
) -> dict[str, RunResult]:
    """Results by name of the runs that are finished already. Raises UserError for directories that stand in the way."""
    found = {
        plan.name: reusable(plan, config, out / plan.name, resume) for plan, config in zip(plans, configs, strict=True)
    }
    for members in groups.values():
        if any(found[plan.name] is None for plan in members):  # a group ends together; what is done comes out again
            found |= dict.fromkeys(plan.name for plan in members)
    return {
        plan.name: RunResult(plan.name, plan.group, out / plan.name, "reused", training)
        for plan in plans
        if (training := found[plan.name]) is not None
    }


def _done_elsewhere(plan: RunPlan, path: Path) -> RunResult:
    """What became of a plan that another cell has trained, from its run directory."""
    training = read_config(path)["training"]
    return RunResult(plan.name, plan.group, path, "trained" if training["finished"] else "failed", training)


def _reads_patched(jobs: Sequence[Job]) -> bool:
    """Whether encoders read in training what the cache does not hold."""
    return jobs[0].plan.train.mode == "cascade"


def _total(plan: RunPlan, reader: Source, setting: Setting | None) -> int:
    """Optimiser steps of a plan."""
    if plan.train.objective == "local" or setting is None:
        return plan.train.total_steps(reader.rows("train"))
    return setting.total_steps(plan)


def _fit(
    plan: RunPlan,
    config: dict[str, Any],
    path: Path,
    begun_from: Origin | None,
    on: Shared,
    workspace: Workspace,
    target: Target | None,
) -> Fit:
    """A plan's dictionary, at its beginning or at its last checkpoint; reads the run directory and changes nothing."""
    total = config["training"]["total_steps"]
    if topology(plan.spec.kind).decomposes:
        assert target is not None, "its objective asks for the model"
        fit: Fit = DecompositionFit(plan, on.reader, on.device, workspace, total, target)
    else:
        fit = Fit(plan, on.reader, on.device, workspace, total, on.mesh, on.stop)
    checkpoint = load_checkpoint(path, fit.rows_of)
    if checkpoint is not None:
        fit.load(checkpoint)
    elif begun_from is not None:
        fit.start(on.reader, begun_from.load(fit.coder.holding))
    else:
        fit.start(on.reader)
    return fit


def _open(plan: RunPlan, config: dict[str, Any], path: Path, fit: Fit, wandb: WandbMode, stack: ExitStack) -> Job:
    """The job of a dictionary; its run directory is made or gone on with."""
    if not fit.mesh.leads:
        return Job(plan, path, config, fit, Silence())
    begun = (path / CONFIG).exists()
    try:
        log = MetricLog(path, config=config, wandb=wandb, after_step=fit.done)
    except UserError:
        if not begun:
            shutil.rmtree(path, ignore_errors=True)  # or the next attempt would find a directory that is no run
        raise
    stack.callback(log.close)
    write_config(path, config)
    return Job(plan, path, config, fit, log)


def _save_and_stop(jobs: Sequence[Job], out: Path) -> None:
    """Save every job that can go on, then raise Interrupted."""
    for job in jobs:
        if job.failed is None:
            job.save()
    done = max((job.fit.done for job in jobs), default=0)
    raise Interrupted(
        f"Training stopped at step {done} with {len(jobs)} runs saved in {out}. Run the same command with --resume to "
        "go on from there."
    )


def _finished(jobs: Sequence[Job], out: Path, on: Shared, read: RowsOf | None = None) -> dict[str, RunResult]:
    """Results by name of the jobs of a pass; raises Interrupted, with everything saved, once a stop is requested."""
    stopped = on.stopping()
    results = {} if stopped else {result.name: result for result in _finish(jobs, on, read)}
    if stopped or on.stopping():
        _save_and_stop(jobs, out)
    return results


def _finish(jobs: Sequence[Job], on: Shared, read: RowsOf | None) -> Iterable[RunResult]:
    """Freeze, check and save the jobs that reached their end; none of them once a stop is requested.

    `read`: rows that thresholds are set on, where they are not the cache's.
    """
    reader, device, crew, stop, console = on[:5]
    budgets: dict[tuple[int, int], list[Job]] = {}  # what a run comes to must not depend on its company
    for job in jobs:
        if job.failed is None:
            job.fit.forget_gradients()
            key = (job.plan.train.calibrate_rows, job.plan.train.heldout_rows)
            budgets.setdefault(key, []).append(job)
    give_back_freed_memory()
    for (calibrate_rows, heldout_rows), ready in budgets.items():
        coders = [job.fit.deployed() for job in ready]
        with console.status("Setting thresholds and checking on held-out rows …"):
            calibrate(coders, reader, calibrate_rows, device, crew, stop, read, on.mesh.latents)
            checks = held_out(coders, reader, heldout_rows, device, crew, stop, on.mesh.latents)
        if on.stopping():
            return
        for job, coder, check in zip(ready, coders, checks, strict=True):
            job.config["training"] |= _outcome(job, check)
            if check is not None and (note := job.config["training"]["held_out"]["note"]):
                console.print(f"[yellow]{job.plan.name}[/]: {note}", highlight=False)
            writers = job.fit.writers
            if job.leads or writers is not None:
                save_run(job.path, coder, job.config, writers)
            job.log.finished(job.config)
            job.fit.release()  # a sweep of several streams must not keep what is done
    for job in jobs:
        status: Literal["trained", "failed"] = "failed" if job.failed else "trained"
        yield RunResult(job.plan.name, job.plan.group, job.path, status, job.config["training"])


def _outcome(job: Job, check: HeldOut | None) -> dict[str, Any]:
    """What config.json says of a finished run; of its frozen rule also whether L0 is still what it was trained at."""
    final = job.last or last_metrics(job.path)
    compared: dict[str, Any] = {}
    if check is not None:
        layers = job.plan.spec.layers
        names = [f"L{layer:02d}" for layer in layers] if len(layers) == len(check.l0) else []
        names = names or [f"S{source}" for source in range(len(check.l0))]
        trained = [final.get(f"l0.{name}", final["l0"]) for name in names]
        compared = {"trained_l0": trained, "note": difference(check, trained)}
    return {
        "finished": True,
        "steps": job.fit.done,
        "rows": job.fit.position,
        "final": _finite(final),
        "kernels": dict(job.fit.coder.kernels.used),
        "held_out": None if check is None else _finite(check._asdict() | compared),
    }


def _finite(value: Any) -> Any:
    """JSON values with None in the place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
