"""A dictionary's run in the making: its plan, its directory, its state and its log, and what is due after each step.

A run whose step cannot be done, because loss or gradient stopped being finite or memory did not suffice, is set aside:
its last state is saved, the reason goes into its config.json, and what it held is given back to the others.

Ranks that share a dictionary each have a job for it and decide alike at the same step (train/agreement.py); the one
that leads writes.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from thresher.train.agreement import short_of_memory
from thresher.train.display import TrainingDisplay
from thresher.train.exchange import Share
from thresher.train.files import write_config
from thresher.train.fit import Fit
from thresher.train.metrics import MetricLog, Silence
from thresher.train.plan import RunPlan
from thresher.train.state import save_checkpoint
from thresher.train.views import Inputs


class Job:
    """A plan with its directory, its state and its log."""

    def __init__(self, plan: RunPlan, path: Path, config: dict[str, Any], fit: Fit, log: MetricLog | Silence) -> None:
        self.plan, self.path, self.config, self.fit, self.log = plan, path, config, fit, log
        self.leads = fit.mesh.leads
        """Whether it writes what is written once, of the ranks that share the dictionary."""
        self.last: dict[str, Any] = {}
        self.failed: str | None = None

    @property
    def active(self) -> bool:
        """Whether it wants further batches."""
        return self.failed is None and self.fit.done < self.fit.total

    def save(self) -> None:
        """Write a checkpoint."""
        writers = self.fit.writers
        if self.leads or writers is not None:
            save_checkpoint(self.path, self.fit.checkpoint(), by=writers)

    def attempt(self, inputs: Inputs, rows: int, share: Share | None = None) -> torch.Tensor | str:
        """A step's gradient norm, or why there was no memory for it: that concerns this dictionary alone."""
        try:
            norm = self.fit.step(inputs, rows, share)
        except (RuntimeError, MemoryError) as error:
            if not short_of_memory(error) or not self.fit.mesh.alone:
                raise  # shared with others, it was beyond what the step can make good: their updates are made
            self.fit.forget_gradients()  # what they hold is needed by the others
            return f"step {self.fit.done + 1} ran out of memory ({error})"
        if self.fit.agreement.short:
            self.fit.forget_gradients()
            return f"one of the ranks that share it ran out of memory by step {self.fit.done + 1}"
        return norm

    def settle(self, outcome: torch.Tensor | str, display: TrainingDisplay, console: Console) -> None:
        """Log and save what is due after a step; set the run aside when the step could not be done."""
        if isinstance(outcome, str):
            self.set_aside(outcome, display, console)
            return
        settings, fit = self.plan.train, self.fit
        if outcome.device.type == "cpu" and not bool(outcome.isfinite()):
            self.set_aside(f"step {fit.done + 1}: the loss or its gradient is not finite", display, console)
            return
        last = fit.done == fit.total
        if last or fit.done % settings.log_every == 0:
            self.last = fit.metrics()
            if not math.isfinite(self.last["gradient_norm"]):
                self.set_aside(f"before step {fit.done} the loss or its gradient was not finite", display, console)
                return
            self.log.write(self.last)
            display.update(self.plan.name, self.last)
        if last or fit.done % settings.checkpoint_every == 0:
            if not bool(outcome.isfinite()):
                self.set_aside(f"step {fit.done}: the loss or its gradient is not finite", display, console)
                return
            self.save()

    def set_aside(self, reason: str, display: TrainingDisplay, console: Console) -> None:
        """Save what there is of a run that cannot go on, give back its memory, and say so."""
        self.failed = reason
        self.save()
        self.config["training"] |= {"failed": reason, "steps": self.fit.done, "rows": self.fit.position}
        if self.leads:
            write_config(self.path, self.config)
        self.log.failed(reason)
        self.fit.release()
        display.fail(self.plan.name, reason)
        advice = "A lower train.lr or smaller train.clip often helps."
        if "memory" in reason:
            advice = "A smaller train.micro_rows helps, in a run of another name."
        console.print(
            f"[red]Run {self.plan.name} failed[/red]: {reason}. Its last state is saved in {self.path}; the other "
            f"runs go on. {advice}"
        )


def kernels_of(jobs: Iterable[Job]) -> str:
    """What did the operations of all jobs' steps: `decode numba, update numba/torch`."""
    used: dict[str, list[str]] = {}
    for job in jobs:
        for operation, names in job.fit.coder.kernels.used.items():
            seen = used.setdefault(operation, [])
            seen += [name for name in names if name not in seen]
    return ", ".join(f"{operation} {'/'.join(names)}" for operation, names in used.items())
