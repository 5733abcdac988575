"""Checkpoints: everything that a run's future depends on, and nothing else.

Weights in training space (those to be evaluated: updates/signum.py), the optimiser's state, running thresholds, dead
counters, the number of steps done and the position in the stream of rows. There is no generator state: initial weights
and resampling draw from generators that are functions of seed and step, and the order of rows is one of seed and
position. A run that goes on from a checkpoint therefore ends bit for bit where it would have.

`checkpoints/step-<8 digits>.safetensors` is written first, `.json` beside it makes it valid; the last two are kept.
Before anything of a checkpoint is written, the disk must have room for it beside those two.
"""

import functools
import json
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.publish import free_bytes, publish
from thresher.train.files import publish_tensors
from thresher.train.streamed import RowsOf, Whole, Writers, publish_together, read_rows

_VERSION = 2


class Checkpoint(NamedTuple):
    """A run's state between two steps."""

    step: int
    """Optimiser steps done."""
    position: int
    """Rows of the stream consumed."""
    tensors: dict[str, Tensor]
    """`model.*` and `optimiser.*`."""
    whole: Whole = MappingProxyType({})
    """Where ranks share latents: shapes of the tensors of which these are rows."""


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int = 2, by: Writers | None = None) -> None:
    """Write a checkpoint atomically and delete all but the last `keep`.

    `by`: of ranks that share latents, which all call this (train/streamed.py). Raises UserError when the disk has no
    room for it; those before it stay.
    """
    file = run / "checkpoints" / f"step-{checkpoint.step:08d}.safetensors"
    if by is None:
        _check_room(run, checkpoint.step, sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
        publish_tensors(file, checkpoint.tensors)
        _make_valid(run, checkpoint, keep)
        return
    room = functools.partial(_check_room, run, checkpoint.step)
    publish_together(file, checkpoint.tensors, checkpoint.whole, by, room)
    by.together(file, lambda: _make_valid(run, checkpoint, keep) if by.leads else None)


def _make_valid(run: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write the record of tensors that are on the disk."""
    folder, stem = run / "checkpoints", f"step-{checkpoint.step:08d}"
    record = {"version": _VERSION, "step": checkpoint.step, "position": checkpoint.position}
    publish(folder / f"{stem}.json", [json.dumps(record).encode()])
    kept = {record.stem for record in _records(run)[-keep:]}
    for file in sorted(folder.glob("step-*")):  # a record goes before its tensors; so does what a killed process left
        if file.name.split(".")[0] not in kept:
            file.unlink()


def _check_room(run: Path, at: int, needed: int) -> None:
    """Raise UserError unless the disk can take a checkpoint of so many bytes."""
    free = free_bytes(run)
    if needed <= free:
        return
    step, _ = latest_position(run)
    last = f"Its checkpoint of step {step} is whole" if step else "It has none before it"
    raise UserError(
        f"The checkpoint of run {run} at step {at} needs {needed:,} bytes, but {free:,} are free on its "
        f"disk. {last}. Make room, or move the runs to another disk and name it with --runs; then go on with --resume."
    )


def latest_position(run: Path) -> tuple[int, int]:
    """(step, position) of the newest checkpoint; (0, 0) when there is none."""
    records = _records(run)
    if not records:
        return 0, 0
    record = _read_record(records[-1])
    return record["step"], record["position"]


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of which there are checkpoints, ascending."""
    return [int(record.stem.removeprefix("step-")) for record in _records(run)]


def drop_checkpoints(run: Path, after: int) -> None:
    """Delete checkpoints of later steps, each record before its tensors."""
    for step in checkpoint_steps(run):
        if step > after:
            for suffix in ("json", "safetensors"):
                (run / "checkpoints" / f"step-{step:08d}.{suffix}").unlink(missing_ok=True)


def load_checkpoint(run: Path, rows_of: RowsOf | None = None) -> Checkpoint | None:
    """The newest checkpoint, or None. Raises UserError when it cannot be read.

    `rows_of`: which rows of a tensor are wanted, by its name and number of dimensions; None: all.
    """
    records = _records(run)
    if not records:
        return None
    record = _read_record(records[-1])
    file = records[-1].with_suffix(".safetensors")
    try:
        tensors = safetensors.torch.load_file(file) if rows_of is None else read_rows(file, rows_of)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"Checkpoint {file} cannot be read ({error}). Delete {records[-1].name} to go on from the one before it."
        ) from error
    return Checkpoint(record["step"], record["position"], tensors)


def _records(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*.json"))


def _read_record(path: Path) -> dict[str, int]:
    try:
        record = json.loads(path.read_text())
        version, _, _ = record["version"], record["step"], record["position"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it to go on from the checkpoint before it.") from error
    if version != _VERSION:
        raise UserError(
            f"{path} has checkpoint version {version}; this Thresher reads {_VERSION}. Resume with the Thresher that "
            "wrote it, or train the run anew."
        )
    return dict(record)
