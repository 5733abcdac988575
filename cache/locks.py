"""Locks between writers of one cache: the kernel's `flock`, freed with the process that holds it, so never stale.

A lock file may be removed while nobody needs it; whoever opened it before then finds that the name has another file,
or none, and takes the lock anew. Where a file system knows no `flock`, or grants it twice (some network mounts), one
writer at a time is allowed, by a file that only one process can create; a dead writer's has to be removed by hand.

In an object store a lock is a lease (`remote.leases`), and there are none for readers.
"""

import errno
import fcntl
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from thresher.cache.commit import LOCK
from thresher.cache.errors import UserError
from thresher.cache.place import Place, local
from thresher.cache.publish import explained, make_directory
from thresher.cache.remote.leases import Lease, take
from thresher.cache.remote.place import ObjectPlace, refuse_unconditional

CREATE = LOCK
"""Held while a cache is planned, resumed or finished; also tells a cache in the making from a stranger's directory."""
READ = "read.lock"
"""Held shared by readers, and by writers for as long as they live, so that nobody prunes what they use."""
SOLE = "writer.lock"
"""Exists while a writer is at work where `flock` does not exclude."""

_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_POLL_SECONDS, _LEASE_POLL_SECONDS = 0.1, 1.0
_PROBED_SECONDS = 0.01
_PATIENCE_SECONDS = 1.0
"""Whoever only looks whether a lock is held (`is_held`) has it for microseconds; who has it longer keeps it."""


class Lock(Protocol):
    """A lock that is held until `release`."""

    fresh: bool
    """Whether nobody had this lock before."""

    def release(self) -> None:
        """Free the lock."""
        ...

    def remove(self) -> None:
        """Free the lock and leave nothing of it."""
        ...


@dataclass
class FileLock:
    """A lock on a file of a file system."""

    path: Path
    descriptor: int
    fresh: bool
    """Whether the file was new: nobody had this lock before."""

    def release(self) -> None:
        """Free the lock; its file stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def remove(self) -> None:
        """Free the lock and remove its file."""
        self.path.unlink(missing_ok=True)
        self.release()


def try_hold(path: Place, patience: float = 0.0) -> Lock | None:
    """The lock on `path`, or None when another holds it for `patience` seconds.

    Without patience another's `is_held` may be taken for a holder. Raises UserError where this user may not write.
    """
    if isinstance(path, ObjectPlace):
        return take(path)
    return _try_file(local(path, "a lock"), patience)


def _try_file(path: Path, patience: float) -> FileLock | None:
    end = time.monotonic() + patience
    while True:
        descriptor, fresh = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return FileLock(path, descriptor, fresh)
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            if time.monotonic() >= end:
                return None
            time.sleep(_PROBED_SECONDS)
            continue
        if _names(path, descriptor):
            return FileLock(path, descriptor, fresh)
        os.close(descriptor)


def share(path: Place) -> Lock | None:
    """A shared lock on a file that is there; None where it is not, or where locks are not to be had.

    Raises UserError when another keeps it exclusively, as only prune does.
    """
    if not isinstance(path, Path):
        return None
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= end:
                raise UserError(
                    f"cannot use the cache of {path}: it is being pruned by another process. Wait for it to end."
                ) from None
            time.sleep(_PROBED_SECONDS)
            continue
        except OSError:
            os.close(descriptor)
            return None
        if _names(path, descriptor):
            return FileLock(path, descriptor, False)
        os.close(descriptor)  # removed before it was locked


def is_held(path: Path) -> bool:
    """Whether somebody holds a lock, shared or not; asked without creating its file.

    `flock` tells that only by giving the lock, so whoever asks for it in that moment has to be patient. It is freed
    by name: closing would leave it with a child that another thread forks meanwhile.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def hold(path: Place, waiting: Callable[[], None]) -> Lock:
    """The lock on `path`, after waiting for whoever has it; `waiting` is called once if that takes time."""
    told = False
    while (lock := try_hold(path)) is None:
        if not told:
            waiting()
            told = True
        time.sleep(_POLL_SECONDS if isinstance(path, Path) else _LEASE_POLL_SECONDS)
    return lock


def excludes(lock: Lock) -> bool:
    """Whether a lock that is held keeps others out here, tried with a second descriptor.

    Raises UserError for an object store without conditional writes.
    """
    if isinstance(lock, Lease):
        refuse_unconditional(lock.path)
        return True
    assert isinstance(lock, FileLock)
    second = os.open(lock.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(second)
    return False


def sole_writer(root: Path) -> FileLock:
    """The right to be the only writer of a cache where `flock` does not exclude. Raises UserError when it is taken."""
    path = root / SOLE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise UserError(
            f"another process is writing the cache {root} (process {path.read_text() or 'unknown'}), and this file "
            f"system has no locks that would let several write at once. Wait for it to end, or, if it is dead, remove "
            f"{path}."
        ) from None
    except OSError as error:
        raise explained(error, path, 0) from error
    os.write(descriptor, f"{os.getpid()} on {platform.node()}".encode())
    return FileLock(path, descriptor, True)


def _open(path: Path) -> tuple[int, bool]:
    """Descriptor of the lock file, and whether it had to be created."""
    try:
        make_directory(path.parent)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), True
        except FileExistsError:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), False
    except OSError as error:
        raise explained(error, path, 0) from error


def _names(path: Path, descriptor: int) -> bool:
    """Whether the path still names the file that was opened."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
