"""Files that appear whole or not at all.

A file is written under a temporary name in its own directory, flushed to the disk, renamed, and its directory is
flushed too: whoever sees the final name sees every byte, also after a crash. `exclusive` uses a hard link instead of a
rename, which fails when the name exists: that is how a record is published once.

Zarr's own local store renames but never flushes, so a power cut may leave a valid name with missing bytes.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from thresher.cache.contracts import UserError
from thresher.cache.layout import crc32c
from thresher.cache.records import canonical

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def publish(path: Path, pieces: Iterable[bytes | np.ndarray], *, exclusive: bool = False) -> None:
    """Write the pieces one after another to `path`, atomically and durably; parents are created.

    Raises FileExistsError if `exclusive` and the path exists, UserError when the disk is full or not writable.
    """
    views = [memoryview(_flat(piece)) for piece in pieces]
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        make_directory(path.parent)
        _write(temporary, views)
        try:
            if exclusive:
                os.link(temporary, path)
            else:
                os.rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_directory(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise explained(error, path, sum(map(len, views))) from error


def _flat(piece: bytes | np.ndarray) -> Any:
    """The piece as a buffer of bytes; nothing is copied."""
    return piece.reshape(-1).view(np.uint8).data if isinstance(piece, np.ndarray) else piece


def _write(path: Path, views: Iterable[memoryview]) -> None:
    """Create a file with the given bytes and flush it; on any failure it is removed again."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        try:
            for view in views:
                while view:
                    view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def make_directory(path: Path) -> None:
    """Create a directory and its parents, each durably entered in the one above."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    flush_directory(path.parent)


def flush_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explained(error: OSError, path: Path, needed: int) -> Exception:
    """The error in the user's terms where it is the user's to solve, else itself."""
    if error.errno in _NO_SPACE:
        return UserError(
            f"cannot write {path}: {error.strerror}. It needs {needed:,} bytes and {free_bytes(path):,} are free "
            f"there (a quota or a file-size limit may be lower). Everything committed before stays valid: make room, "
            f"then run the same command again and it goes on from there."
        )
    if error.errno in _DENIED:
        return UserError(
            f"cannot write {path}: {error.strerror}. Expected a directory that this user may write to; choose another "
            f"with --cache PATH, or change its permissions."
        )
    return error


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_json(path: Path, document: Mapping[str, Any], *, exclusive: bool = False) -> None:
    """Publish a JSON document in canonical form."""
    publish(path, [canonical(document)], exclusive=exclusive)


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a CRC32C over its canonical form."""
    return {**record, "self_crc32c": f"{crc32c(canonical(record)):08x}"}


def read_sealed(path: Path) -> dict[str, Any]:
    """A record written with `sealed`. Raises UserError, naming the file, when a bit of it is wrong."""
    try:
        record = json.loads(path.read_bytes())
        seal = record.pop("self_crc32c")
        good = seal == f"{crc32c(canonical(record)):08x}"
    except (ValueError, KeyError, AttributeError, UnicodeDecodeError):
        good = False
    if not good:
        raise UserError(
            f"{path} is damaged: its checksum does not match its content. Delete it and run harvest again to have it "
            f"written anew (for a commit record, MANIFEST.json has to go too), or restore it from a copy."
        )
    return dict(record)


def try_lock(path: Path) -> int | None:
    """Descriptor of an exclusive lock, or None when another process holds it. The kernel frees it with the process."""
    make_directory(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
