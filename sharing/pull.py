"""Pull: runs out of a repository on the hub, into run directories like those that training makes.

What a repository says it holds is read first; files come through the hub's local cache, are held against their SHA-256,
copied beside their place under a temporary name and renamed once all of a run is there. So a run directory is there
whole or not at all. Only files are fetched that the index names, and those are safetensors, JSON and plots: nothing in
them is run.
"""

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from thresher.cache.errors import UserError
from thresher.cache.publish import explained, flush_directory, make_directory
from thresher.cache.records import nearest
from thresher.sharing.hub import Hub
from thresher.sharing.index import CACHE, INDEX, REPORT, RUNS, File, Files, Index
from thresher.train.files import CONFIG, WEIGHTS, check_weights, read_config

_TRAINING_STATE = "checkpoints/"


class Pulled(NamedTuple):
    """What a pull brought."""

    commit: str
    runs: tuple[Path, ...]
    """Run directories that are new."""
    reused: tuple[Path, ...]
    """Run directories that were there, equal to those of the repository."""
    report: Path | None
    cache: Path | None


class _Folder(NamedTuple):
    """A folder of the repository that becomes one on the disk."""

    there: str
    here: Path
    files: Files


def pull(
    repo: str,
    names: Sequence[str] = (),
    *,
    out: Path,
    report: Path | None = None,
    cache: Path | None = None,
    revision: str | None = None,
    checkpoints: bool = False,
) -> Pulled:
    """Fetch runs of `owner/name` into `out`/NAME: the named ones (runs, or stems of a set's names), or all.

    `report`, `cache`: also the evaluation, and the manifest and statistics of the cache, into these new directories.
    A finished run that is there already and equal is kept. Raises UserError, with nothing half-written, for a
    directory that holds something else, for files that are not what the index says, and when the hub does not answer.
    """
    hub = Hub(repo, revision)
    if hub.look() is None:
        raise UserError(
            f"{repo} is not on the hub, or you may not see it. Check the spelling (owner/name), or log in with `hf "
            "auth login` if it is private."
        )
    commit, index = _index(hub)
    chosen = _chosen(index, names, repo)
    wanted, reused = [], []
    for name in chosen:
        files = {path: file for path, file in index.runs[name].items() if checkpoints or not _is_state(path)}
        if _is_there(out / name, index.runs[name]):
            reused.append(out / name)
        else:
            wanted.append(_Folder(f"{RUNS}/{name}", out / name, files))
    extras = [
        _extra(REPORT, report, index.report, f"{repo} has no evaluation's report; leave --report out."),
        _extra(CACHE, cache, index.cache, f"{repo} does not share its cache's manifest; leave --cache out."),
    ]
    folders = wanted + [folder for folder in extras if folder is not None]
    if folders:
        _bring(hub, commit, folders)
    return Pulled(commit, tuple(folder.here for folder in wanted), tuple(reused), report, cache)


def _index(hub: Hub) -> tuple[str, Index]:
    """What the repository holds at the revision, and the commit that this is."""
    found = hub.head(INDEX)
    if found is None:
        raise UserError(
            f"{hub.repo} holds no runs of Thresher: it has no {INDEX}. Give a repository that `thresher push` filled."
        )
    return found[0], Index.from_json(found[1], hub.repo)


def _is_state(path: str) -> bool:
    return path.startswith(_TRAINING_STATE)


def _chosen(index: Index, names: Sequence[str], repo: str) -> list[str]:
    """Runs by name or by the stem of their names, in the repository's order; all when nothing is named."""
    if not names:
        return sorted(index.runs)
    found: dict[str, None] = {}
    for name in names:
        hits = [run for run in sorted(index.runs) if run == name] or [
            run for run in sorted(index.runs) if run.startswith(f"{name}-")
        ]
        if not hits:
            some = ", ".join(sorted(index.runs)[:8]) + (", …" if len(index.runs) > 8 else "")
            raise UserError(f"{repo} has no run {name!r}.{nearest(name, index.runs)} It has {some}.")
        found |= dict.fromkeys(hits)
    return list(found)


def _is_there(path: Path, files: Files) -> bool:
    """Whether the run is on the disk already. Raises UserError for a directory with anything else in it."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise UserError(
                f"{path} is there and has no {name}: it is no finished run. Choose another place with --runs."
            )
        if File.of(path / name) != files[name]:
            raise UserError(
                f"{path} holds another run: its {name} is not the repository's. Choose another place with --runs, or "
                "rename the directory."
            )
    return True


def _extra(there: str, here: Path | None, files: Files, missing: str) -> _Folder | None:
    if here is None:
        return None
    if not files:
        raise UserError(missing)
    if here.exists() and any(here.iterdir()):
        raise UserError(f"{here} is not empty. Give --{there} a new directory.")
    return _Folder(there, here, files)


def _bring(hub: Hub, commit: str, folders: Sequence[_Folder]) -> None:
    """Download, check, copy under temporary names, and only then rename: folder by folder whole, or none at all."""
    paths = {f"{folder.there}/{path}": file for folder in folders for path, file in folder.files.items()}
    source = hub.fetch(commit, list(paths))
    if _wrong(source, paths):
        source = hub.fetch(commit, _wrong(source, paths), again=True)  # a damaged copy in the hub's cache
    if wrong := _wrong(source, paths):
        raise UserError(
            f"{wrong[0]} of {hub.repo} is not what {INDEX} says it is: another SHA-256. Nothing was kept. The "
            "repository was changed by hand or is damaged: ask its owner, or give another --revision."
        )
    staged: dict[Path, Path] = {}
    try:
        for folder in folders:
            staged[folder.here] = folder.here.with_name(f".{folder.here.name}.{secrets.token_hex(6)}.tmp")
            _copy(source / folder.there, staged[folder.here], folder.files)
            if folder.there.startswith(RUNS):
                _check_run(staged[folder.here], folder.there, hub.repo)
        for here, temporary in staged.items():
            if here.is_dir():
                here.rmdir()  # an empty one: anything else was refused
            temporary.rename(here)
            flush_directory(here.parent)
    finally:
        for temporary in staged.values():
            shutil.rmtree(temporary, ignore_errors=True)


def _wrong(source: Path, paths: Mapping[str, File]) -> list[str]:
    """Paths whose content is not what it must be."""
    return [path for path, file in paths.items() if not (source / path).is_file() or File.of(source / path) != file]


def _copy(source: Path, target: Path, files: Files) -> None:
    """Copy the files, and have them on the disk."""
    for path in files:
        place = target / path
        try:
            make_directory(place.parent)
            shutil.copyfile(source / path, place)
            with place.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise explained(error, place, sum(file.bytes for file in files.values())) from error


def _check_run(path: Path, there: str, repo: str) -> None:
    """What the index calls a run must be one, and finished."""
    try:
        config = read_config(path)
        check_weights(path)
    except UserError as error:
        raise UserError(f"{there} of {repo} is no run that can be used, and was not kept: {error}") from error
    if not config.get("training", {}).get("finished"):
        raise UserError(f"{there} of {repo} is not finished, and was not kept. Ask its owner to push the finished run.")
