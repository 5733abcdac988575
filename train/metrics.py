"""Where a run's numbers go: metrics.jsonl always, Weights & Biases (tracking.py) if asked.

One JSON object per logging interval, with `step` and `rows` in each, so that a file can be read while it grows. When a
run goes on from a checkpoint, lines after it are cut off first. What W&B was told cannot be cut off, so steps that
it knows are not told again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thresher.cache.publish import publish
from thresher.train.files import CONFIG, WEIGHTS, weights_hash
from thresher.train.tracking import (
    Tracker,
    WandbMode,
    begin_training,
    dictionary_artifact,
    outcome,
    point,
    tracked_before,
)

METRICS = "metrics.jsonl"
FILES = (CONFIG, WEIGHTS, METRICS)
"""What of a finished run directory is worth keeping elsewhere."""


class MetricLog:
    """The numbers of one run."""

    def __init__(self, path: Path, *, config: Mapping[str, Any], wandb: WandbMode, after_step: int) -> None:
        """Open for appending; lines of steps beyond `after_step` are dropped. `config`: what config.json will say."""
        path.mkdir(parents=True, exist_ok=True)
        self._path, file = path, path / METRICS
        steps = [(line, json.loads(line)["step"]) for line in _lines(file)]
        self._told = max((step for _, step in steps), default=0) if tracked_before(path) else 0
        kept = [line for line, step in steps if step <= after_step]
        publish(file, ["".join(f"{line}\n" for line in kept).encode()])
        self._file = file.open("a")
        new = tracked_before(path) is None
        self._tracker: Tracker | None = None if wandb == "disabled" else begin_training(path, config, wandb)
        self._ended = False
        if self._tracker is not None and new:
            for line in kept:  # of steps that were done without W&B
                self._tracker.log(point(json.loads(line)))

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line; non-finite numbers become null."""
        clean = {
            key: None if value != value or value in (float("inf"), -float("inf")) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._tracker is not None and values["step"] > self._told:
            self._tracker.log(point(clean))

    def finished(self, config: Mapping[str, Any]) -> None:
        """Say what the run came to, once its directory is whole; `config`: config.json."""
        self._ended = True
        if self._tracker is not None:
            weights = weights_hash(self._path)
            self._tracker.summarise(outcome(config) | {"status": "finished", "weights_sha256": weights})
            self._tracker.makes(dictionary_artifact(self._path, config, weights, FILES))

    def failed(self, reason: str) -> None:
        """Say why the run could not go on."""
        if self._tracker is not None:
            self._tracker.summarise({"status": "failed", "failed": reason})

    def close(self) -> None:
        """Close file and W&B run; a run that did not finish is marked as such, until it goes on."""
        self._file.close()
        if self._tracker is not None:
            self._tracker.finish(failed=not self._ended)


class Silence:
    """In the place of a `MetricLog` on ranks that leave it to another one to write."""

    def write(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def finished(self, config: Mapping[str, Any]) -> None:
        """Nothing."""

    def failed(self, reason: str) -> None:
        """Nothing."""


def last_metrics(path: Path) -> dict[str, Any]:
    """The last line written for the run at `path`; empty when there is none."""
    lines = _lines(path / METRICS)
    return dict(json.loads(lines[-1])) if lines else {}


def curves(path: Path) -> dict[str, list[float | None]]:
    """Every number that was logged for the run at `path`, by key, in order; null where a line lacks it."""
    lines = [json.loads(line) for line in _lines(path / METRICS)]
    keys = dict.fromkeys(key for line in lines for key in line)
    return {key: [line.get(key) for line in lines] for key in keys}


def _lines(file: Path) -> list[str]:
    """Whole lines of a JSONL file; a torn last one is left out."""
    if not file.exists():
        return []
    text = file.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
