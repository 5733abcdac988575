"""How fast a cache is read, as ratios to memcpy in the same run.

    python benchmarks/reader.py [--quick] [--folder PATH]

Rates are GB (10⁹ bytes as stored) per CPU-second of the whole process, threads included, medians over a few passes; the
column beside each is the ratio to memcpy of one batch, timed between the passes. Only ratios carry to other machines.

The cache is in the page cache, so the disk plays no part, but for the line past the page cache: there every file is
dropped from it first, and the rate over wall time is the disk's. Bars are checked and said at the end.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zarr
from rich.console import Console
from rich.table import Table

from thresher.cache import bfloat16
from thresher.cache.batches import Batches
from thresher.cache.contracts import Site
from thresher.cache.layout import Codec, Contexts
from thresher.cache.loading import Tier
from thresher.cache.reader import CacheReader
from thresher.cache.staging import stager
from thresher.cache.verify import faults, total_bytes
from thresher.cache.writer import CacheWriter

BATCH_ROWS, TOKENS = 4096, 256
PATTERNS = 64  # contexts of activations that are used again and again


class Shape(NamedTuple):
    """What a cache of the benchmark holds."""

    width: int
    arrays: int
    contexts: int


SHAPES = (Shape(768, 4, 280), Shape(128, 8, 600))


class Rate(NamedTuple):
    """Median of some passes."""

    gb_per_cpu_second: float
    gb_per_second: float
    memcpy_gb_per_cpu_second: float

    @property
    def ratio(self) -> float:
        return self.gb_per_cpu_second / self.memcpy_gb_per_cpu_second


def write_cache(path: Path, shape: Shape, codec: Codec) -> None:
    """Fill a cache with random activations."""
    keep = np.ones((shape.contexts, TOKENS), np.uint8)
    keep[:, 0] = 2
    zeros = np.zeros((shape.contexts, TOKENS), np.int32)
    sites = [Site(f"L{i:02d}.mlp_out", i, "mlp_out", shape.width) for i in range(shape.arrays)]
    generator = torch.Generator().manual_seed(0)
    acts = {s.name: torch.randn(PATTERNS, TOKENS, shape.width, generator=generator).to(torch.bfloat16) for s in sites}
    packed = {"train": Contexts(zeros, zeros, keep)}
    with CacheWriter.open(path, identity={}, sites=sites, contexts=packed, codec=codec, seed=0) as writer:
        while (claimed := writer.claim()) is not None:
            shard = writer.shard(*claimed)
            for at in range(0, len(shard.contexts), PATTERNS):
                shard.add({name: x[: len(shard.contexts) - at] for name, x in acts.items()})
            shard.commit()
        writer.finalize()


def rate(work: Callable[[], int], batch_bytes: int, passes: int, before: Callable[[], None] = lambda: None) -> Rate:
    """Median rates of `work`, which returns the bytes it moved, with memcpy of a batch timed between passes."""
    source, target = np.ones(batch_bytes, np.uint8), np.empty(batch_bytes, np.uint8)
    rates = []
    for _ in range(passes + 1):
        before()
        start = time.process_time()
        for _ in range(8):
            np.copyto(target, source)
        copied = 8 * batch_bytes / (time.process_time() - start)
        cpu, wall = time.process_time(), time.perf_counter()
        moved = work()
        rates.append((moved / (time.process_time() - cpu), moved / (time.perf_counter() - wall), copied))
    return Rate(*(statistics.median(column) / 1e9 for column in zip(*rates[1:], strict=True)))


def stage_pass(reader: CacheReader, count: int, *, fresh: bool, tier: Tier, decode: bool) -> int:
    """Make batches ready, in stored form or decoded to float32; `fresh` checks every chunk again."""
    settings: dict[str, Any] = {"dtype": torch.float32 if decode else torch.bfloat16, "tier": tier}
    source = CacheReader.open(reader.path) if fresh else reader
    if tier == "direct":
        settings["group_chunks"] = (
            16  # so that slots are used again in a cache of this size, as they are in a large one
        )
    loader = Batches(source, sites=list(reader.sites), batch_rows=BATCH_ROWS, seed=0, **settings)
    work = stager(loader.request._replace(end=count * BATCH_ROWS))
    for number in range(count):
        staged = work.batch(number * BATCH_ROWS)
        if decode:
            staged.finish()
    work.close()
    return count * batch_bytes(reader)


def batch_bytes(reader: CacheReader) -> int:
    """Stored bytes of one batch, without what says whence rows come."""
    specs = reader.arrays("train")
    return BATCH_ROWS * sum(spec.row_bytes for name, spec in specs.items() if name.startswith("L"))


def zarr_pass(reader: CacheReader, chunks: int) -> int:
    """Read whole chunks with zarr-python."""
    bfloat16.register()
    moved = 0
    for name in reader.sites:
        array: Any = zarr.open_array(str(reader.path / "train" / name), mode="r")
        for index in range(chunks):
            start = index * reader.chunk_rows
            moved += np.asarray(array[start : start + reader.chunk_rows]).nbytes
    return moved


def zarr_batch_pass(reader: CacheReader) -> int:
    """Read the rows of one training batch with zarr-python: what a shuffled batch costs without a reader of ours."""
    bfloat16.register()
    moved, rows = 0, np.sort(reader.order("train", 0, 64).rows(0, BATCH_ROWS))
    for name in reader.sites:
        array: Any = zarr.open_array(str(reader.path / "train" / name), mode="r")
        moved += np.asarray(array.oindex[rows]).nbytes
    return moved


def verify_pass(path: Path) -> int:
    """Check every byte."""
    assert faults(path) == []
    return total_bytes(path)


def forget(path: Path) -> None:
    """Drop the files of a cache from the page cache."""
    for file in path.rglob("c.*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def batches_per_second(reader: CacheReader, batches: int) -> float:
    """Batches through the prefetch threads, wall clock."""
    loader = Batches(reader, sites=list(reader.sites), batch_rows=BATCH_ROWS, seed=0)
    iterator = iter(loader)
    next(iterator)
    start = time.perf_counter()
    for _ in islice(iterator, batches):
        pass
    took = time.perf_counter() - start
    loader.close()
    return batches / took


def measure(folder: Path, shape: Shape, codec: Codec, passes: int, table: Table) -> dict[str, Rate]:
    """Write one cache, read it in every way, and add its rows to the table."""
    path = folder / f"{codec}-{shape.width}"
    write_cache(path, shape, codec)
    reader = CacheReader.open(path)
    size, count = batch_bytes(reader), reader.rows("train") // BATCH_ROWS
    warm: Tier = "unpacked" if codec == "bf16-lz4" else "mapped"
    work: dict[str, Callable[[], int]] = {
        "stage": lambda: stage_pass(reader, count, fresh=False, tier=warm, decode=False),
        "stage + first-touch CRC": lambda: stage_pass(reader, count, fresh=True, tier=warm, decode=False),
        "stage and decode to float32": lambda: stage_pass(reader, count, fresh=False, tier=warm, decode=True),
        "zarr-python, whole chunks": lambda: zarr_pass(reader, 16),
        "zarr-python, the same batch": lambda: zarr_batch_pass(reader),
        "verify": lambda: verify_pass(path),
    }
    if codec != "bf16-lz4":
        work["stage, cold, O_DIRECT + CRC"] = lambda: stage_pass(reader, count, fresh=True, tier="direct", decode=False)
    rates = {}
    for number, (what, function) in enumerate(work.items()):
        before = (lambda: forget(path)) if "cold" in what else (lambda: None)
        r = rates[what] = rate(function, size, passes, before)
        label = f"{codec}, {shape.arrays} × {shape.width}" if not number else ""
        cells = (f"{r.gb_per_cpu_second:.2f}", f"{r.ratio:.2f}", f"{r.gb_per_second:.2f}")
        table.add_row(label, what, *cells, "")
    per_second = batches_per_second(reader, 2 * count)
    table.add_row("", f"batches of {BATCH_ROWS} rows", "", "", f"{per_second * size / 1e9:.2f}", f"{per_second:.0f}")
    return rates


def staged_alike(folder: Path, passes: int) -> float:
    """Stored bytes of int8z staged per CPU-second over those of bf16, caches taking turns; a median over the turns."""
    readers = {codec: CacheReader.open(folder / f"{codec}-768") for codec in ("bf16", "int8z")}
    ratios = []
    for _ in range(2 * passes + 1):
        rates = {}
        for codec, reader in readers.items():
            count = 2 * (reader.rows("train") // BATCH_ROWS)  # into a second epoch, where rows are permuted
            start = time.process_time()
            moved = stage_pass(reader, count, fresh=False, tier="mapped", decode=False)
            rates[codec] = moved / (time.process_time() - start)
        ratios.append(rates["int8z"] / rates["bf16"])
    return statistics.median(ratios[1:])


def staged_beside_zarr(folder: Path, passes: int) -> float:
    """Bytes of raw bf16 staged per CPU-second over what zarr-python reads of whole chunks, taking turns; a median."""
    reader = CacheReader.open(folder / "bf16-768")
    count = reader.rows("train") // BATCH_ROWS
    ratios = []
    for _ in range(2 * passes + 1):
        rates = []
        for ours in (True, False):
            start = time.process_time()
            if ours:
                moved = stage_pass(reader, count, fresh=False, tier="mapped", decode=False)
            else:
                moved = zarr_pass(reader, 16)
            rates.append(moved / (time.process_time() - start))
        ratios.append(rates[0] / rates[1])
    return statistics.median(ratios[1:])


def bars(alike: float, beside: float, rates: dict[tuple[str, int], dict[str, Rate]]) -> list[tuple[str, float, float]]:
    """(what, measured, bar) of everything that is promised."""
    raw, packed = rates["bf16", 768], rates["int8z", 768]
    zarr_batch = raw["zarr-python, the same batch"].gb_per_cpu_second
    return [
        ("raw bf16 staged, of memcpy per CPU-second", raw["stage"].ratio, 0.45),
        ("raw bf16 staged, of zarr-python's whole chunks in the same turn", beside, 8),
        ("raw bf16 staged, of zarr-python's batches", raw["stage"].gb_per_cpu_second / zarr_batch, 8),
        ("int8z staged in stored bytes, of memcpy per CPU-second", packed["stage"].ratio, 0.45),
        ("int8z staged, of what raw bf16 reaches in the same turn", alike, 0.7),
        ("verify, GB per CPU-second", raw["verify"].gb_per_cpu_second, 5),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one pass each")
    parser.add_argument("--folder", type=Path, help="where the caches are written for a while")
    options = parser.parse_args(arguments)
    passes = 1 if options.quick else 5
    table = Table("cache", "work", "GB/CPU-s", "/ memcpy", "GB/s", "batches/s", title="Cache reading")
    rates = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for shape in SHAPES:
            for codec in ("bf16", "int8z", "bf16-lz4"):
                rates[codec, shape.width] = measure(Path(folder), shape, codec, passes, table)  # type: ignore[arg-type]
        alike, beside = staged_alike(Path(folder), passes), staged_beside_zarr(Path(folder), passes)
    console = Console()
    console.print(table)
    for what, got, bar in bars(alike, beside, rates):
        console.print(f"{'met ' if got >= bar else 'MISSED'} {what}: {got:.2f}, bar {bar}", highlight=False)
    console.print(f"torch {torch.__version__}, zarr {zarr.__version__}, {os.cpu_count()} CPUs", highlight=False)


if __name__ == "__main__":
    main()
