"""Chunks that stay on this machine for later epochs, within a bound, in memory or in a directory.

An epoch reads every chunk once, in a new random order. So what came first stays: to make room for a chunk by giving up
one that is sure to be wanted, as LRU does, only lowers the share that is found. What goes is what other caches left,
the longest unused first, and only what was not used since this process began, so that two trainings do not drive out
each other's chunks. Nothing is trusted here: whoever asks compares checksums, and tells when they differ (`discard`).

A directory may serve several processes: files appear whole, and a lock guards the count of bytes. A disk that is full
or broken is no error, only slower: nothing more is kept then.
"""

import fcntl
import hashlib
import os
import secrets
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from thresher.cache.remote.settings import Reading


class Keep(Protocol):
    """Where chunks stay. Threads may share it."""

    def get(self, key: str) -> bytes | None:
        """What was kept under a key, if it still is; its checksum is the caller's affair."""
        ...

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Keep something, if there is room."""
        ...

    def discard(self, key: str) -> None:
        """Give up what proved damaged."""
        ...


def kept(reading: Reading, cache: str) -> Keep | None:
    """Where the chunks of a cache with this fingerprint stay; all that is in memory has one bound together."""
    limit = reading.keep_bytes
    if not limit:
        return None
    if reading.keep_in is not None:
        return DiskKeep(reading.keep_in, cache, limit)
    with _making:
        keep = _in_memory.get("one")
        if keep is None:
            keep = _in_memory["one"] = MemoryKeep(limit)
        return keep


class MemoryKeep:
    """Chunks in the memory of this process."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._bytes, self._lock = limit, dict[str, bytes](), 0, threading.Lock()

    def get(self, key: str) -> bytes | None:
        return self._held.get(key)

    def put(self, key: str, data: bytes | memoryview) -> None:
        with self._lock:
            if key in self._held or self._bytes + len(data) > self._limit:
                return
            self._bytes += len(data)
            self._held[key] = bytes(data)

    def discard(self, key: str) -> None:
        with self._lock:
            self._bytes -= len(self._held.pop(key, b""))


class DiskKeep:
    """Chunks as files of a directory, those of each cache in a folder of its own."""

    def __init__(self, folder: Path, cache: str, limit: int) -> None:
        """`cache` tells the chunks of one cache from another's: its fingerprint."""
        self._root, self._limit, self._began = folder, limit, time.time()
        self._own = folder / hashlib.sha256(cache.encode()).hexdigest()[:16]
        self._works = True
        self._threads = threading.Lock()
        with suppress(OSError):
            self._own.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, key: str, data: bytes | memoryview) -> None:
        path = self._path(key)
        if not self._works or len(data) > self._limit or path.exists():
            return
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            if not self._reserve(len(data)):
                return
            temporary.write_bytes(data)
            os.rename(temporary, path)
        except OSError:
            self._works = False
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def discard(self, key: str) -> None:
        with suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self._own / hashlib.sha256(key.encode()).hexdigest()[:32]

    def _reserve(self, size: int) -> bool:
        """Count so many bytes in, making room for them if need be; False where there is none."""
        with self._counting() as count:
            total = _as_number(count.read_bytes())
            if total is None or total + size > self._limit:
                total = self._make_room(size)
            if total + size > self._limit:
                count.write_bytes(str(total).encode())
                return False
            count.write_bytes(str(total + size).encode())
            return True

    @contextmanager
    def _counting(self) -> Iterator[Path]:
        """The file with the bytes that are kept in all, for one process and thread at a time."""
        count = self._root / "bytes"
        with self._threads, (self._root / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            count.touch()
            yield count

    def _make_room(self, size: int) -> int:
        """Remove what other caches left, until there is room, or nothing more to remove; the bytes that stay."""
        files = []
        for file in self._root.glob("*/*"):
            with suppress(OSError):
                facts = file.stat()
                files.append((facts.st_mtime, facts.st_size, file))
        total = sum(each[1] for each in files)
        for used, length, file in sorted(files):
            if total + size <= self._limit:
                break
            if used < self._began and (file.parent != self._own or file.suffix == ".tmp"):
                file.unlink(missing_ok=True)
                total -= length
        return total


_in_memory: weakref.WeakValueDictionary[str, MemoryKeep] = weakref.WeakValueDictionary()
"""The one of this process, for as long as a reader has it."""
_making = threading.Lock()


def _as_number(text: bytes) -> int | None:
    return int(text) if text.isdigit() else None
