"""Where experiments get trained models from: what is kept on disk is taken from there, the rest is trained and kept.

A model's file is named by the fingerprint of its `Fit` (and of the model that it went on from), so an experiment that
was stopped finds what it had, and two experiments that ask for the same model train it once.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import safe_open
from safetensors.torch import save

from thresher.cache.interrupts import StopFlag
from thresher.cache.publish import publish
from thresher.cache.records import fingerprint, from_dict, to_dict
from thresher.toy.inputs import Inputs
from thresher.toy.labels import Labels
from thresher.toy.model import Weights, stacked
from thresher.toy.training import Fit, Trained, train

TOGETHER = ("inputs", "neurons", "steps", "batch", "lr", "weight_decay", "seed")
"""Fits that agree in these are trained in one call."""


def fit_from(raw: dict[str, Any]) -> Fit:
    """A fit from its JSON values."""
    parts = {
        "inputs": from_dict(Inputs, raw["inputs"], "inputs"),
        "labels": from_dict(Labels, raw["labels"], "labels"),
    }
    return Fit(**{**raw, **parts})


@dataclass
class Lab:
    """Trains models for experiments."""

    folder: Path
    """Holds a file per model."""
    console: Console = field(default_factory=lambda: Console(quiet=True))
    stop: StopFlag | None = None

    def trained(self, fits: Sequence[Fit], title: str) -> list[Trained]:
        """A model for each fit, in order."""
        return self._all([(fit, None) for fit in fits], title)

    def tuned(self, fit: Fit, start: Trained, title: str) -> Trained:
        """A model that goes on from `start` under `fit`."""
        return self._all([(fit, start)], title)[0]

    def _all(self, wanted: Sequence[tuple[Fit, Trained | None]], title: str) -> list[Trained]:
        found = {i: self._read(fit, start) for i, (fit, start) in enumerate(wanted)}
        groups: dict[str, list[int]] = {}
        for i, (fit, start) in enumerate(wanted):
            if found[i] is None:
                shared = {key: value for key, value in to_dict(fit).items() if key in TOGETHER}
                groups.setdefault(fingerprint([shared, start is None]), []).append(i)
        steps = sum(wanted[own[0]][0].steps * len(own) for own in groups.values())
        if steps:
            with _progress(self.console) as progress:
                task = progress.add_task(title, total=steps)
                for own in groups.values():
                    self._train(wanted, own, found, partial(_advance, progress, task, len(own)))
        return [one for one in found.values() if one is not None]

    def _train(
        self,
        wanted: Sequence[tuple[Fit, Trained | None]],
        own: Sequence[int],
        found: dict[int, Trained | None],
        told: Callable[[int], None],
    ) -> None:
        starts = [start.weights for _, start in (wanted[i] for i in own) if start is not None]
        made = train([wanted[i][0] for i in own], start=stacked(starts) if starts else None, told=told, stop=self.stop)
        for i, one in zip(own, made, strict=True):
            found[i] = one
            self._write(one, wanted[i][1])

    def _path(self, fit: Fit, start: Trained | None) -> Path:
        after = None if start is None else to_dict(start.fit)
        return self.folder / f"{fingerprint({'fit': to_dict(fit), 'after': after})[:24]}.safetensors"

    def _read(self, fit: Fit, start: Trained | None) -> Trained | None:
        path = self._path(fit, start)
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            learned = float(json.loads(file.metadata()["scale"]))
            w_in, w_out, losses = (file.get_tensor(name) for name in ("w_in", "w_out", "losses"))
        scale = learned if fit.labels.learn_scale else abs(fit.labels.scale)
        return Trained(fit, Weights(w_in[None], w_out[None]), scale, losses)

    def _write(self, one: Trained, start: Trained | None) -> None:
        tensors = {"w_in": one.weights.w_in[0], "w_out": one.weights.w_out[0], "losses": one.losses}
        facts = {"scale": json.dumps(one.scale), "fit": json.dumps(to_dict(one.fit))}
        publish(self._path(one.fit, start), [save({k: t.contiguous() for k, t in tensors.items()}, metadata=facts)])


def _advance(progress: Progress, task: TaskID, models: int, steps: int) -> None:
    progress.advance(task, steps * models)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("of training"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
