"""Freeing the space of caches: what may go, and taking it away so that what is half gone is never taken for whole.

1. `survey` looks at a directory: which of its files are ours (by name; all others are left and named), which parts are
   complete, who holds a lock, when it was last used, which runs were trained from it.
2. `decide` says which files go. By default only leftovers do: temporary files of dead writers, data of shards without
   a commit record, parts without any commit. Interrupted harvests go after a week, complete caches when they are named
   or old enough, what runs refer to only on request, what is being written or read never.
3. `remove` takes every lock, looks again, decides again and deletes: manifests first, then commit records, then data,
   the root and the locks last, each step durable before the next. Killed anywhere, the directory is an incomplete
   cache, and the same prune again finishes it.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from thresher.cache.commit import MANIFEST, PARTS, ROOT
from thresher.cache.errors import UserError
from thresher.cache.index import read_index, strike
from thresher.cache.layout import FORMAT
from thresher.cache.locks import CREATE, READ, SOLE, Lock, excludes, is_held, try_hold
from thresher.cache.order import SPLITS
from thresher.cache.publish import explained, flush_directory
from thresher.cache.ring import CURSOR, FILLER, READER, READY

RESUMABLE_DAYS = 7.0
"""An interrupted harvest with committed shards is left alone for so long."""

_LAST = 6  # step of the removal

_SPLIT = f"(?:{'|'.join(SPLITS)})"
_PART = r"(?P<part>(?:parts/\d\d+-(?:sites|tokens)/)?)"
_OURS = re.compile(
    rf"""{_PART}(?:
        zarr\.json | MANIFEST\.json | (?:create|read|writer)\.lock | commits/{_SPLIT}\.\d+\.(?:json|lock)
        | parts/INDEX\.json | {"|".join(map(re.escape, (READY, CURSOR, FILLER, READER)))}
        | (?:{_SPLIT}|calibration|stats)/(?:[^/]+/){{0,2}}(?:zarr\.json|c(?:\.\d+)+)
    )(?P<temporary>\.[0-9a-f]{{12}}\.tmp)?""",
    re.VERBOSE,
)
_ROWS = re.compile(rf"{_PART}(?P<split>{_SPLIT})/(?!contexts/)[^/]+/c\.(?P<shard>\d+)(?:\.\d+)*")
_COMMIT = re.compile(rf"{_PART}commits/(?P<split>{_SPLIT})\.(?P<shard>\d+)\.json")


class Run(NamedTuple):
    """A run directory and the cache it names."""

    path: Path
    cache: Path
    fingerprint: str


class File(NamedTuple):
    """One of our files."""

    name: str
    """Below the cache, with /."""
    bytes: int
    changed: float
    """When it was written, of a manifest also read, seconds since the epoch; 0 for locks."""


class Part(NamedTuple):
    """The base of a cache or an extension."""

    prefix: str
    """Of the names of its files: empty, or such as `parts/01-sites/`."""
    complete: bool
    """Whether one may train from it."""
    ring: bool
    """Whether it is one of rolling mode, in which shards come and go."""
    committed: int
    shards: int | None
    """Of its plan; None when the root is damaged or not there."""
    pending: tuple[str, ...]
    """Shards without a commit record, such as `train.3`, of an incomplete part whose plan is known."""
    files: tuple[File, ...]
    leftovers: tuple[File, ...]
    """Files that no reader and no resumed harvest would miss."""
    listed: bool
    """Whether the cache's index has it as finished: what is lost of it may be written anew."""

    @property
    def state(self) -> str:
        """In words."""
        if self.shards is not None:
            if self.ring:
                return "ring"
            return "complete" if self.complete else f"{self.committed} of {self.shards} shards"
        root = any(file.name == self.prefix + ROOT for file in self.files)
        return "damaged root" if root or self.complete else f"{self.committed} of ? shards"


class Found(NamedTuple):
    """A directory that is a cache of ours, or was to become one."""

    path: Path
    parts: tuple[Part, ...]
    """The base first."""
    busy: str
    """`being written`, `being read`, or empty."""
    used: float
    """When it was last written or opened, seconds since the epoch; the file system may note that to the day only."""
    runs: tuple[Path, ...]
    """Run directories that name it."""
    strangers: tuple[str, ...]
    """Names below it that are not ours."""

    @property
    def bytes(self) -> int:
        """Size of our files."""
        return sum(file.bytes for part in self.parts for file in part.files)


class Decision(NamedTuple):
    """What goes."""

    files: tuple[File, ...]
    why: str
    """In a few words, also when nothing goes."""

    @property
    def bytes(self) -> int:
        """Space that it frees."""
        return sum(file.bytes for file in self.files)


class Policy(NamedTuple):
    """What the user allows."""

    older_than: float | None = None
    """Whatever was not used for so many days goes, complete or not."""
    used: bool = False
    """Also what runs refer to."""


def is_cache(path: Path) -> bool:
    """Whether a directory holds our root, or, without a sound one, our lock or a record of ours."""
    try:
        root = json.loads((path / ROOT).read_bytes())
    except (OSError, ValueError):
        records = (path / MANIFEST, *sorted(path.glob("commits/*.json"))[:1])
        return (path / CREATE).is_file() or any(
            FORMAT.encode() in record.read_bytes() for record in records if record.is_file()
        )
    return isinstance(root, dict) and "thresher" in root.get("attributes", {})


def find(path: Path) -> list[Path]:
    """The cache at `path`, or the caches directly inside it, by name; links inside are not followed.

    Raises UserError when there is no such directory, and for an extension alone.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no directory; expected a cache, or a directory of caches.")
    if path.parent.name == "parts" and is_cache(path.parent.parent):
        raise UserError(
            f"{path} is a part of the cache {path.parent.parent}, and other parts may extend it. Name the whole cache."
        )
    if is_cache(path):
        return [path]
    return [child for child in sorted(path.iterdir()) if child.is_dir() and not child.is_symlink() and is_cache(child)]


def survey(path: Path, runs: Sequence[Run] = ()) -> Found:
    """What stands at `path`."""
    parts: dict[str, list[File]] = {"": []}
    strangers = []
    for name, entry in _entries(path):
        ours = _OURS.fullmatch(name)
        if ours is None or not entry.is_file(follow_symlinks=False):
            strangers.append(name)
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # a writer has just renamed it
            continue
        # Whoever opens a cache reads its manifest; a lock is touched by those who only look, as we do.
        times = (status.st_mtime, status.st_atime if entry.name == MANIFEST else 0.0)
        changed = 0.0 if entry.name.endswith(".lock") else max(times)
        parts.setdefault(ours["part"], []).append(File(name, status.st_size, changed))
    listed = _listed(path)
    surveyed = tuple(_part(path, prefix, files, listed) for prefix, files in sorted(parts.items()))
    root = _plan(path / ROOT) or {}
    users = sorted(run.path for run in runs if run.fingerprint == root.get("fingerprint") or _same(run.cache, path))
    used = max((file.changed for part in surveyed for file in part.files), default=0.0)
    return Found(path, surveyed, _busy(path), used, tuple(users), tuple(sorted(strangers)))


def decide(found: Found, policy: Policy, *, named: bool, now: float) -> Decision:
    """Which files of a cache go; `named`: the user gave this very directory."""
    if found.busy:
        return Decision((), f"kept: {found.busy}")
    goes, why = _whole(found.parts[0], found.used, policy, named, now)
    if goes and found.runs and not policy.used:
        goes, why = False, f"kept: {_counted(len(found.runs), 'run')} trained from it (--used)"
    if goes:
        return Decision(tuple(file for part in found.parts for file in part.files), why)
    files = list(found.parts[0].leftovers)
    for part in found.parts[1:]:
        old = max(file.changed for file in part.files)
        kept = part.listed and policy.older_than is None
        whole = not part.complete and not kept and _whole(part, old, policy, False, now)[0]
        files += part.files if whole else part.leftovers
    return Decision(tuple(files), f"leftovers: {_counted(len(files), 'file')}" if files else why)


def remove(path: Path, policy: Policy, *, named: bool, runs: Sequence[Run] = ()) -> Decision:
    """Delete what `decide` allows, under all locks of the cache; returns what went.

    Raises UserError when the directory cannot be written to.
    """
    before = survey(path, runs)
    if not decide(before, policy, named=named, now=time.time()).files:
        return decide(before, policy, named=named, now=time.time())
    try:
        with _locked(before) as forbidden:
            found = survey(path, runs)
            fresh = _lockable(found) - _lockable(before)  # begun meanwhile: nobody else is kept out of it
            found = found._replace(busy=forbidden or ("being written" if fresh else ""))
            decision = decide(found, policy, named=named, now=time.time())
            _strike(found, decision)
            _delete(path, decision.files)
    except OSError as error:
        raise explained(error, path, 0) from error
    return decision


def _strike(found: Found, decision: Decision) -> None:
    """Take extensions off the cache's index that go while the base stays."""
    gone = set(decision.files)
    if not gone >= set(found.parts[0].files):
        strike(found.path, [Path(p.prefix).name for p in found.parts[1:] if p.listed and gone >= set(p.files)])


def _whole(part: Part, used: float, policy: Policy, named: bool, now: float) -> tuple[bool, str]:
    """Whether a part goes as a whole, and why (not)."""
    if named:
        return True, "all of it: named"
    resumable = not part.complete and part.state != "damaged root"
    if resumable and not part.committed:
        return True, "all of it: nothing is committed"
    limit = policy.older_than if policy.older_than is not None or not resumable else RESUMABLE_DAYS
    if limit is None:
        return False, "kept: name it or give --older-than DAYS"
    if now - used < limit * 86400 and policy.older_than is None:
        return False, f"kept for {limit:g} days: the same harvest goes on from there"
    if now - used < limit * 86400:
        return False, f"kept: used in the last {limit:g} days"
    return True, f"all of it: not used for {limit:g} days"


def _part(path: Path, prefix: str, files: list[File], listed: set[str]) -> Part:
    names = {file.name for file in files}
    ring = prefix + READY in names
    complete = ring or prefix + MANIFEST in names
    commits = {f"{m['split']}.{m['shard']}" for name in names if (m := _COMMIT.fullmatch(name))}
    leftovers = [file for file in files if file.name.endswith(".tmp")]
    plan, shards, pending = _plan(path / prefix / ROOT), None, []
    if plan is not None:
        each = [f"{split}.{i}" for split, sizes in plan["splits"].items() for i in range(sizes["shards"])]
        shards = len(each)
        pending = [] if complete else [shard for shard in each if shard not in commits]
        rows = ((file, _ROWS.fullmatch(file.name)) for file in files)
        leftovers += [file for file, m in rows if m and f"{m['split']}.{m['shard']}" in pending]
    return Part(
        prefix, complete, ring, len(commits), shards, tuple(pending), tuple(files), tuple(leftovers), prefix in listed
    )


def _listed(path: Path) -> set[str]:
    """Prefixes of the extensions that the index has as finished; none when it cannot be read."""
    try:
        return {f"{PARTS}/{name}/" for name in read_index(path, lost_is_empty=True)}
    except UserError:
        return set()


def _plan(root: Path) -> dict[str, Any] | None:
    """The plan in a root, of whatever version; None when it is missing or cannot be read."""
    try:
        raw = json.loads(root.read_bytes())["attributes"]["thresher"]
        sound = all(isinstance(sizes["shards"], int) for sizes in raw["splits"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(raw) if sound else None


def _entries(path: Path, prefix: str = "") -> "Iterator[tuple[str, os.DirEntry[str]]]":
    """Everything below a directory but directories, by name below it; links are not followed."""
    try:
        entries = os.scandir(path)
    except FileNotFoundError:  # removed meanwhile
        return
    with entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry.path), f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _busy(path: Path) -> str:
    """Who holds a lock, if anybody does."""
    for folder in (path, *sorted(path.glob("parts/*-*"))):
        writing = (folder / CREATE, *folder.glob("commits/*.lock"), folder / FILLER)
        if (folder / SOLE).exists() or any(map(is_held, writing)):
            return "being written"
        if any(map(is_held, (folder / READ, folder / READER))):
            return "being read"
    return ""


def _lockable(found: Found) -> set[str]:
    """Names of the locks that together keep everybody out of the parts that were found."""
    return {p.prefix + name for p in found.parts for name in (CREATE, READ, *((FILLER, READER) if p.ring else ()))}


@contextmanager
def _locked(found: Found) -> Iterator[str]:
    """Keep everybody out of a cache; gives what forbids it, or nothing.

    Who plans or finishes a part holds the first lock, every living reader and writer shares the second.
    """
    with ExitStack() as stack:
        held: list[Lock] = []
        for name in sorted(_lockable(found)):
            lock = try_hold(found.path / name)
            if lock is None:
                yield "being written" if name.endswith(CREATE) else "in use"
                return
            stack.callback(lock.release)
            held.append(lock)
        yield "" if all(map(excludes, held)) else "its file system has no locks, so nobody can tell who uses it"


def _delete(path: Path, files: Iterable[File]) -> None:
    """Unlink files in the order that keeps what is left recognisable, and the directories that became empty."""
    steps: dict[int, list[Path]] = {}
    for file in files:
        steps.setdefault(_step(file.name), []).append(path / file.name)
    last = steps.pop(_LAST, [])
    for _, step in sorted(steps.items()):
        for each in step:
            each.unlink()
        for folder in {each.parent for each in step}:
            flush_directory(folder)
    for name, _, _ in os.walk(path, topdown=False) if steps else ():
        if not os.listdir(name):
            os.rmdir(name)
    for each in last:
        each.unlink()
        if not os.listdir(path):
            path.rmdir()


def _step(name: str) -> int:
    """When a file goes: a manifest first, a root late, and the lock that still tells a cache of ours last of all."""
    file = name.rsplit("/", 1)[-1]
    if file.endswith(".lock"):
        return _LAST if name == CREATE else 5
    if file in (MANIFEST, READY):
        return 0
    if _COMMIT.fullmatch(name):
        return 1
    return 4 if name == ROOT else 3 if re.fullmatch(_PART + re.escape(ROOT), name) else 2
