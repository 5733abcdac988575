"""What prune takes and what it leaves, and that a prune that is killed is finished by the next."""

import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from thresher.cache import prune
from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.locks import Lock, is_held, share, try_hold
from thresher.cache.plan import Extends
from thresher.cache.prune import Policy, Run, decide, find, is_cache, remove, survey
from thresher.cache.reader import CacheReader
from thresher.cache.stored import read_root

Tree = Callable[[Path], dict[str, bytes]]
DEFAULT = Policy()


def aged(path: Path, days: float) -> None:
    """Let a cache look as if it had last been used so many days ago."""
    then = time.time() - days * 86400
    for file in path.rglob("*"):
        os.utime(file, (then, then))


def locked(file: Path, kind: int = fcntl.LOCK_EX) -> int:
    file.touch()
    descriptor = os.open(file, os.O_RDWR)
    fcntl.flock(descriptor, kind)
    return descriptor


def as_ring(path: Path) -> None:
    """The files that rolling mode adds."""
    (path / "ring").mkdir()
    for name in ("RING.json", "ring/cursor.json", "ring/filler.lock", "ring/reader.lock"):
        (path / name).touch()


def kill_at(call: int, action: Callable[[], object]) -> bool:
    """Run an action in a forked process that dies at its call-th change of a directory; whether it did."""
    child = os.fork()
    if child == 0:
        left = [call]

        def counted(original):  # type: ignore[no-untyped-def]
            def wrapper(*arguments, **named):  # type: ignore[no-untyped-def]
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **named)

            return wrapper

        for name in ("unlink", "fsync", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.fixture
def halfway(victim: Callable[..., str], tmp_path: Path) -> Path:
    """A harvest that was killed with some shards committed."""
    path = tmp_path / "halfway.zarr"
    assert victim(path, die_at=400) == "killed"
    found = survey(path).parts[0]
    assert 0 < found.committed < (found.shards or 0)
    return path


def test_a_finished_cache_stays_and_only_its_leftovers_go(copied: Path, tree: Tree) -> None:
    whole = tree(copied)
    (copied / "train" / f"c.0.0.{'0a' * 6}.tmp").write_bytes(b"dead")
    (copied / "notes.txt").write_text("mine")
    (copied / "link.json").symlink_to(copied / "MANIFEST.json")
    found = survey(copied)
    assert found.strangers == ("link.json", "notes.txt")
    assert found.parts[0].state == "complete"
    decision = remove(copied, DEFAULT, named=False)
    assert [file.name for file in decision.files] == [f"train/c.0.0.{'0a' * 6}.tmp"]
    assert decision.bytes == 4
    (copied / "notes.txt").unlink()
    (copied / "link.json").unlink()
    left = tree(copied)
    assert {name: left[name] for name in whole} == whole
    assert set(left) - set(whole) <= {"read.lock"}
    assert CacheReader.open(copied).verify() == []


def test_an_interrupted_harvest_loses_what_it_would_write_anew_and_ends_in_the_same_bytes(
    halfway: Path, victim: Callable[..., str], finished: Callable[..., Path], tree: Tree
) -> None:
    before = survey(halfway).parts[0]
    split, shard = before.pending[-1].split(".")
    data = f"{split}/L00.mlp_in/c.{shard}.0"
    (halfway / data).write_bytes(b"not committed")
    decision = remove(halfway, DEFAULT, named=False)
    assert survey(halfway).parts[0].committed == before.committed
    assert not survey(halfway).parts[0].leftovers
    assert data in [file.name for file in decision.files]
    assert not any("/contexts/" in file.name or file.name.startswith("commits/") for file in decision.files)
    assert victim(halfway) == "done"
    assert tree(halfway) == tree(finished())


@pytest.mark.parametrize(
    ("older_than", "days", "goes"), [(None, 6, False), (None, 8, True), (30, 8, False), (0, 0, True)]
)
def test_an_interrupted_harvest_goes_after_a_week(
    halfway: Path, older_than: float | None, days: float, goes: bool
) -> None:
    aged(halfway, days)
    remove(halfway, Policy(older_than), named=False)
    assert halfway.exists() != goes


def test_a_harvest_killed_before_its_first_commit_goes_at_once(victim: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "early.zarr"
    assert victim(path, die_at=30) == "killed"
    assert remove(path, DEFAULT, named=False).why == "all of it: nothing is committed"
    assert not path.exists()


@pytest.mark.parametrize(
    ("policy", "named", "days", "used", "goes"),
    [
        (DEFAULT, False, 400, False, False),
        (DEFAULT, True, 0, False, True),
        (Policy(30), False, 29, False, False),
        (Policy(30), False, 31, False, True),
        (DEFAULT, True, 400, True, False),
        (Policy(30), False, 31, True, False),
        (Policy(30, used=True), False, 31, True, True),
        (Policy(used=True), True, 0, True, True),
    ],
)
def test_a_finished_cache_goes_when_named_or_old_and_unused(
    copied: Path, policy: Policy, named: bool, days: float, used: bool, goes: bool
) -> None:
    aged(copied, days)
    runs = [Run(Path("runs/a"), copied if used else Path("elsewhere"), "unknown")]
    assert survey(copied, runs).runs == ((Path("runs/a"),) if used else ())
    remove(copied, policy, named=named, runs=runs)
    assert copied.exists() != goes


def test_a_run_is_known_by_the_fingerprint_when_its_cache_was_moved(copied: Path) -> None:
    fingerprint = json.loads((copied / "zarr.json").read_text())["attributes"]["thresher"]["fingerprint"]
    found = survey(copied, [Run(Path("a"), Path("gone"), fingerprint), Run(Path("b"), Path("gone"), "other")])
    assert found.runs == (Path("a"),)


@pytest.mark.parametrize(
    ("name", "kind", "state"),
    [
        ("create.lock", fcntl.LOCK_EX, "being written"),
        ("commits/train.1.lock", fcntl.LOCK_EX, "being written"),
        ("read.lock", fcntl.LOCK_SH, "being read"),
        ("parts/01-sites/commits/train.1.lock", fcntl.LOCK_EX, "being written"),
        ("ring/filler.lock", fcntl.LOCK_EX, "being written"),
        ("ring/reader.lock", fcntl.LOCK_EX, "being read"),
    ],
)
def test_what_is_locked_stays(copied: Path, tree: Tree, name: str, kind: int, state: str) -> None:
    shutil.copytree(copied, copied / "parts/01-sites")
    as_ring(copied)
    descriptor = locked(copied / name, kind)
    before = tree(copied)
    found = survey(copied)
    assert found.busy == state
    assert decide(found, Policy(0, used=True), named=True, now=time.time()).why == f"kept: {state}"
    assert not remove(copied, Policy(0, used=True), named=True).files
    assert tree(copied) == before
    os.close(descriptor)
    assert remove(copied, DEFAULT, named=True).files
    assert not copied.exists()


def test_a_reader_and_a_writer_between_two_shards_keep_their_cache(
    copied: Path, toy: ModuleType, tmp_path: Path
) -> None:
    reader = CacheReader.open(copied)
    with toy.open_writer(tmp_path / "new.zarr"):
        for path in (copied, tmp_path / "new.zarr"):
            assert not remove(path, Policy(0), named=True).files
    assert remove(tmp_path / "new.zarr", DEFAULT, named=False).files
    assert reader.verify() == []


def test_a_cache_that_is_being_written_may_be_looked_at_and_is_never_touched(
    finished: Callable[..., Path], toy: ModuleType, tmp_path: Path, tree: Tree
) -> None:
    path = tmp_path / "new.zarr"
    path.mkdir()
    writer = threading.Thread(target=toy.fill, args=(path,))
    writer.start()
    looks = 0
    while writer.is_alive():
        if is_cache(path) and survey(path).busy:
            assert not remove(path, DEFAULT, named=False).files
            looks += 1
    writer.join()
    assert looks > 2
    assert tree(path) == tree(finished())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99])
def test_a_killed_prune_leaves_no_cache_that_passes_for_whole_and_is_finished_by_the_next(
    copied: Path, share: float
) -> None:
    """Kills spread over all unlinks, flushes and removals of directories."""
    shutil.copytree(copied, copied / "parts/01-sites")
    changes = sum(len(folders) + len(files) + 1 for _, folders, files in os.walk(copied))
    assert kill_at(1 + int(share * changes), lambda: remove(copied, DEFAULT, named=True))
    if (copied / "MANIFEST.json").exists():
        assert share == 0
    else:
        with pytest.raises(UserError):
            CacheReader.open(copied)
    assert find(copied) == [copied]
    remove(copied, DEFAULT, named=True)
    assert not copied.exists()
    # A kill between the last two changes leaves an empty directory, which nobody takes for anything.


def test_a_removal_begins_with_the_manifest_and_ends_with_root_and_lock(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, unlink = [], os.unlink

    def counted(path: Path, **named: object) -> None:
        gone.append(Path(path).relative_to(copied).as_posix())
        unlink(path)

    monkeypatch.setattr(os, "unlink", counted)
    remove(copied, DEFAULT, named=True)
    kinds = ["commits" if name.startswith("commits/") and name.endswith(".json") else name for name in gone]
    last_commit = len(kinds) - 1 - kinds[::-1].index("commits")
    assert gone[0] == "MANIFEST.json"
    assert set(kinds[1 : last_commit + 1]) == {"commits"}
    root = gone.index("zarr.json")
    assert all(name.endswith(".lock") for name in gone[root + 1 :])
    assert gone[-1] == "create.lock"


def test_unknown_files_survive_their_cache(copied: Path) -> None:
    mine = [copied / "train" / "notes.txt", copied / "commits" / "train.0.json.bak", copied / "x" / "c.0"]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    remove(copied, DEFAULT, named=True)
    assert sorted(file for file in copied.rglob("*") if file.is_file()) == sorted(mine)
    assert not is_cache(copied)


@pytest.mark.parametrize("before", [False, True])
def test_an_extension_that_is_begun_while_the_locks_are_taken_is_not_deleted(
    copied: Path, toy: ModuleType, tree: Tree, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Begun between the first look and the locks, or after them."""
    writers, hold = [], prune.try_hold

    def late(path: Path, patience: float = 0.0) -> Lock | None:
        lock = None if before else hold(path, patience)
        if not writers:
            extends = Extends("sites", read_root(copied).plan.fingerprint)
            changes = {"identity": {**toy.IDENTITY, "more": 1}, "sites": (Site("L00.new", 0, "new", 8),)}
            writers.append(toy.open_writer(copied / "parts" / "01-sites", extends=extends, codec="bf16", **changes))
        return hold(path, patience) if before else lock

    monkeypatch.setattr(prune, "try_hold", late)
    whole = tree(copied)
    decision = remove(copied, DEFAULT, named=True)
    assert (decision.files, decision.why) == ((), "kept: being written")
    left = tree(copied)
    assert {name: left[name] for name in whole} == whole
    assert "parts/01-sites/zarr.json" in left
    writers[0].close()
    assert remove(copied, DEFAULT, named=True).files
    assert not copied.exists()


def test_looking_at_a_cache_disturbs_nobody_who_opens_it(copied: Path) -> None:
    """What `is_held` takes for a moment is asked for again; a lock that is kept is told."""
    (copied / "read.lock").touch()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            is_held(copied / "read.lock")

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(3000):
            lock = share(copied / "read.lock")
            assert lock is not None
            lock.release()
    finally:
        stop.set()
        looking.join()


@pytest.mark.parametrize("take", [share, lambda file: try_hold(file, patience=1.0)])
def test_a_lock_that_is_held_for_a_moment_is_waited_for(tmp_path: Path, take: Callable[[Path], Lock | None]) -> None:
    file = tmp_path / "read.lock"
    descriptor = locked(file)
    assert is_held(file)
    asked = threading.Timer(0.1, os.close, (descriptor,))
    asked.start()
    lock = take(file)
    asked.join()
    assert lock is not None
    assert is_held(file)
    lock.release()
    assert not is_held(file)


def test_a_lock_file_that_is_removed_before_it_is_shared_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "read.lock"
    file.touch()
    flock = fcntl.flock

    def removing(descriptor: int, operation: int) -> None:
        file.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removing)
    assert share(file) is None


def test_an_unfinished_part_goes_and_the_base_stays(copied: Path, tree: Tree) -> None:
    part = copied / "parts" / "01-tokens"
    shutil.copytree(copied, part, ignore=shutil.ignore_patterns("parts", "commits", "MANIFEST.json"))
    assert [(each.complete, each.committed) for each in survey(copied).parts[1:]] == [(False, 0)]
    remove(copied, DEFAULT, named=False)
    assert not part.exists()
    assert CacheReader.open(copied).verify() == []


def test_a_ring_goes_like_a_finished_cache(copied: Path) -> None:
    as_ring(copied)
    for name in ("MANIFEST.json", "commits/train.1.json"):
        (copied / name).unlink()
    assert survey(copied).parts[0].state == "ring"
    assert not remove(copied, DEFAULT, named=False).files
    remove(copied, DEFAULT, named=True)
    assert not copied.exists()


def test_a_damaged_root_is_told_and_stays_until_it_is_named(copied: Path) -> None:
    root = copied / "zarr.json"
    root.write_bytes(root.read_bytes()[:100])
    assert is_cache(copied)
    assert survey(copied).parts[0].state == "damaged root"
    assert not remove(copied, DEFAULT, named=False).files
    remove(copied, DEFAULT, named=True)
    assert not copied.exists()


def test_other_directories_are_no_caches(copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "store"
    (other / "train").mkdir(parents=True)
    (other / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    (other / "create.lock").touch()
    (tmp_path / "link").symlink_to(copied)
    (tmp_path / "empty").mkdir()
    assert find(tmp_path) == [copied]
    assert find(copied) == [copied]
    shutil.copytree(copied, copied / "parts/01-sites")
    with pytest.raises(UserError, match="Name the whole cache"):
        find(copied / "parts/01-sites")
    with pytest.raises(UserError, match="no directory"):
        find(tmp_path / "nothing")
