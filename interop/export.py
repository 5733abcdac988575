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

_Item = TypeVar("_Item")
_Part = TypeVar("_Part", Exported, Coded)


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
    left_out: Callable[[str], None] | None = None,
    nested: bool = False,
) -> list[Written]:
    """Write run directories in the format `to` into `out`, several of them, or all if `nested`, into `out`/NAME.

    `text`: for formats that hold codes over one.
    `left_out`: where something can be written, told why the rest cannot, in the place of an error: of a whole sweep.
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
        return _export_codes(form, runs, out, overwrite, text, nested)
    write = form.write
    if write is None:
        raise UserError(
            f"--to {to}: that format is only read; expected one of {', '.join(formats.names(writing=True))}."
        )
    ready = _ready(runs, moved, left_out)
    alone = not nested and len({_group(form, each.config) for each in ready}) == 1 and len(ready) == len(runs)
    ready = _fitting(form, ready, thresholds is not None, left_out)
    parts = _parts([(_group(form, each.config), each) for each in ready], out, alone)
    for folder, _ in parts:
        _check_free(folder, runs, overwrite)
    if thresholds is not None:
        ready = with_thresholds(ready, thresholds)
        parts = _parts([(_group(form, each.config), each) for each in ready], out, alone)
    return [_written(folder, [each.item for each in some], write) for folder, some in parts]


def _ready(runs: Sequence[Path], moved: Moved | None, left_out: Callable[[str], None] | None) -> list[Ready]:
    """The runs in canonical form, those that have one, reading where they shall be read."""
    done: list[Ready] = []
    reasons: list[UserError] = []
    for path in runs:
        run = load_run(path)
        try:
            ready = Ready(run.config, exported(path, run))
            done.append(ready if moved is None else moved_to(ready, moved))
        except UserError as error:
            reasons.append(error)
    _tell(reasons, bool(done), left_out)
    return done


def _fitting(
    form: Format, ready: Sequence[Ready], thresholds: bool, left_out: Callable[[str], None] | None
) -> list[Ready]:
    """Those that the format can hold, `thresholds` or not, by what goes into one directory."""
    later = foreseen(ready) if thresholds else ready
    groups = [_group(form, each.config) for each in ready]
    reasons = {}
    for group in dict.fromkeys(groups):
        try:
            check_form(form, [each.item for each, own in zip(later, groups, strict=True) if own == group])
        except UserError as error:
            reasons[group] = error
    fitting = [each for each, group in zip(ready, groups, strict=True) if group not in reasons]
    _tell(list(reasons.values()), bool(fitting), left_out)
    return fitting


def _tell(reasons: Sequence[UserError], more: bool, left_out: Callable[[str], None] | None) -> None:
    """Raise the first reason, or tell all of them where there is something else to write."""
    if reasons and (left_out is None or not more):
        raise reasons[0]
    for reason in reasons:
        assert left_out is not None, "else it was raised"
        left_out(str(reason))


def exported(path: Path, run: LoadedRun) -> Exported:
    """A run that was loaded, in canonical form. Raises UserError, naming the nearest route, for what has none."""
    return Exported(from_coder(run.dictionary), provenance.facts(path, run.config))


def check_form(form: Format, items: Sequence[Exported]) -> None:
    """Raise UserError, with the reason and the nearest route, where a format cannot hold what goes into one place."""
    reason = form.refuse([item.dictionary for item in items]) if form.refuse is not None else None
    if reason is not None:
        raise UserError(f"{_listed(items)} cannot be written for {form.name}: {reason}")


def _export_codes(
    form: Format, runs: Sequence[Path], out: Path, overwrite: bool, text: Text | None, nested: bool
) -> list[Written]:
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
    parts = _parts(coded, out, not nested and len({group for group, _ in coded}) == 1)
    for folder, _ in parts:
        _check_free(folder, runs, overwrite)
    return [_written(folder, items, lambda place, some: write(place, some, text)) for folder, items in parts]


def _group(form: Format, config: Mapping[str, Any]) -> str:
    """The directory that a run belongs to, where there are several."""
    return str(config["group"] if form.whole else config["name"])


def _parts(items: Sequence[tuple[str, _Item]], out: Path, alone: bool) -> list[tuple[Path, list[_Item]]]:
    """What goes into which directory: `out` itself where only one was asked for."""
    groups: dict[str, list[_Item]] = {}
    for name, item in items:
        groups.setdefault(name, []).append(item)
    return [(out if alone else out / name, found) for name, found in groups.items()]


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


def _written(folder: Path, items: Sequence[_Part], write: Callable[[Path, Sequence[_Part]], None]) -> Written:
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(6)
    temporary, aside = (folder.with_name(f".{folder.name}.{token}.{word}") for word in ("tmp", "old"))
    try:
        temporary.mkdir()
        write(temporary, items)
        if folder.exists():
            folder.rename(aside)  # so that at every moment one of them is there
        temporary.rename(folder)
        flush_directory(folder.parent)
    except OSError as error:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        raise explained(error, folder, 0) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
    calibrated = {item.dictionary.name: item.facts["thresholds"] for item in items if "thresholds" in item.facts}
    return Written(folder, tuple(item.dictionary.name for item in items), calibrated)


def _listed(items: Sequence[Exported]) -> str:
    names = [item.dictionary.name for item in items]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
