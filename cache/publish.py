"""Files that appear whole or not at all.

A file is written under a temporary name in its own directory, flushed to the disk, renamed, and its directory is
flushed too: whoever sees the final name sees every byte, also after a crash. `exclusive` uses a hard link instead of a
rename, which fails when the name exists: that is how a record is published once. File systems without hard links have
a rename that fails alike. An object store has both by itself (`remote.place`).

`direct` writes large page-aligned pieces past the page cache (O_DIRECT). Buffered, the kernel copies every byte and
keeps it, at the expense of whatever was kept before: 3.3 GB per CPU-second against 34.

Zarr's own local store renames but never flushes, so a power cut may leave a valid name with missing bytes.
"""

import ctypes
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

from thresher.cache.errors import UserError
from thresher.cache.layout import crc32c
from thresher.cache.place import Place, local
from thresher.cache.records import canonical
from thresher.cache.remote.place import ObjectPlace

PAGE = 4096
_DIRECT_BYTES = 1 << 20  # smaller pieces gain nothing
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


class DiskFullError(UserError):
    """A file that does not fit: the disk, a quota or a file-size limit is reached."""

    def __init__(self, what: str, needed: int, free: int) -> None:
        """`what` could not be written and why, the bytes of the file, and those that are free without it."""
        self.reason = f"{what} A quota or a file-size limit may be lower than the {free:,} bytes that are free."
        missing = f": {needed - free:,} bytes are missing" if needed > free else ""
        super().__init__(
            f"{what} It needs {needed:,} bytes and {free:,} are free there{missing} (a quota or a file-size limit may "
            f"be lower). Everything committed before stays valid: make room, then run the same command again and it "
            f"goes on from there."
        )


def publish(
    place: Place, pieces: Iterable[bytes | np.ndarray], *, exclusive: bool = False, direct: bool = False
) -> None:
    """Write the pieces one after another to `place`, atomically and durably; parents are created.

    `direct` only asks: it is done where file system, address and size allow. Raises FileExistsError if `exclusive` and
    the place exists, UserError when the disk is full or not writable, or the store denies it.
    """
    views = [memoryview(_flat(piece)) for piece in pieces]
    if isinstance(place, ObjectPlace):
        place.put(views, exclusive=exclusive)
        return
    path = local(place, "writing")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        make_directory(path.parent)
        _write(temporary, views, direct)
        try:
            if exclusive:
                _move_exclusively(temporary, path)
            else:
                os.rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_directory(path.parent)
    except FileExistsError:
        flush_directory(path.parent)  # whoever goes on because the name is there needs it durable too
        raise
    except OSError as error:
        raise explained(error, path, sum(map(len, views))) from error


def _flat(piece: bytes | np.ndarray) -> Any:
    """The piece as a buffer of bytes; nothing is copied."""
    return piece.reshape(-1).view(np.uint8).data if isinstance(piece, np.ndarray) else piece


def _write(path: Path, views: Iterable[memoryview], direct: bool) -> None:
    """Create a file with the given bytes and flush it; on any failure it is removed again."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    direct = direct and hasattr(os, "O_DIRECT")
    try:
        try:
            offset = 0
            for view in views:
                if direct and offset % PAGE == 0 and len(view) >= _DIRECT_BYTES and _on_page(view):
                    view = view[_write_directly(descriptor, view) :]
                while view:
                    view = view[os.write(descriptor, view) :]
                offset = os.lseek(descriptor, 0, os.SEEK_CUR)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _on_page(view: memoryview) -> bool:
    return np.frombuffer(view, np.uint8).ctypes.data % PAGE == 0


def _write_directly(descriptor: int, view: memoryview) -> int:
    """Write whole pages past the page cache; the bytes written, few or none where the file system does not let us."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    done, whole = 0, len(view) // PAGE * PAGE
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done < whole and done % PAGE == 0:
            done += os.write(descriptor, view[done:whole])
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return done


def _move_exclusively(temporary: Path, path: Path) -> None:
    """Give a finished file its name. Raises FileExistsError when another has it."""
    try:
        os.link(temporary, path)
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if rename is not None:
        names = _AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(path)
        code = ctypes.get_errno() if rename(*names, _RENAME_NOREPLACE) else 0
    if code == 0:
        return
    if code not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code), str(path))
    raise UserError(
        f"cannot write {path}: its file system has neither hard links nor a rename that spares an existing file, so a "
        f"record cannot be kept from being written twice. Choose a place on another file system with --cache PATH."
    )


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
        return DiskFullError(f"cannot write {path}: {error.strerror}.", needed, free_bytes(path))
    if error.errno == errno.EIO:
        return UserError(
            f"cannot write {path}: {error.strerror}. The device failed, it is not full: look into the system's log and "
            f"choose a place on another device with --cache PATH. What was committed before is as good as the device."
        )
    if error.errno in _DENIED:
        return UserError(
            f"cannot write {path}: {error.strerror}. Expected a directory that this user may write to; choose another "
            f"with --cache PATH, or change its permissions."
        )
    return error


def free_bytes(place: Place) -> int:
    """Free bytes of the file system that holds a place or its nearest existing parent; an object store has no bound."""
    if not isinstance(place, Path):
        return 1 << 62
    path = place
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_json(path: Place, document: Mapping[str, Any], *, exclusive: bool = False) -> None:
    """Publish a JSON document in canonical form."""
    publish(path, [canonical(document)], exclusive=exclusive)


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a CRC32C over its canonical form."""
    return {**record, "self_crc32c": f"{crc32c(canonical(record)):08x}"}


def read_sealed(path: Place) -> dict[str, Any]:
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
