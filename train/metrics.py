"""Where a run's numbers go: metrics.jsonl always, Weights & Biases if asked.

One JSON object per logging interval, with `step` and `rows` in each, so that a file can be read while it grows. When a
run goes on from a checkpoint, lines after it are cut off first. W&B gets one run per dictionary, grouped as the sweep
groups them; offline mode needs no account and no network.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from thresher.cache.errors import UserError
from thresher.cache.publish import publish

WandbMode = Literal["disabled", "online", "offline"]

METRICS = "metrics.jsonl"


class MetricLog:
    """The numbers of one run."""

    def __init__(
        self, path: Path, *, name: str, group: str, config: Mapping[str, Any], wandb: WandbMode, after_step: int
    ) -> None:
        """Open for appending; lines of steps beyond `after_step` are dropped."""
        path.mkdir(parents=True, exist_ok=True)
        file = path / METRICS
        kept = [line for line in _lines(file) if json.loads(line)["step"] <= after_step]
        publish(file, ["".join(f"{line}\n" for line in kept).encode()])
        self._file = file.open("a")
        self._wandb = _wandb_run(path, name, group, config, wandb)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line; non-finite numbers become null."""
        clean = {
            key: None if value != value or value in (float("inf"), -float("inf")) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(dict(clean), step=int(values["step"]))

    def close(self) -> None:
        """Close file and W&B run."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


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


def _wandb_run(path: Path, name: str, group: str, config: Mapping[str, Any], mode: WandbMode) -> Any:
    if mode == "disabled":
        return None
    import wandb

    try:
        return wandb.init(
            project="thresher",
            name=name,
            group=group,
            config=dict(config),
            dir=str(path),
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(silent=True),
        )
    except Exception as error:  # whatever its client raises: no account, no network, a bad key
        why = " ".join(str(error).split())
        raise UserError(
            f"Weights & Biases could not be started in mode {mode!r} for run {name!r}: {why}. Log in with `wandb "
            "login`, or use --wandb offline or --wandb disabled."
        ) from error
