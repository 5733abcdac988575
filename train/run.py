"""The training stage: every dictionary of a sweep from one stream of batches.

Dictionaries that share batch size and seed form a pass: one `Batches` feeds them all, step by step, and each keeps its
own optimiser, schedule and length. What they do not share is trained in a further pass. The language model is never
needed here.

A run directory belongs to one resolved recipe. Finished: it is reused. Unfinished: it goes on from its last checkpoint
when `resume` is set. Made from another recipe: refused. A dictionary whose loss or gradient stops being finite is set
aside with its last good state; the others go on.
"""

import functools
import math
import shutil
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console

from thresher.cache.batches import Batches
from thresher.cache.contracts import UserError
from thresher.cache.devices import resolve_device
from thresher.cache.interrupts import Interrupted, StopFlag, deferred_interrupts
from thresher.cache.loading import TIERS, choose
from thresher.cache.records import differences, to_dict
from thresher.cache.source import Source
from thresher.train.calibrate import HeldOut, calibrate, held_out
from thresher.train.config import TrainConfig
from thresher.train.crew import Crew, Task
from thresher.train.dictionary.encoder import Workspace
from thresher.train.display import TrainingDisplay
from thresher.train.files import CONFIG, check_weights, git_commit, read_config, save_run, versions, write_config
from thresher.train.fit import Fit, Inputs, Views, sites_of
from thresher.train.metrics import MetricLog, WandbMode, last_metrics
from thresher.train.plan import RunPlan
from thresher.train.state import load_checkpoint, save_checkpoint

__all__ = ["RunResult", "TrainConfig", "train"]

_OPERATIONAL = ("checkpoint_every", "log_every")  # settings that change no number of the result


class RunResult(NamedTuple):
    """What became of one plan."""

    name: str
    group: str
    path: Path
    """Run directory."""
    status: Literal["trained", "reused", "failed"]
    metrics: dict[str, Any]
    """`training` of its config.json: steps, rows, last training metrics, held-out FVU and L0."""


class _Job:
    """A plan with its directory, its state and its log."""

    def __init__(self, plan: RunPlan, path: Path, config: dict[str, Any], fit: Fit, log: MetricLog) -> None:
        self.plan, self.path, self.config, self.fit, self.log = plan, path, config, fit, log
        self.last: dict[str, Any] = {}
        self.failed: str | None = None

    @property
    def active(self) -> bool:
        """Whether it wants further batches."""
        return self.failed is None and self.fit.done < self.fit.total

    def save(self) -> None:
        """Write a checkpoint."""
        save_checkpoint(self.path, self.fit.checkpoint())


def train(
    plans: Sequence[RunPlan],
    reader: Source,
    *,
    out: Path,
    device: str = "auto",
    resume: bool = False,
    wandb: WandbMode = "disabled",
    console: Console,
) -> list[RunResult]:
    """Train all plans from the cache into `out`/<name>; results in the order of the plans.

    Raises UserError before any work for duplicate names, for directories that hold something else, and for unfinished
    runs without `resume`. Raises Interrupted after SIGINT or SIGTERM, with everything saved.
    """
    names = [plan.name for plan in plans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"Several dictionaries have the name {twice[0]!r}. Give their [[sweep]] blocks different names."
        )
    where = resolve_device(device, "--device")
    configs = [_config(plan, reader, where) for plan in plans]
    finished = {
        plan.name: _reusable(plan, config, out / plan.name, resume) for plan, config in zip(plans, configs, strict=True)
    }
    results = {
        plan.name: RunResult(plan.name, plan.group, out / plan.name, "reused", found)
        for plan in plans
        if (found := finished[plan.name]) is not None
    }
    if results:
        console.print(f"Reusing {len(results)} finished of {len(plans)} runs in {out}.")
    todo = [(plan, config) for plan, config in zip(plans, configs, strict=True) if plan.name not in results]
    with ExitStack() as stack, deferred_interrupts() as stop, Crew(where) as crew, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        workspace = Workspace()
        jobs = [_open(plan, config, out / plan.name, reader, where, workspace, wandb, stack) for plan, config in todo]
        streams: dict[tuple[int, int, int], list[_Job]] = {}
        for job in jobs:
            key = (job.plan.train.batch_rows, job.plan.seed, job.fit.position)
            streams.setdefault(key, []).append(job)
        for (batch_rows, seed, start), group in streams.items():
            _run_pass(group, reader, batch_rows, seed, start, where, crew, stop, console)
            if not stop.requested:
                for result in _finish(group, reader, where, crew, stop, console):
                    results[result.name] = result
            if stop.requested:
                _save_and_stop(group, out)
    return [results[name] for name in names]


def _config(plan: RunPlan, reader: Source, device: torch.device) -> dict[str, Any]:
    """config.json of a run that is about to start."""
    return {
        "name": plan.name,
        "group": plan.group,
        "dictionary": to_dict(plan.spec),
        "recipe": plan.recipe,
        "cache": {"path": str(reader.path), "fingerprint": reader.fingerprint, "identity": dict(reader.identity)},
        "versions": versions(),
        "git_commit": git_commit(),
        "training": {
            "finished": False,
            "settings": to_dict(plan.train),
            "seed": plan.seed,
            "total_steps": plan.train.total_steps(reader.rows("train")),
            "device": str(device),
        },
    }


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that decides the result."""
    training = config["training"]
    settings = {key: value for key, value in training["settings"].items() if key not in _OPERATIONAL}
    return {
        "dictionary": config["dictionary"],
        "train": settings,
        "seed": training["seed"],
        "cache": config["cache"]["fingerprint"],
    }


def _reusable(plan: RunPlan, config: dict[str, Any], path: Path, resume: bool) -> dict[str, Any] | None:
    """Metrics of the finished run at `path`, or None when there is work to do. Raises UserError when in doubt."""
    if not path.exists() or not any(path.iterdir()):
        return None
    if not (path / CONFIG).exists():
        raise UserError(
            f"{path} is not empty and holds no {CONFIG}: it is no run of ours. Choose another place with --runs."
        )
    stored = read_config(path)
    lines = differences(_decisive(config), _decisive(stored))
    if lines:
        raise UserError(
            f"{path} holds a run with other settings ({'; '.join(lines[:5])}; 'expected' is the recipe's). Give this "
            "one another name or --runs, or delete the directory."
        )
    training: dict[str, Any] = stored["training"]
    if training.get("finished"):
        check_weights(path)
        return training
    if not resume:
        why = f"has failed ({training['failed']})" if training.get("failed") else "is unfinished"
        raise UserError(f"Run {path} {why}. Add --resume to go on from its last checkpoint, or delete the directory.")
    return None


def _open(
    plan: RunPlan,
    config: dict[str, Any],
    path: Path,
    reader: Source,
    device: torch.device,
    workspace: Workspace,
    wandb: WandbMode,
    stack: ExitStack,
) -> _Job:
    """Build a run, at its beginning or at its last checkpoint."""
    checkpoint = load_checkpoint(path)
    fit = Fit(plan, reader, device, workspace)
    if checkpoint is None:
        fit.start(reader)
    else:
        fit.load(checkpoint)
    begun = (path / CONFIG).exists()
    try:
        log = MetricLog(path, name=plan.name, group=plan.group, config=config, wandb=wandb, after_step=fit.done)
    except UserError:
        if not begun:
            shutil.rmtree(path, ignore_errors=True)  # or the next attempt would find a directory that is no run
        raise
    stack.callback(log.close)
    write_config(path, config)
    return _Job(plan, path, config, fit, log)


def _run_pass(
    jobs: Sequence[_Job],
    reader: Source,
    batch_rows: int,
    seed: int,
    start: int,
    device: torch.device,
    crew: Crew,
    stop: StopFlag,
    console: Console,
) -> None:
    """Feed one stream to all jobs until each has its steps."""
    if not any(job.active for job in jobs):
        return
    total = max(job.fit.total for job in jobs)
    sites = sites_of([job.fit for job in jobs])
    rows_left = batch_rows * max(job.fit.total - job.fit.done for job in jobs if job.active)
    tier, why = choose(reader, "train", sites, device, rows_left)
    console.print(f"Reading {TIERS[tier]}: {why}.", highlight=False)
    batches = Batches(
        reader,
        sites=sites,
        batch_rows=batch_rows,
        seed=seed,
        start=start,
        end=start + rows_left,
        device=device,
        tier=tier,
        interrupted=lambda: stop.requested,
    )
    began, rows = time.monotonic(), 0
    title = f"Training {len(jobs)} dictionaries on {device}, {batch_rows:,} rows per step"
    try:
        with TrainingDisplay(console, title, [job.plan.name for job in jobs]) as display:
            for batch in batches:
                _step([job for job in jobs if job.active], crew, Views(batch.acts), batch.rows, display, console)
                rows += batch.rows
                done = max(job.fit.done for job in jobs)
                rate = rows / (time.monotonic() - began)
                display.progress(done, total, rate, (total - done) * batch_rows / rate)
                if stop.requested or not any(job.active for job in jobs):
                    break
    finally:
        batches.close()


def _save_and_stop(jobs: Sequence[_Job], out: Path) -> None:
    """Save every job that can go on, then raise Interrupted."""
    for job in jobs:
        if job.failed is None:
            job.save()
    done = max((job.fit.done for job in jobs), default=0)
    raise Interrupted(
        f"Training stopped at step {done} with {len(jobs)} runs saved in {out}. Run the same command with --resume to "
        "go on from there."
    )


def _step(
    jobs: Sequence[_Job], crew: Crew, views: Views, rows: int, display: TrainingDisplay, console: Console
) -> None:
    """One step of every job, with what is due after it."""
    tasks = [
        Task(
            job.plan.spec, job.plan.train.batch_rows, functools.partial(_attempt, job.fit, job.fit.inputs(views), rows)
        )
        for job in jobs
    ]
    for job, outcome in zip(jobs, crew.run(tasks), strict=True):
        if isinstance(outcome, torch.Tensor):
            _after_step(job, outcome, display, console)
        else:
            _set_aside(job, f"step {job.fit.done + 1} ran out of memory ({outcome})", display, console)


def _attempt(fit: Fit, inputs: Inputs, rows: int) -> torch.Tensor | torch.OutOfMemoryError:
    """A step, or why there was no memory for it: that concerns this dictionary alone."""
    try:
        return fit.step(inputs, rows)
    except torch.OutOfMemoryError as error:
        fit.optimiser.adam.zero_grad(set_to_none=True)  # what it holds is needed by the others
        return error


def _after_step(job: _Job, norm: torch.Tensor, display: TrainingDisplay, console: Console) -> None:
    """Log and save what is due; set the job aside when the step was not finite."""
    settings = job.plan.train
    on_cpu = norm.device.type == "cpu"
    if on_cpu and not bool(norm.isfinite()):
        _set_aside(job, f"step {job.fit.done + 1}: the loss or its gradient is not finite", display, console)
        return
    last = job.fit.done == job.fit.total
    if last or job.fit.done % settings.log_every == 0:
        job.last = job.fit.metrics()
        if not math.isfinite(job.last["gradient_norm"]):
            _set_aside(job, f"before step {job.fit.done} the loss or its gradient was not finite", display, console)
            return
        job.log.write(job.last)
        display.update(job.plan.name, job.last)
    if last or job.fit.done % settings.checkpoint_every == 0:
        if not bool(norm.isfinite()):
            _set_aside(job, f"step {job.fit.done}: the loss or its gradient is not finite", display, console)
            return
        job.save()


def _set_aside(job: _Job, reason: str, display: TrainingDisplay, console: Console) -> None:
    """Save what there is of a job that cannot go on, and say so."""
    job.failed = reason
    job.save()
    job.config["training"] |= {"failed": reason, "steps": job.fit.done, "rows": job.fit.position}
    write_config(job.path, job.config)
    display.fail(job.plan.name, reason)
    console.print(
        f"[red]Run {job.plan.name} failed[/red]: {reason}. Its last state is saved in {job.path}; the other "
        "runs go on. A lower train.lr or smaller train.clip often helps."
    )


def _finish(
    jobs: Sequence[_Job], reader: Source, device: torch.device, crew: Crew, stop: StopFlag, console: Console
) -> Iterable[RunResult]:
    """Freeze, check and save the jobs that reached their end; none of them once a stop is requested."""
    budgets: dict[tuple[int, int], list[_Job]] = {}  # what a run comes to must not depend on its company
    for job in jobs:
        if job.failed is None:
            key = (job.plan.train.calibrate_rows, job.plan.train.heldout_rows)
            budgets.setdefault(key, []).append(job)
    for (calibrate_rows, heldout_rows), ready in budgets.items():
        coders = [job.fit.deployed() for job in ready]
        with console.status("Setting thresholds and checking on held-out rows …"):
            calibrate(coders, reader, calibrate_rows, device, crew, stop)
            checks = held_out(coders, reader, heldout_rows, device, crew, stop)
        if stop.requested:
            return
        for job, coder, check in zip(ready, coders, checks, strict=True):
            job.config["training"] |= _outcome(job, check)
            save_run(job.path, coder, job.config)
    for job in jobs:
        status: Literal["trained", "failed"] = "failed" if job.failed else "trained"
        yield RunResult(job.plan.name, job.plan.group, job.path, status, job.config["training"])


def _outcome(job: _Job, check: HeldOut | None) -> dict[str, Any]:
    """What config.json says of a finished run."""
    return {
        "finished": True,
        "steps": job.fit.done,
        "rows": job.fit.position,
        "final": _finite(job.last or last_metrics(job.path)),
        "held_out": None if check is None else _finite(check._asdict()),
    }


def _finite(value: Any) -> Any:
    """JSON values with None in the place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
