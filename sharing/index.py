"""The index of a repository of runs, `thresher.json`: which files belong to which run, and what each must be.

    README.md               the model card (card.py)
    thresher.json           this index
    runs/NAME/…             run directories as `thresher train` made them
    report/…                the evaluation that was given with them, if one was
    cache/…                 manifest and statistics of the cache they were trained from, if it was given

Every file is listed with its size and SHA-256, so a pull knows before it starts what it will get, and afterwards that
it got it. What an index may name is fixed here: no path leads out of its folder, and no file is of a kind that runs
code when it is read.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from thresher.cache.errors import UserError
from thresher.train.files import CONFIG, WEIGHTS

FORMAT, VERSION = "thresher-repository", 1
INDEX, CARD = "thresher.json", "README.md"
RUNS, REPORT, CACHE = "runs", "report", "cache"

_COMPONENT = r"[A-Za-z0-9_][A-Za-z0-9._+=,@-]*"
_PATH = re.compile(rf"{_COMPONENT}(/{_COMPONENT})*")
_SUFFIXES = {
    RUNS: (".json", ".jsonl", ".safetensors"),
    REPORT: (".json", ".npz", ".csv", ".md", ".tex", ".html", ".png", ".svg"),
    CACHE: (".json", ".0"),  # the chunks of Zarr arrays are called c.0.0
}


class File(NamedTuple):
    """What a file of the repository must be."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "File":
        """Of a file on the disk."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


Files = Mapping[str, File]
"""Files of one folder, by path in it, with `/`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """What a repository holds."""

    runs: Mapping[str, Files] = dataclasses.field(default_factory=dict)
    """By name; a run's folder is `runs/NAME`."""
    report: Files = dataclasses.field(default_factory=dict)
    """Empty without an evaluation."""
    cache: Files = dataclasses.field(default_factory=dict)
    """Empty where the cache's manifest was not shared."""
    license: str | None = None
    """As the card states it."""
    card: str | None = None
    """SHA-256 of the card as it was last made, so that one that people edited can be told from it."""

    def __post_init__(self) -> None:
        for name, files in self.runs.items():
            check_name(name)
            _check_files(files, RUNS)
            missing = [file for file in (CONFIG, WEIGHTS) if file not in files]
            if missing:
                raise UserError(f"{INDEX}: run {name!r} has no {missing[0]}. The repository has to be pushed anew.")
        _check_files(self.report, REPORT)
        _check_files(self.cache, CACHE)

    def to_json(self) -> bytes:
        """The file's content."""
        fields = {
            "runs": {name: _plain(files) for name, files in sorted(self.runs.items())},
            "report": _plain(self.report),
            "cache": _plain(self.cache),
            "license": self.license,
            "card": self.card,
        }
        return json.dumps({"format": FORMAT, "version": VERSION, **fields}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes, where: str) -> "Index":
        """Read `to_json` back; `where` names the repository. Raises UserError for what is no index, or a newer one."""
        try:
            raw = json.loads(text)
            version = raw["version"] if raw["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError):
            version = None
        if version is None:
            raise UserError(f"{INDEX} of {where} is not the index of a Thresher repository. Push the runs there anew.")
        if version > VERSION:
            raise UserError(
                f"{INDEX} of {where} has version {version}; this Thresher reads up to {VERSION}. Update Thresher."
            )
        try:
            runs = {str(name): _files(files) for name, files in raw["runs"].items()}
            report, cache = _files(raw["report"]), _files(raw["cache"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{INDEX} of {where} is damaged ({error!r}). Push the runs there anew.") from error
        return cls(runs=runs, report=report, cache=cache, license=raw.get("license"), card=raw.get("card"))


def check_name(name: str) -> None:
    """Raise UserError for a run's name that cannot be a folder everywhere."""
    if not re.fullmatch(_COMPONENT, name):
        raise UserError(
            f"Run name {name!r} cannot be a folder of a repository: expected letters, digits and ._+=,@- and no dot in "
            "front. Rename the directory."
        )


def _check_files(files: Files, folder: str) -> None:
    for path in files:
        if not _PATH.fullmatch(path) or not path.endswith(_SUFFIXES[folder]):
            raise UserError(
                f"{INDEX} names {folder}/…/{path}: expected a path inside the folder and one of the kinds "
                f"{', '.join(_SUFFIXES[folder])}, which run no code when they are read. It is not taken."
            )


def _files(raw: Mapping[str, Any]) -> dict[str, File]:
    return {str(path): File(int(entry["bytes"]), str(entry["sha256"])) for path, entry in raw.items()}


def _plain(files: Files) -> dict[str, dict[str, Any]]:
    return {path: file._asdict() for path, file in sorted(files.items())}


def listed(folder: Path, paths: Iterable[Path]) -> dict[str, File]:
    """Files below `folder`, as an index has them."""
    return {path.relative_to(folder).as_posix(): File.of(path) for path in sorted(paths)}
