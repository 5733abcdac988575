"""Leases: who has the right to write something, where no kernel frees a lock with the process that held it.

A lease is an object that can be created once. It says who holds it and until when, and a thread of the holder moves
that on. It is taken over, by replacing the very version that was read, once it has run out, or at once when its holder
was a process of this machine and is dead. Clocks of different machines are compared here; but nothing rests on them:
whoever writes although the lease is another's by now writes the same bytes, or the commit record, which is created
once, tells that they differ.
"""

import json
import os
import secrets
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from thresher.cache.errors import UserError
from thresher.cache.remote.place import ObjectPlace

SECONDS = 60.0
"""A lease that was not moved on for so long has run out."""


class Lease:
    """A lease that is held until `release`; a `locks.Lock`. Use `take`."""

    def __init__(self, path: ObjectPlace, tag: dict[str, Any], identity: dict[str, Any], fresh: bool) -> None:
        self.path, self.fresh = path, fresh
        self._tag: dict[str, Any] | None = tag
        self._identity = identity
        self._turn = threading.Lock()
        _keeper.watch(self)

    @property
    def held(self) -> bool:
        """Whether it is ours still, as far as is known."""
        return self._tag is not None

    def renew(self) -> None:
        """Move its end on; noticed here if another took it over."""
        with self._turn:
            if self._tag is not None:
                self._tag = self.path.bucket.replace(self.path.key, _content(self._identity), self._tag)

    def release(self) -> None:
        """Give it up: its object is removed, if it is still ours."""
        _keeper.forget(self)
        with self._turn:
            tag, self._tag = self._tag, None
            if tag is None or os.getpid() != self._identity["process"]:
                return
            there = self.path.tagged()
            if there is not None and _read(there[0]).get("nonce") == self._identity["nonce"]:
                self.path.unlink()

    def remove(self) -> None:
        """The same as `release`: nothing stays."""
        self.release()


def take(path: ObjectPlace) -> Lease | None:
    """The lease at `path`, or None while another holds it."""
    identity = {**_this_process(), "nonce": secrets.token_hex(8)}
    bucket, content = path.bucket, _content(identity)
    tag = bucket.create(path.key, content)
    if tag is not None:
        return Lease(path, tag, identity, True)
    there = path.tagged()
    if there is None or not _free(_read(there[0])):
        return None
    tag = bucket.replace(path.key, content, {name: there[1].get(name) for name in ("e_tag", "version")})
    return None if tag is None else Lease(path, tag, identity, False)


class _Keeper:
    """The thread that moves all leases of a process on, as long as there are any."""

    def __init__(self) -> None:
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._process = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def watch(self, lease: Lease) -> None:
        """Renew a lease for as long as somebody refers to it."""
        with self._lock:
            if self._process != os.getpid():  # a child has the leases of its parent in memory, but not its threads
                self._process, self._thread = os.getpid(), None
                self._leases.clear()
            self._leases.add(lease)
            if self._thread is None:
                self._end = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._end,), name="thresher-leases", daemon=True
                )
                self._thread.start()

    def forget(self, lease: Lease) -> None:
        """Renew a lease no longer; the thread ends with the last one."""
        with self._lock:
            self._leases.discard(lease)
            thread = self._thread if not self._leases else None
            if thread is not None:
                self._end.set()
                self._thread = None
        if thread is not None:
            thread.join(timeout=1.0)

    def _run(self, end: threading.Event) -> None:
        while not end.wait(SECONDS / 4):
            with self._lock:
                leases = [lease for lease in self._leases if lease.held]
                if not leases:
                    if self._end is end:
                        self._thread = None
                    return
            for lease in leases:
                try:
                    lease.renew()
                except (UserError, OSError):
                    continue  # the writer meets the same store, and says so


_keeper = _Keeper()


def _content(identity: dict[str, Any]) -> bytes:
    return json.dumps({**identity, "until": time.time() + SECONDS}, sort_keys=True).encode()


def _read(content: bytes) -> dict[str, Any]:
    """What a lease says; {} of one that is no lease."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _free(said: dict[str, Any]) -> bool:
    """Whether a lease has run out, or its holder is known to be dead."""
    here = _this_process()
    if here["machine"] is not None and said.get("machine") == here["machine"]:
        process, born = said.get("process"), said.get("born")
        if isinstance(process, int) and born != _born(process):
            return True
    return not isinstance(said.get("until"), (int, float)) or said["until"] < time.time()


def _this_process() -> dict[str, Any]:
    """What others know this process by. `machine` names the kernel's run, and whose process numbers are seen."""
    try:
        machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = None
    return {"machine": machine, "process": os.getpid(), "born": _born(os.getpid())}


def _born(process: int) -> str | None:
    """When a process of this machine was started, in the kernel's ticks; None when it is gone, or a zombie."""
    try:
        facts = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if facts[0] in ("Z", "X") else facts[19]
