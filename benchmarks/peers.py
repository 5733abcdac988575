"""What a loader delivers after a fault: our cache beside other ways to store activations.

Each store takes the same activations in twelve pieces, as a harvest would hand them over, with a pause between pieces
in which the model would compute. Then one fault strikes: the writer is killed, the disk is full, a bit flips, a file
loses its end, a piece is lost, two pieces change places, another model's activations lie where these are expected. A
loader opens what is there and asks for all rows. What it delivers is compared with the activations, element by element:

- silent: rows came without any error, and they are not the activations: zeros, fewer rows, or others;
- refused: an error, and what is there is lost or has to be put right by hand;
- recovered: nothing false was delivered, and running the writer again (after deleting the commit records that the error
  or `verify` named) ended in the activations, without starting over;
- whole: the fault changed nothing.

Peers are used as their documentation and the common loaders use them, and get what they offer: HDF5 goes on where its
data set ends, a folder of safetensors skips the pieces whose files exist. All faults come from seeds; only the exact
moment of a kill is the clock's. Every writer and loader is a child process, since some of them die by a signal.

    pip install h5py                # no dependency of ours; a peer that is not installed is skipped
    python benchmarks/peers.py      # about six minutes; --trials 3 for two

A full disk is a tmpfs on which something else takes the room after a few pieces; `unshare -Urm` has to be allowed for
that, and the column stays empty where it is not.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

PIECES, ROWS, WIDTH, TOKENS = 12, 16384, 64, 256
TOTAL = PIECES * ROWS
PAUSE = 0.01  # seconds between pieces
BALLAST = "ballast"
KILLED = f"exit code {-signal.SIGKILL}"
FAULTS = ("kill -9", "disk full", "bit flip", "truncated", "piece lost", "pieces swapped", "other model")


def activations(model: int) -> np.ndarray:
    """[TOTAL, WIDTH] float16: whole numbers that bfloat16 holds exactly too, none of them zero."""
    generator = np.random.default_rng(model)
    sign = generator.integers(0, 2, (TOTAL, WIDTH)) * 2 - 1
    return (sign * generator.integers(1, 128, (TOTAL, WIDTH))).astype(np.float16)


class Store(Protocol):
    """One way to store activations."""

    name: str
    needs: str
    """Module that has to be installed."""

    def write(self, folder: Path, rows: np.ndarray, model: int, done: Callable[[], None]) -> None:
        """Write, or go on writing, the activations [TOTAL, WIDTH] of a model; calls `done` after each piece."""
        ...

    def read(self, folder: Path) -> np.ndarray:
        """[n, WIDTH] all rows that the store delivers, in the order of `activations`."""
        ...

    def pieces(self, folder: Path) -> list[Path]:
        """Files that hold activations, in order."""
        ...

    def mend(self, folder: Path, error: str) -> None:
        """Do what the error asks for, before the writer runs again."""
        ...


class Peer:
    """What the peers share: nothing tells how to mend them."""

    needs = "numpy"

    def mend(self, folder: Path, error: str) -> None:
        return None


class Hdf5(Peer):
    """One data set that grows piece by piece; with `care`, flushed after each and with checksums."""

    needs = "h5py"

    def __init__(self, care: bool) -> None:
        self.care, self.name = care, "HDF5, flush and fletcher32" if care else "HDF5"

    def write(self, folder: Path, rows: np.ndarray, model: int, done: Callable[[], None]) -> None:
        import h5py

        with h5py.File(folder / "acts.h5", "a") as file:
            if "acts" not in file:
                kinds = {"maxshape": (None, WIDTH), "chunks": (1024, WIDTH), "fletcher32": self.care}
                file.create_dataset("acts", (0, WIDTH), "f2", **kinds)
            data = file["acts"]
            for i in range(len(data) // ROWS, PIECES):
                time.sleep(PAUSE)
                data.resize((i + 1) * ROWS, axis=0)
                data[i * ROWS :] = rows[i * ROWS : (i + 1) * ROWS]
                if self.care:
                    file.flush()
                done()

    def read(self, folder: Path) -> np.ndarray:
        import h5py

        with h5py.File(folder / "acts.h5") as file:
            return np.asarray(file["acts"][:])

    def pieces(self, folder: Path) -> list[Path]:
        return [folder / "acts.h5"]


class Safetensors(Peer):
    """A folder with one file a piece, read by glob; a piece whose file exists is not written again."""

    name, needs = "safetensors + glob", "safetensors"

    def write(self, folder: Path, rows: np.ndarray, model: int, done: Callable[[], None]) -> None:
        from safetensors.numpy import save_file

        for i in range(PIECES):
            path = folder / f"{i:05d}.safetensors"
            if not path.exists():
                time.sleep(PAUSE)
                save_file({"acts": rows[i * ROWS : (i + 1) * ROWS]}, path)
                done()

    def read(self, folder: Path) -> np.ndarray:
        from safetensors.numpy import load_file

        return np.concatenate([load_file(path)["acts"] for path in self.pieces(folder)])

    def pieces(self, folder: Path) -> list[Path]:
        return sorted(folder.glob("*.safetensors"))


class Memmap(Peer):
    """One flat file of planned size; the loader takes the number of rows from the file's size."""

    name = "np.memmap"

    def write(self, folder: Path, rows: np.ndarray, model: int, done: Callable[[], None]) -> None:
        data = np.memmap(folder / "acts.bin", np.float16, "w+", shape=rows.shape)
        for i in range(PIECES):
            time.sleep(PAUSE)
            data[i * ROWS : (i + 1) * ROWS] = rows[i * ROWS : (i + 1) * ROWS]
            done()
        data.flush()

    def read(self, folder: Path) -> np.ndarray:
        return np.array(np.memmap(folder / "acts.bin", np.float16, "r").reshape(-1, WIDTH))

    def pieces(self, folder: Path) -> list[Path]:
        return [folder / "acts.bin"]


class Zarr(Peer):
    """zarr-python: an array of planned size, one chunk a piece; nothing records which were written."""

    needs = "zarr"

    def __init__(self, checksum: bool) -> None:
        self.checksum, self.name = checksum, "zarr-python, crc32c" if checksum else "zarr-python"

    def write(self, folder: Path, rows: np.ndarray, model: int, done: Callable[[], None]) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec

        array = zarr.create_array(
            str(folder / "acts.zarr"),
            shape=rows.shape,
            chunks=(ROWS, WIDTH),
            dtype="float16",
            compressors=[Crc32cCodec()] if self.checksum else None,
            overwrite=True,
        )
        for i in range(PIECES):
            time.sleep(PAUSE)
            array[i * ROWS : (i + 1) * ROWS] = rows[i * ROWS : (i + 1) * ROWS]
            done()

    def read(self, folder: Path) -> np.ndarray:
        import zarr

        return np.asarray(zarr.open_array(str(folder / "acts.zarr"), mode="r")[:])

    def pieces(self, folder: Path) -> list[Path]:
        files = (folder / "acts.zarr" / "c").rglob("*")
        return sorted((f for f in files if f.is_file()), key=lambda f: int(f.parent.name))


class Thresher:
    """Our cache, codec bf16: a piece is a shard."""

    name, needs, site = "Thresher", "torch", "L00.mlp_out"

    def write(self, folder: Path, rows: np.ndarray, model: int, done: Callable[[], None]) -> None:
        import torch

        from thresher.cache.contracts import Site
        from thresher.cache.layout import Contexts
        from thresher.cache.writer import CacheWriter

        torch.set_num_threads(1)
        acts = torch.from_numpy(rows).to(torch.bfloat16).reshape(-1, TOKENS, WIDTH)
        ids = np.arange(TOTAL, dtype=np.int32).reshape(-1, TOKENS)
        packed = {"train": Contexts(ids, ids // TOKENS, np.ones(ids.shape, np.uint8))}
        site = Site(self.site, 0, "mlp_out", WIDTH)
        with CacheWriter.open(
            folder / "c.zarr", identity=_identity(model), sites=[site], contexts=packed, codec="bf16", seed=0
        ) as writer:
            while (claimed := writer.claim()) is not None:
                time.sleep(PAUSE)
                shard = writer.shard(*claimed)
                shard.add({self.site: acts[torch.from_numpy(shard.contexts).long()]})
                shard.commit()
                done()
            writer.finalize()

    def read(self, folder: Path) -> np.ndarray:
        from thresher.cache.reader import CacheReader

        reader = CacheReader.open(folder / "c.zarr", identity=_identity(0))
        rows = reader.gather("train", self.site, np.arange(reader.rows("train"))).numpy()
        at = reader.provenance("train")
        out = np.zeros((TOTAL, WIDTH), np.float16)
        out[at.context.astype(np.int64) * TOKENS + at.position] = rows
        return out if len(rows) == TOTAL else out[: len(rows)]

    def pieces(self, folder: Path) -> list[Path]:
        files = (folder / "c.zarr" / "train" / self.site).glob("c.*")
        return sorted(files, key=lambda f: int(f.name.split(".")[1]))

    def mend(self, folder: Path, error: str) -> None:
        """Delete the commit records of the shards that the refusal or `verify` names, and the manifest."""
        from thresher.cache.errors import UserError
        from thresher.cache.reader import CacheReader

        cache = folder / "c.zarr"
        with contextlib.suppress(UserError):
            error = "\n".join(CacheReader.open(cache).verify())
        named = set(re.findall(r"train/[^/\s]+/c\.(\d+)", error))
        for index in named:
            (cache / "commits" / f"train.{index}.json").unlink()
        if named:
            (cache / "MANIFEST.json").unlink()


def _identity(model: int) -> dict[str, Any]:
    return {"model": {"name": "toy", "weights": f"{model:08x}"}}


STORES: tuple[Store, ...] = (
    Hdf5(care=False),
    Hdf5(care=True),
    Safetensors(),
    Memmap(),
    Zarr(checksum=False),
    Zarr(checksum=True),
    Thresher(),
)


# Every call on a store happens in a child, which a signal may end.


class Full(NamedTuple):
    """When a disk fills up."""

    after: int
    """Pieces."""
    left: int
    """Bytes that stay free."""


def fill_disk(folder: Path, left: int) -> None:
    """Take all room but `left` bytes, as a neighbour's job might."""
    with (folder / BALLAST).open("wb") as file, contextlib.suppress(OSError):
        while (more := min(shutil.disk_usage(folder).free - left, ROWS)) > 0:
            os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), more)


class Outcome(NamedTuple):
    """How a child ended."""

    value: str = ""
    """What it returned."""
    error: str = ""
    """Its error or the signal that ended it; empty when it returned."""
    pieces: int = 0
    """Pieces it wrote."""
    seconds: float = 0.0
    """From its first word to its last."""


def _answer(call: Callable[[], str | None], pipe: Connection) -> None:
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
        try:
            pipe.send(Outcome(value=call() or ""))
        except Exception as error:
            pipe.send(Outcome(error=f"{type(error).__name__}: {error}"))


def _write(number: int, folder: Path, model: int, full: Full | None, pipe: Connection) -> None:
    rows, pieces = activations(model), 0

    def done() -> None:
        nonlocal pieces
        pieces += 1
        pipe.send("piece")
        if full is not None and pieces == full.after:
            fill_disk(folder, full.left)

    pipe.send("started")
    _answer(lambda: STORES[number].write(folder, rows, model, done), pipe)


def _read(number: int, folder: Path, pipe: Connection) -> None:
    pipe.send("started")
    _answer(lambda: compare(STORES[number].read(folder), activations(0)), pipe)


def _mend(number: int, folder: Path, error: str, pipe: Connection) -> None:
    pipe.send("started")
    _answer(lambda: STORES[number].mend(folder, error), pipe)


def compare(rows: np.ndarray, truth: np.ndarray) -> str:
    """Name what was delivered: the activations ("whole"), fewer rows, zeros in places, or other numbers."""
    if len(rows) < len(truth):
        return "short"
    if np.array_equal(rows, truth):
        return "whole"
    wrong = rows[(rows != truth).any(1)]
    return "zeros" if not wrong.any() else "wrong"


class Children:
    """Starts children from a server that has the libraries loaded, so that each takes milliseconds."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        wanted = ("torch", "zarr", "h5py", "safetensors.numpy", "thresher.cache.writer", "thresher.cache.reader")
        self.context.set_forkserver_preload([name for name in wanted if _installed(name.split(".")[0])])

    def run(self, target: Callable[..., None], *arguments: Any, kill_after: float | None = None) -> Outcome:
        """Run a child to its end, or kill it so many seconds after its first word."""
        mine, theirs = self.context.Pipe(duplex=False)
        child = self.context.Process(target=target, args=(*arguments, theirs))
        child.start()
        theirs.close()
        said, pieces, start = mine.recv(), 0, time.perf_counter()
        if kill_after is not None:
            time.sleep(kill_after)
            child.kill()
        with contextlib.suppress(EOFError):
            while not isinstance(said, Outcome):
                said = mine.recv()
                pieces += said == "piece"
        seconds = time.perf_counter() - start
        child.join()
        if not isinstance(said, Outcome):
            said = Outcome(error=f"exit code {child.exitcode}")
        return said._replace(pieces=pieces, seconds=seconds)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# The faults. Each takes a folder with a finished store and damages it; False where the store has no such thing.


def flip(store: Store, folder: Path, chance: random.Random) -> bool:
    """One bit, anywhere in the files that hold activations."""
    file = chance.choice(store.pieces(folder))
    with file.open("r+b") as data:
        data.seek(chance.randrange(file.stat().st_size))
        value = data.read(1)[0] ^ (1 << chance.randrange(8))
        data.seek(-1, os.SEEK_CUR)
        data.write(bytes([value]))
    return True


def truncate(store: Store, folder: Path, chance: random.Random) -> bool:
    """A file ends at an earlier block of 4096 bytes, as a broken copy does."""
    file = chance.choice(store.pieces(folder))
    os.truncate(file, 4096 * chance.randrange(1, file.stat().st_size // 4096))
    return True


def lose(store: Store, folder: Path, chance: random.Random) -> bool:
    """A file is gone."""
    chance.choice(store.pieces(folder)).unlink()
    return True


def swap(store: Store, folder: Path, chance: random.Random) -> bool:
    """Two files have changed places."""
    pieces = store.pieces(folder)
    if len(pieces) < 2:
        return False
    one, two = chance.sample(pieces, 2)
    aside = folder / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    return True


DAMAGES = {"bit flip": flip, "truncated": truncate, "piece lost": lose, "pieces swapped": swap}


class Bench:
    """Strikes one store with every fault and judges what comes of it."""

    def __init__(self, children: Children, number: int, trials: int, folder: Path) -> None:
        self.children, self.number, self.trials, self.folder = children, number, trials, folder
        self.store = STORES[number]

    def judge(self, folder: Path, finished: int) -> str:
        """The verdict on what lies in `folder` after a fault, when so many pieces had been written before it.

        The last of these may still have been on its way to the disk: to write that one again is no loss.
        """
        got = self.children.run(_read, self.number, folder)
        if not got.error and got.value != "whole":
            return f"silent {got.value}"
        self.children.run(_mend, self.number, folder, got.error)
        again = self._write(folder)
        if again.error or self.children.run(_read, self.number, folder).value != "whole":
            return "refused"
        if not got.error:
            return "whole"
        return "refused" if finished > 1 and again.pieces == PIECES else "recovered"

    def killed(self, chance: random.Random) -> Iterator[str]:
        """Kill writers at moments drawn uniformly from the time that one takes."""
        whole = [self._write(self._fresh("whole")) for _ in range(3)]
        took, struck = statistics.median(w.seconds for w in whole), 0
        while struck < self.trials:
            path = self._fresh("killed")
            died = self._write(path, kill_after=chance.uniform(0, took))
            if died.error == KILLED:
                struck += 1
                yield self.judge(path, died.pieces)

    def damaged(self, fault: str, chance: random.Random) -> Iterator[str]:
        """Damage copies of a finished store."""
        whole = self._fresh("whole")
        assert not self._write(whole).error
        assert self.children.run(_read, self.number, whole).value == "whole"
        for _ in range(self.trials):
            path = self.folder / "copy"
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(whole, path)
            if not DAMAGES[fault](self.store, path, chance):
                return
            yield self.judge(path, PIECES)

    def other_model(self) -> Iterator[str]:
        """A finished store of another model, read as this one's. Nothing to mend: one refuses it or not."""
        path = self._fresh("other")
        assert not self._write(path, model=1).error
        got = self.children.run(_read, self.number, path)
        yield "refused" if got.error else f"silent {got.value}"

    def full(self, chance: random.Random) -> Iterator[str]:
        """The disk fills up between two pieces; then there is room again."""
        piece = ROWS * WIDTH * 2
        for _ in range(self.trials):
            path = self._fresh("full")
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * PIECES * piece}", "tmpfs", str(path)], check=True)
            full = Full(chance.randrange(1, PIECES - 1), chance.randrange(2 * piece))
            written = self._write(path, full=full).pieces
            got = self.children.run(_read, self.number, path)
            (path / BALLAST).unlink()
            yield f"silent {got.value}" if not got.error else self.judge(path, written)
            subprocess.run(["umount", str(path)], check=True)

    def _write(
        self, path: Path, *, model: int = 0, full: Full | None = None, kill_after: float | None = None
    ) -> Outcome:
        return self.children.run(_write, self.number, path, model, full, kill_after=kill_after)

    def _fresh(self, name: str) -> Path:
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def verdicts(fault: str, bench: Bench) -> Counter[str]:
    """Verdicts of one store under one fault."""
    chance = random.Random(f"{fault}, {bench.store.name}")
    if fault == "kill -9":
        return Counter(bench.killed(chance))
    if fault == "disk full":
        return Counter(bench.full(chance))
    if fault == "other model":
        return Counter(bench.other_model())
    return Counter(bench.damaged(fault, chance))


def measure(trials: int, faults: list[str], folder: Path) -> dict[str, dict[str, Counter[str]]]:
    """Verdicts by store and fault."""
    children, out = Children(), {}
    for number, store in enumerate(STORES):
        if not _installed(store.needs):
            print(f"{store.name} is skipped: {store.needs} is not installed", file=sys.stderr)
            continue
        bench = Bench(children, number, trials, folder / str(number))
        out[store.name] = {fault: verdicts(fault, bench) for fault in faults}
        shutil.rmtree(bench.folder, ignore_errors=True)
    return out


def on_small_disks(trials: int) -> dict[str, dict[str, Counter[str]]]:
    """The verdicts on full disks, from this script run where it may mount; {} where that is not allowed."""
    alone = ["unshare", "-Urm"]
    with contextlib.suppress(OSError):
        if subprocess.run([*alone, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0:
            command = [*alone, sys.executable, __file__, "--inside", "--trials", str(trials)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            return {store: {k: Counter(v) for k, v in row.items()} for store, row in json.loads(answer).items()}
    print("no full disks: `unshare -Urm` with a tmpfs is not allowed here", file=sys.stderr)
    return {}


def cell(counts: Counter[str]) -> str:
    """Verdicts with their counts, most frequent first."""
    return ", ".join(f"{verdict} {count}" for verdict, count in counts.most_common()) or "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10, help="of each fault and store")
    parser.add_argument(
        "--inside", action="store_true", help="full disks only, as JSON; what the script calls itself with"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if arguments.inside:
            print(json.dumps(measure(arguments.trials, ["disk full"], Path(name))))
            return
        rest = measure(arguments.trials, [fault for fault in FAULTS if fault != "disk full"], Path(name))
    full = on_small_disks(arguments.trials)
    print(f"| {arguments.trials} trials each | " + " | ".join(FAULTS) + " |")
    print("|---" * (1 + len(FAULTS)) + "|")
    for store, row in rest.items():
        row |= full.get(store, {})
        print(f"| {store} | " + " | ".join(cell(row.get(fault, Counter())) for fault in FAULTS) + " |")
    versions = {
        m: importlib.import_module(m).__version__ for m in ("numpy", "zarr", "h5py", "safetensors") if _installed(m)
    }
    print(", ".join(f"{name} {version}" for name, version in versions.items()))


if __name__ == "__main__":
    main()
