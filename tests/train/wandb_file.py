"""What W&B's offline mode wrote, read back: the records of a run's .wandb file.

The file is a sequence of LevelDB log blocks behind seven bytes of W&B's own; each record is a protocol buffer that
`wandb sync` would send to the server.
"""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto import wandb_internal_pb2 as protocol

_HEAD, _BLOCK = 7, 32768


class Logged(NamedTuple):
    """One segment of a W&B run."""

    run: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]
    """Points in order; keys of nested values joined by `.`."""
    summary: dict[str, Any]
    metrics: dict[str, Any]
    """Definitions of metrics, by name or glob."""
    artifacts: dict[str, Any]
    """By type, the last of each."""
    exit_code: int
    files: Path


def records(file: Path) -> Iterator[Any]:
    """Records of a .wandb file."""
    raw, at, piece = file.read_bytes(), _HEAD, b""
    assert raw[:4] == b":W&B"
    while at + _HEAD <= len(raw):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + _HEAD])
        piece += raw[at + _HEAD : at + _HEAD + length]
        at += _HEAD + length
        if kind in (1, 4):  # whole, or the last part
            yield protocol.Record.FromString(piece)
            piece = b""


def whole(file: Path) -> list[Any]:
    """Records of a .wandb file once its last one, `exit`, is there: W&B's service writes on for a moment after
    `finish` returns."""
    deadline = time.monotonic() + 60
    while True:
        found = list(records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < deadline, f"{file} was never closed"
        time.sleep(0.02)


def logged(folder: Path) -> list[Logged]:
    """The segments of the W&B run whose files lie in `folder`/wandb, the oldest first."""
    return [_segment(file) for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def _segment(file: Path) -> Logged:
    out = Logged(None, {}, [], {}, {}, {}, 0, file.parent / "files")
    run, code = None, 0
    for record in whole(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            out.config.update(_values(record.run.config.update))
        elif kind == "config":
            out.config.update(_values(record.config.update))
        elif kind == "history":
            out.history.append(_values(record.history.item))
        elif kind == "summary":
            out.summary.update(_values(record.summary.update))
        elif kind == "metric":
            out.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            out.artifacts.setdefault(record.artifact.type, []).append(record.artifact)
        elif kind == "exit":
            code = record.exit.exit_code
    return out._replace(run=run, exit_code=code)


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
