"""The way out: finished runs into the files of another tool.

A run goes into a directory of its own, or, for a format that wants all layers together, the runs of a set into one.
All is checked before anything is written; what is written appears whole or not at all.
"""

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from thresher.cache.errors import UserError
from thresher.cache.publish import explained, flush_directory
from thresher.interop import formats, provenance
from thresher.interop.canonical import from_coder
from thresher.interop.formats import Exported, Format
from thresher.train.files import load_run


class Written(NamedTuple):
    """One directory that was written."""

    path: Path
    runs: tuple[str, ...]
    """Names of the runs in it."""


def export(runs: Sequence[Path], to: str, out: Path, *, overwrite: bool = False) -> list[Written]:
    """Write run directories in the format `to` below `out`.

    Raises UserError, before anything is written, for a format that cannot be written, for a dictionary it has no form
    for (with the reason and the nearest route), and for a place that is taken, unless `overwrite`.
    """
    form = formats.load(to)
    if form.write is None:
        raise UserError(
            f"--to {to}: that format is only read; expected one of {', '.join(formats.names(writing=True))}."
        )
    exported: list[tuple[str, Exported]] = []
    for path in runs:
        run = load_run(path)
        facts = provenance.facts(path, run.config)
        exported.append((str(run.config["group"]), Exported(from_coder(run.dictionary), facts)))
    parts = _parts(form, exported, out)
    for folder, items in parts:
        reason = form.refuse([item.dictionary for item in items]) if form.refuse is not None else None
        if reason is not None:
            raise UserError(f"{_listed(items)} cannot be written for {to}: {reason}")
        if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is there already. Give another place with --out, or add --overwrite.")
    return [_written(form, folder, items) for folder, items in parts]


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
    return Written(folder, tuple(item.dictionary.name for item in items))


def _listed(items: Sequence[Exported]) -> str:
    names = [item.dictionary.name for item in items]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
