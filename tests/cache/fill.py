"""A toy harvest: deterministic activations of made-up contexts, written into a cache.

Imported by the tests, and run as a script by those that kill it: it then serves commands, one JSON object a line, and
runs each in a forked child (so that Python and torch start once). A command may limit the size of files, or name the
how-many-th system call that makes data durable the child shall not survive.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from thresher.cache.contracts import Site, UserError
from thresher.cache.layout import Contexts
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


def open_writer(path: Path, **changes: object) -> CacheWriter:
    arguments = {"identity": IDENTITY, "sites": SITES, "contexts": CONTEXTS, "codec": "int8z", "seed": 3}
    return CacheWriter.open(path, **(arguments | changes))  # type: ignore[arg-type]


def fill(
    path: Path, batch: int = 7, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: object
) -> None:
    """Write, or go on writing, the whole toy cache with `batch` contexts a forward pass."""
    with open_writer(path, **changes) as writer:
        while (claimed := writer.claim()) is not None:
            shard = writer.shard(*claimed)
            for at in range(0, len(shard.contexts), batch):
                acts = activations(shard.split, shard.contexts[at : at + batch], dtype)
                shard.add({name: x_BTD.to(device) for name, x_BTD in acts.items()})
            shard.commit()
        writer.finalize()


def _die_at(call: int) -> None:
    """Let the process kill itself at the call-th fsync, rename, link or write from now."""
    left = [call]

    def counted(original):  # type: ignore[no-untyped-def]
        def wrapper(*arguments, **named):  # type: ignore[no-untyped-def]
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        return wrapper

    for name in ("write", "fsync", "rename", "link"):
        setattr(os, name, counted(getattr(os, name)))


def _child(command: dict[str, object]) -> str:
    """Run one command; the answer is "done", or the text of a UserError."""
    if "die_at" in command:
        _die_at(int(command.pop("die_at")))  # type: ignore[call-overload]
    if "file_bytes" in command:
        limit = int(command.pop("file_bytes"))  # type: ignore[call-overload]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        fill(Path(str(command.pop("path"))), **command)  # type: ignore[arg-type]
    except UserError as error:
        return f"UserError: {error}"
    return "done"


def serve() -> None:
    """Answer each line of stdin with one line: what the forked child said, or "killed"."""
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            answer = _child(json.loads(line)).encode()
            os.close(reader)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        print(json.dumps(answer.decode() or "killed"), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
