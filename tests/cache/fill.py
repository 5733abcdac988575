"""A toy harvest: deterministic activations of made-up contexts, written into a cache.

Imported by the tests, and run as a script by those that kill it: it then serves commands, one JSON list a line, and
runs each in a forked child (so that Python and torch start once). A command may limit the size of files, fill a small
disk, or name the how-many-th system call that makes data durable the child shall not survive.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.place import Place, place_at
from thresher.cache.remote.bucket import Bucket
from thresher.cache.writer import CacheWriter

SITES = (Site("L00.mlp_in", 0, "mlp_in", 24), Site("L00.mlp_out", 0, "mlp_out", 24), Site("blocks.1.x", 1, "x", 7))
IDENTITY = {"model": {"name": "toy", "dtype": "float32"}, "seed": 3, "sites": ["a", "b"]}


def toy_contexts(m: int, seed: int, t: int = 32) -> Contexts:
    """M packed contexts: position 0 special, some with padding at the end, two documents each."""
    generator = np.random.default_rng(seed)
    keep = np.ones((m, t), np.uint8)
    keep[:, 0] = 2
    keep[::5, t - 6 :] = 0
    document = 2 * np.arange(m)[:, None] + (np.arange(t) >= t // 2)
    token = generator.integers(0, 1000, (m, t))
    return Contexts(token.astype(np.int32), np.where(keep > 0, document, -1).astype(np.int32), keep)


CONTEXTS = {"train": toy_contexts(100, 0), "test": toy_contexts(20, 1), "validation": toy_contexts(3, 2)}


def activations(split: str, contexts: np.ndarray, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """[b, T, d] by site, from tokens and positions; dimensions differ in mean and scale, position 0 is massive."""
    packed, out = CONTEXTS[split], {}
    for i, site in enumerate(SITES):
        dims = np.arange(site.width)
        phase = (
            packed.token_id[contexts][..., None] * (0.37 + dims) + np.arange(packed.token_id.shape[1])[:, None] * 1.7
        )
        x = (np.sin(phase) + 0.3 * np.cos(3.1 * phase + i)) * (1 + dims % 5) + 10.0 * (dims == 3) - i
        x[:, 0] *= 200.0
        out[site.name] = torch.from_numpy(x.astype(np.float32)).to(dtype)
    return out


def open_writer(path: Place, **changes: object) -> CacheWriter:
    arguments = {"identity": IDENTITY, "sites": SITES, "contexts": CONTEXTS, "codec": "int8z", "seed": 3}
    return CacheWriter.open(path, **(arguments | changes))  # type: ignore[arg-type]


def fill(
    path: Place,
    batch: int = 7,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    begin: Callable[[int], None] = lambda count: None,
    **changes: object,
) -> None:
    """Write, or go on writing, the whole toy cache with `batch` contexts a forward pass.

    `begin` is called with the number of shards claimed before, whenever one is.
    """
    with open_writer(path, **changes) as writer:
        count = 0
        while (claimed := writer.claim()) is not None:
            begin(count)
            count += 1
            shard = writer.shard(*claimed)
            for at in range(0, len(shard.contexts), batch):
                acts = activations(shard.split, shard.contexts[at : at + batch], dtype)
                shard.add({name: x_BTD.to(device) for name, x_BTD in acts.items()})
            shard.commit()
        writer.finalize()


def fill_small(path: Place, **changes: object) -> None:
    """Two sites and one split of it, exactly: fewer files, where each costs requests."""
    few = Contexts(*(array[:40] for array in CONTEXTS["train"]))
    settings = {"batch": 20, "sites": SITES[1:], "contexts": {"train": few}, "codec": "bf16"}
    fill(path, **(settings | changes))  # type: ignore[arg-type]


def _counting(die_at: int) -> list[int]:
    """Count the calls of fsync, rename, link and write from now; let the process kill itself at number `die_at`."""
    calls = [0]

    def counted(original):  # type: ignore[no-untyped-def]
        def wrapper(*arguments, **named):  # type: ignore[no-untyped-def]
            calls[0] += 1
            if calls[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        return wrapper

    for name in ("write", "fsync", "rename", "link"):
        setattr(os, name, counted(getattr(os, name)))
    return calls


def _count_requests(die_at: int) -> list[int]:
    """Count what is written to object stores; the process kills itself instead of number `die_at`."""
    calls = [0]

    def counted(original):  # type: ignore[no-untyped-def]
        def wrapper(*arguments):  # type: ignore[no-untyped-def]
            calls[0] += 1
            if calls[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        return wrapper

    for name in ("put", "create"):
        setattr(Bucket, name, counted(getattr(Bucket, name)))
    return calls


def _hog(path: Path, after: int) -> Callable[[int], None]:
    """Take all that is left of a small disk once `after` shards were claimed before, but for 8 kB."""

    def begin(count: int) -> None:
        if count == after:
            with (path.parent / "hog").open("wb", buffering=0) as file, suppress(OSError):
                while shutil.disk_usage(path.parent).free > 8192:
                    file.write(bytes(4096))

    return begin


def _outlive(gate: tuple[int, int]) -> Callable[[int], None]:
    """Hold the second shard claimed until the first child is dead, however the scheduler treats the two."""
    reader, writer = gate
    os.close(writer)

    def begin(count: int) -> None:
        if count == 1:
            os.read(reader, 1)

    return begin


def digest(path: Path) -> str:
    """SHA-256 over names and contents of a cache's files, without locks."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix != ".lock":
            total.update(f"{file.relative_to(path)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _child(command: dict[str, object], gate: tuple[int, int]) -> str:
    """Run one command; the answer is "done", the number of calls, a digest, or the text of a UserError."""
    path = place_at(str(command.pop("path")))
    if not isinstance(path, Path):
        return _in_a_store(path, command)
    calls, count = _counting(int(command.pop("die_at", 0))), command.pop("count", False)  # type: ignore[call-overload]
    if "file_bytes" in command:
        limit = int(command.pop("file_bytes"))  # type: ignore[call-overload]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if command.pop("unhog", False):
        (path.parent / "hog").unlink()
    if "hog_after" in command:
        command["begin"] = _hog(path, int(command.pop("hog_after")))  # type: ignore[call-overload]
    if command.pop("outlive", False):
        command["begin"] = _outlive(gate)
    try:
        if command.pop("digest", False):
            return digest(path)
        fill(path, **command)  # type: ignore[arg-type]
    except UserError as error:
        return f"UserError: {error}"
    return str(calls[0]) if count else "done"


def _in_a_store(where: Place, command: dict[str, object]) -> str:
    """`_child` for a cache in an object store: it may die at a request that writes."""
    os.environ.update(command.pop("environment", {}))  # type: ignore[arg-type, call-overload]
    calls = _count_requests(int(command.pop("die_at", 0)))  # type: ignore[call-overload]
    try:
        fill_small(where, **command)
    except UserError as error:
        return f"UserError: {error}"
    return str(calls[0])


def _forked(command: dict[str, object], gate: tuple[int, int]) -> tuple[int, int]:
    """(process, pipe) of a child that runs the command. `gate` is a pipe, which ends when its writers are gone."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = _child(dict(command), gate).encode()
        os.close(reader)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(writer)
    return child, reader


def serve() -> None:
    """Answer each line of stdin, a list of commands that run at once, with the list of what the children said."""
    for line in sys.stdin:
        answers = []
        gate = os.pipe()
        children = [_forked(command, gate) for command in json.loads(line)]
        for end in gate:
            os.close(end)
        for child, reader in children:
            with os.fdopen(reader, "rb") as pipe:
                answers.append(pipe.read().decode() or "killed")
            os.waitpid(child, 0)
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
