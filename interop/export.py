"""The way out: finished runs into the files of another tool.

A run goes into a directory of its own, or, for a format that wants all layers together, the runs of a set into one.
All is checked before anything is written; what is written appears whole or not at all, also when it is interrupted.
"""

import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from thresher.cache.errors import UserError
from thresher.cache.publish import explained, flush_directory
from thresher.interop import formats, provenance
from thresher.interop.adapting import Moved, Ready, Thresholds, foreseen, moved_to, with_thresholds
from thresher.interop.canonical import from_coder
from thresher.interop.formats import Coded, Exported, Format, Text
from thresher.train.files import LoadedRun, load_run

_Item = TypeVar("_Item", Exported, Coded)


class Written(NamedTuple):
    """One directory that was written."""

    path: Path
    runs: tuple[str, ...]
    """Names of the runs in it."""
    thresholds: Mapping[str, Mapping[str, Any]]
    """By run, what calibrated thresholds are of and came to (`Calibrated.facts`)."""


def export(
    runs: Sequence[Path],
    to: str,
    out: Path,
    *,
    overwrite: bool = False,
    thresholds: Thresholds | None = None,
    moved: Moved | None = None,
    text: Text | None = None,
) -> list[Written]:
    """Write run directories in the format `to` below `out`; `text` for formats that hold codes over one.

    `thresholds`: give those that count their latents a threshold. `moved`: let the reader read at another hook. Raises
    UserError, before anything is written, for a format that cannot be written, for a dictionary it has no form for
    (with the reason and the nearest route), for a cache that is gone, for what the format has no use for, and for a
    place that is taken, unless `overwrite`, or that holds one of the runs.
    """
    form = formats.load(to)
    if form.write_codes is not None:
        for option, given in (("--thresholds", thresholds), ("--hook", moved)):
            if given is not None:
                raise UserError(
                    f"{option} has no effect with --to {to}, which holds what dictionaries do. Leave it out."
                )
        return _export_codes(form, runs, out, overwrite, text)
    write = form.write
    if write is None:
        raise UserError(
            f"--to {to}: that format is only read; expected one of {', '.join(formats.names(writing=True))}."
        )
    loaded = [(path, load_run(path)) for path in runs]
    ready = [Ready(run.config, exported(path, run)) for path, run in loaded]
    if moved is not None:
        ready = moved_to(ready, moved)
    if thresholds is not None:
        _checked(form, foreseen(ready), out, runs, overwrite)
        ready = with_thresholds(ready, thresholds)
    return [_written(folder, items, write) for folder, items in _checked(form, ready, out, runs, overwrite)]


def exported(path: Path, run: LoadedRun) -> Exported:
    """A run that was loaded, in canonical form. Raises UserError, naming the nearest route, for what has none."""
    return Exported(from_coder(run.dictionary), provenance.facts(path, run.config))


def check_form(form: Format, items: Sequence[Exported]) -> None:
    """Raise UserError, with the reason and the nearest route, where a format cannot hold what goes into one place."""
    reason = form.refuse([item.dictionary for item in items]) if form.refuse is not None else None
    if reason is not None:
        raise UserError(f"{_listed(items)} cannot be written for {form.name}: {reason}")


def _checked(
    form: Format, ready: Sequence[Ready], out: Path, runs: Sequence[Path], overwrite: bool
) -> list[tuple[Path, list[Exported]]]:
    """What goes into which directory. Raises UserError where it cannot."""
    parts = _parts([(_group(form, each.config), each.item) for each in ready], out)
    for folder, items in parts:
        check_form(form, items)
        _check_free(folder, runs, overwrite)
    return parts


def _export_codes(form: Format, runs: Sequence[Path], out: Path, overwrite: bool, text: Text | None) -> list[Written]:
    write = form.write_codes
    assert write is not None, "as the caller saw"
    if text is None:
        raise UserError(
            f"--to {form.name}: that format holds what dictionaries do on a text, so it needs the target and a text."
        )
    coded = []
    for path in runs:
        run = load_run(path, text.target.device)
        coded.append((_group(form, run.config), Coded(run.dictionary, provenance.facts(path, run.config))))
    parts = _parts(coded, out)
    for folder, _ in parts:
        _check_free(folder, runs, overwrite)
    return [_written(folder, items, lambda place, some: write(place, some, text)) for folder, items in parts]


def _group(form: Format, config: Mapping[str, Any]) -> str:
    """The directory that a run belongs to, where there are several."""
    return str(config["group"] if form.whole else config["name"])


def _parts(items: Sequence[tuple[str, _Item]], out: Path) -> list[tuple[Path, list[_Item]]]:
    """What goes into which directory: `out` itself where there is only one."""
    groups: dict[str, list[_Item]] = {}
    for name, item in items:
        groups.setdefault(name, []).append(item)
    return [(out if len(groups) == 1 else out / name, found) for name, found in groups.items()]


def _check_free(folder: Path, runs: Sequence[Path], overwrite: bool) -> None:
    """Raise UserError for a place that is taken, and for one whose replacement would take more than an export away."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{folder} is there already. Give another place with --out, or add --overwrite.")
    for inside in (*runs, Path.cwd()):
        if inside.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"--overwrite would delete all of {folder}, and {inside} with it. Give another place with --out."
            )


def _written(folder: Path, items: Sequence[_Item], write: Callable[[Path, Sequence[_Item]], None]) -> Written:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir()
        write(temporary, items)
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
