"""The way out: finished runs into the files of another tool.

A run goes into a directory of its own, or, for a format that wants all layers together, the runs of a set into one.
All is checked before anything is written; what is written appears whole or not at all.

Two things may be done to a dictionary on the way: one that counts its active latents gets thresholds
(thresholds.py), and one of an MLP's input is made to read it before the norm's gain (norms.py).
"""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from thresher.cache.errors import UserError
from thresher.cache.interrupts import StopFlag
from thresher.cache.publish import explained, flush_directory
from thresher.cache.reader import CacheReader
from thresher.interop import formats, provenance
from thresher.interop.canonical import from_coder
from thresher.interop.formats import Exported, Format
from thresher.interop.norms import Norm, reading_at
from thresher.interop.thresholds import COUNTED, thresholded
from thresher.train.files import load_run


class Written(NamedTuple):
    """One directory that was written."""

    path: Path
    runs: tuple[str, ...]
    """Names of the runs in it."""
    thresholds: Mapping[str, Mapping[str, Any]]
    """By run, what calibrated thresholds are of and came to (`Calibrated.facts`)."""


class Moved(NamedTuple):
    """A hook that the reader shall read from, in the place of the one trained on."""

    hook: str
    """Inside the block: `ln2.hook_normalized`."""
    norms: Mapping[int, Norm]
    """By layer, of the target (`norms_of`)."""


_Items = Sequence[tuple[Mapping[str, Any], Exported]]
"""Dictionaries with the config.json of their runs."""


def export(
    runs: Sequence[Path],
    to: str,
    out: Path,
    *,
    overwrite: bool = False,
    thresholds: int | None = None,
    cache: Path | None = None,
    moved: Moved | None = None,
    stop: StopFlag | None = None,
) -> list[Written]:
    """Write run directories in the format `to` below `out`.

    `thresholds`: give those that count their latents a threshold over so many training rows, of `cache` or, left out,
    of the cache that each of them names. Raises UserError, before anything is written, for a format that cannot be
    written, for a dictionary it has no form for (with the reason and the nearest route), for a cache that is gone, and
    for a place that is taken, unless `overwrite`.
    """
    form = formats.load(to)
    if form.write is None:
        raise UserError(
            f"--to {to}: that format is only read; expected one of {', '.join(formats.names(writing=True))}."
        )
    runs_at = [(path, load_run(path)) for path in runs]
    exported: _Items = [
        (run.config, Exported(from_coder(run.dictionary), provenance.facts(path, run.config))) for path, run in runs_at
    ]
    if moved is not None:
        exported = [
            (config, item._replace(dictionary=reading_at(item.dictionary, moved.hook, moved.norms)))
            for config, item in exported
        ]
    if thresholds is not None:
        _check(form, [(config, _foreseen(item)) for config, item in exported], out, overwrite)
        exported = _with_thresholds(exported, thresholds, cache, stop)
    return [_written(form, *part) for part in _check(form, exported, out, overwrite)]


def _check(form: Format, exported: _Items, out: Path, overwrite: bool) -> list[tuple[Path, list[Exported]]]:
    """What goes into which directory. Raises UserError where it cannot."""
    parts = _parts(form, [(str(config["group"]), item) for config, item in exported], out)
    for folder, items in parts:
        reason = form.refuse([item.dictionary for item in items]) if form.refuse is not None else None
        if reason is not None:
            raise UserError(f"{_listed(items)} cannot be written for {form.name}: {reason}")
        if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is there already. Give another place with --out, or add --overwrite.")
    return parts


def _foreseen(item: Exported) -> Exported:
    """As what it will be written once it has thresholds: enough to refuse it before they are calibrated."""
    if item.dictionary.firing not in COUNTED:
        return item
    sources = tuple(part._replace(threshold=torch.zeros_like(part.b_enc)) for part in item.dictionary.sources)
    return item._replace(dictionary=item.dictionary._replace(firing="threshold", k=None, sources=sources))


def _with_thresholds(
    exported: _Items, rows: int, cache: Path | None, stop: StopFlag | None
) -> list[tuple[Mapping[str, Any], Exported]]:
    """Those that count get thresholds, and facts of them."""
    if not any(item.dictionary.firing in COUNTED for _, item in exported):
        raise UserError(
            f"--thresholds is given, but {_listed([item for _, item in exported])} fire by thresholds already. Leave "
            "it out."
        )
    done = []
    with ExitStack() as opened:
        caches = _Caches(cache, opened)
        for config, item in exported:
            if item.dictionary.firing in COUNTED:
                dictionary, facts = thresholded(item.dictionary, caches.of(config), rows, stop)
                done.append((config, Exported(dictionary, {**item.facts, "thresholds": facts})))
            else:
                done.append((config, item))
    return done


class _Caches:
    """Open caches by place, each opened once."""

    def __init__(self, given: Path | None, opened: ExitStack) -> None:
        self.given, self._opened = given, opened
        self._readers: dict[Path, CacheReader] = {}

    def of(self, config: Mapping[str, Any]) -> CacheReader:
        """The cache that a run was trained on. Raises UserError when it is gone or another one."""
        path = self.given or Path(config["cache"]["path"])
        if not path.exists():
            raise UserError(
                f"--thresholds calibrates run {config['name']} on the cache that it was trained on, but {path} does "
                "not exist. Harvest it again (thresher harvest), or say where it is with --cache."
            )
        if path not in self._readers:
            self._readers[path] = self._opened.enter_context(CacheReader.open(path))
        reader = self._readers[path]
        if reader.fingerprint != config["cache"]["fingerprint"]:
            raise UserError(
                f"--thresholds: run {config['name']} was trained on another cache than {path} (fingerprint "
                f"{config['cache']['fingerprint'][:12]}, found {reader.fingerprint[:12]}). Give its own with --cache."
            )
        return reader


def _parts(form: Format, exported: Sequence[tuple[str, Exported]], out: Path) -> list[tuple[Path, list[Exported]]]:
    """What goes into which directory: `out` itself where there is only one."""
    groups: dict[str, list[Exported]] = {}
    for group, item in exported:
        groups.setdefault(group if form.whole else item.dictionary.name, []).append(item)
    return [(out if len(groups) == 1 else out / name, items) for name, items in groups.items()]


def _written(form: Format, folder: Path, items: Sequence[Exported]) -> Written:
    assert form.write is not None, "checked before"
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir()
        form.write(temporary, items)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        flush_directory(folder.parent)
    except OSError as error:
        raise explained(error, folder, 0) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    calibrated = {item.dictionary.name: item.facts["thresholds"] for item in items if "thresholds" in item.facts}
    return Written(folder, tuple(item.dictionary.name for item in items), calibrated)


def _listed(items: Sequence[Exported]) -> str:
    names = [item.dictionary.name for item in items]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
