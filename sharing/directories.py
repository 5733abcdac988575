"""What of a directory is shared: which files of a run, a report and a cache, once they are seen to be whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from thresher.cache.commit import MANIFEST, ROOT
from thresher.cache.errors import UserError
from thresher.cache.publish import read_sealed
from thresher.sharing.index import File, Files, check_name, listed
from thresher.train.files import CONFIG, WEIGHTS, check_weights, read_config
from thresher.train.found import run_directories
from thresher.train.metrics import METRICS

RESULTS = "results.json"
_REPORT = (RESULTS, "results.csv", "results.md", "results.tex", "report.html", "documents.npz")
_STATISTICS = ("stats/", "calibration/")


class SharedRun(NamedTuple):
    """A finished run that is to be shared."""

    name: str
    """Of its directory."""
    path: Path
    config: Mapping[str, Any]
    """config.json."""
    files: Files

    @property
    def weights(self) -> str:
        """SHA-256 of its weights."""
        return self.files[WEIGHTS].sha256


def shared_runs(places: Sequence[Path], *, checkpoints: bool = False) -> list[SharedRun]:
    """The runs that `places` mean: run directories, folders of them, or the stem that the names of a set share.

    Raises UserError for a run that is not finished or not whole, and for two of the same name.
    """
    found: dict[str, SharedRun] = {}
    for path in dict.fromkeys(each.resolve() for place in places for each in _meant(place)):
        run = _shared(path, checkpoints)
        if run.name in found:
            raise UserError(
                f"{found[run.name].path} and {path} are both called {run.name}, and a repository has one run of a "
                "name. Rename one of the directories, or push them to two repositories."
            )
        found[run.name] = run
    return list(found.values())


def _meant(place: Path) -> list[Path]:
    """Run directories of a place, or of the stem of their names: `runs/books/topk` for topk-L00, topk-L01, …"""
    if place.is_dir():
        return run_directories([place])
    members = sorted(config.parent for config in place.parent.glob(f"{place.name}-*/{CONFIG}"))
    return members or run_directories([place])


def _shared(path: Path, checkpoints: bool) -> SharedRun:
    config = read_config(path)
    training = config.get("training", {})
    if not training.get("finished"):
        why = f"it failed: {training['failed']}" if training.get("failed") else "its training has not finished"
        raise UserError(
            f"Run {path} cannot be shared: {why}. Go on with `thresher train --resume`, or leave it out of the command."
        )
    check_weights(path)
    check_name(path.name)
    wanted = [path / name for name in (CONFIG, WEIGHTS, METRICS) if (path / name).is_file()]
    if checkpoints:
        wanted += [file for kind in ("json", "safetensors") for file in (path / "checkpoints").rglob(f"*.{kind}")]
    return SharedRun(path.name, path, config, listed(path, wanted))


def shared_report(folder: Path) -> Files:
    """What of a report is shared: everything but its sums by run. Raises UserError where there is none."""
    if not (folder / RESULTS).is_file():
        raise UserError(
            f"--report {folder}: there is no {RESULTS}. Give the directory that `thresher evaluate --out` wrote."
        )
    plots = [file for kind in ("png", "svg") for file in (folder / "plots").glob(f"*.{kind}")]
    return listed(folder, [folder / name for name in _REPORT if (folder / name).is_file()] + plots)


def shared_cache(path: Path) -> Files:
    """Manifest, plan and statistics of a cache: what it is made of, and what its sites look like, without its rows.

    Raises UserError for what is no finished cache, and for files that are not what the manifest says.
    """
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"--cache {path}: there is no {MANIFEST}, so it is no finished cache. Give one, or leave it out."
        )
    manifest = read_sealed(path / MANIFEST)
    names = [name for name in manifest["files"] if name == ROOT or name.startswith(_STATISTICS)]
    files = listed(path, [path / MANIFEST, *(path / name for name in names)])
    for name in names:
        expected = File(manifest["files"][name]["bytes"], manifest["files"][name]["sha256"])
        if files[name] != expected:
            raise UserError(
                f"{path / name} is not what {MANIFEST} says of it: the cache is damaged. Run `thresher cache verify "
                f"{path}`, which names every fault."
            )
    return files


def cache_fingerprint(path: Path) -> str:
    """The fingerprint in a finished cache's manifest."""
    return str(read_sealed(path / MANIFEST)["fingerprint"])
