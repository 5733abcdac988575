"""How fast a cache is written, staged and decoded, as ratios to memcpy in the same run.

    python benchmarks/reader.py [--quick]

Rates are GB (10⁹ bytes as stored) per CPU-second of the process, medians over a few passes; the
column beside each is the ratio to memcpy of one batch, timed between the passes. Only ratios carry to other machines.
The cache is in the page cache, so the disk plays no part in reading; writing includes checksums, fsync and commit.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import zarr
from rich.console import Console
from rich.table import Table

from thresher.cache import bfloat16
from thresher.cache.batches import Batches, Stager
from thresher.cache.contracts import Site
from thresher.cache.layout import Codec, Contexts
from thresher.cache.reader import CacheReader
from thresher.cache.writer import CacheWriter

BATCH_ROWS, TOKENS = 4096, 256


class Shape(NamedTuple):
    """What a cache of the benchmark holds."""

    width: int
    arrays: int
    contexts: int
    dtype: torch.dtype


SHAPES = (Shape(768, 4, 280, torch.bfloat16), Shape(128, 8, 600, torch.float32))


class Rate(NamedTuple):
    """Median of some passes."""

    gb_per_cpu_second: float
    gb_per_second: float
    memcpy_gb_per_second: float


def write_cache(path: Path, shape: Shape, codec: Codec) -> tuple[float, float]:
    """Fill a cache with random activations; (CPU seconds, wall seconds) without making them."""
    keep = np.ones((shape.contexts, TOKENS), np.uint8)
    keep[:, 0] = 2
    zeros = np.zeros((shape.contexts, TOKENS), np.int32)
    sites = [Site(f"L{i:02d}.mlp_out", i, "mlp_out", shape.width) for i in range(shape.arrays)]
    generator = torch.Generator().manual_seed(0)
    pool = {s.name: torch.randn(8, TOKENS, shape.width, generator=generator).to(shape.dtype) for s in sites}
    cpu, wall = time.process_time(), time.perf_counter()
    packed = {"train": Contexts(zeros, zeros, keep)}
    with CacheWriter.open(path, identity={}, sites=sites, contexts=packed, codec=codec, seed=0) as writer:
        for split, index in writer.pending():
            shard = writer.shard(split, index)
            for at in range(0, len(shard.contexts), 8):
                shard.add({name: x[: len(shard.contexts) - at] for name, x in pool.items()})
            shard.commit()
        writer.finalize()
    return time.process_time() - cpu, time.perf_counter() - wall


def rate(work: Callable[[], int], batch_bytes: int, passes: int) -> Rate:
    """Median rates of `work`, which returns the bytes it moved, with memcpy of a batch timed between passes."""
    source, target = np.ones(batch_bytes, np.uint8), np.empty(batch_bytes, np.uint8)
    rates = []
    for _ in range(passes + 1):
        start = time.process_time()
        for _ in range(8):
            np.copyto(target, source)
        copied = 8 * batch_bytes / (time.process_time() - start)
        cpu, wall = time.process_time(), time.perf_counter()
        moved = work()
        rates.append((moved / (time.process_time() - cpu), moved / (time.perf_counter() - wall), copied))
    return Rate(*(statistics.median(column) / 1e9 for column in zip(*rates[1:], strict=True)))


def stage_pass(reader: CacheReader, batches: int, *, fresh: bool) -> int:
    """Stage batches in stored form, as the prefetch thread does; `fresh` checks every chunk again."""
    loader = Batches(reader, sites=list(reader.sites), batch_rows=BATCH_ROWS, seed=0)
    if fresh:
        loader.reader = CacheReader.open(reader.path)
    stager, moved = Stager(loader), 0
    for number in range(batches):
        staged = stager.batch(number * BATCH_ROWS)
        moved += sum(tensor.nbytes for tensor in staged.arrays.values())
        stager.free.append(staged.buffers)
    return moved


def decode_pass(reader: CacheReader, batches: int) -> int:
    """Stage and decode batches in this thread."""
    loader = Batches(reader, sites=list(reader.sites), batch_rows=BATCH_ROWS, seed=0)
    stager, moved = Stager(loader), 0
    for number in range(batches):
        staged = stager.batch(number * BATCH_ROWS)
        moved += sum(tensor.nbytes for tensor in staged.arrays.values())
        stager.release(staged, loader.decoded(staged))
    return moved


def zarr_pass(reader: CacheReader, chunks: int) -> int:
    """Read whole chunks with zarr-python."""
    bfloat16.register()
    moved = 0
    for name in reader.sites:
        array = zarr.open_array(str(reader.path / "train" / name), mode="r")
        for index in range(chunks):
            start = index * reader.plan.chunk_rows
            moved += np.asarray(array[start : start + reader.plan.chunk_rows]).nbytes
    return moved


def batches_per_second(reader: CacheReader, batches: int) -> float:
    """Batches through the prefetch thread, wall clock."""
    loader = Batches(reader, sites=list(reader.sites), batch_rows=BATCH_ROWS, seed=0)
    iterator = iter(loader)
    next(iterator)
    start = time.perf_counter()
    for _ in islice(iterator, batches):
        pass
    took = time.perf_counter() - start
    loader.close()
    return batches / took


def measure(folder: Path, shape: Shape, codec: Codec, passes: int, table: Table) -> None:
    """Write one cache, read it in every way, and add its rows to the table."""
    path = folder / f"{codec}-{shape.width}"
    cpu, wall = write_cache(path, shape, codec)
    reader = CacheReader.open(path)
    rows = reader.rows("train")
    payload = rows * shape.width * shape.arrays * shape.dtype.itemsize / 1e9
    label = f"{codec}, {shape.arrays} × {shape.width}"
    row_bytes = shape.width + 2 if codec == "int8z" else 2 * shape.width
    batch_bytes = BATCH_ROWS * shape.arrays * row_bytes
    count = rows // BATCH_ROWS
    work: dict[str, Callable[[], int]] = {
        "stage + first-touch CRC": lambda: stage_pass(reader, count, fresh=True),
        "stage": lambda: stage_pass(reader, count, fresh=False),
        "stage + decode to float32": lambda: decode_pass(reader, count),
        "zarr-python, whole chunks": lambda: zarr_pass(reader, 16),
    }
    name = str(shape.dtype).removeprefix("torch.")
    table.add_row(label, f"write (GB of {name} taken)", f"{payload / cpu:.2f}", "", f"{payload / wall:.2f}", "")
    for what, function in work.items():
        r = rate(function, batch_bytes, passes)
        ratio = r.gb_per_cpu_second / r.memcpy_gb_per_second
        table.add_row("", what, f"{r.gb_per_cpu_second:.2f}", f"{ratio:.2f}", f"{r.gb_per_second:.2f}", "")
    per_second = batches_per_second(reader, 2 * count)
    stored = per_second * batch_bytes / 1e9
    table.add_row("", f"batches of {BATCH_ROWS} rows, float32", "", "", f"{stored:.2f}", f"{per_second:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one pass each")
    passes = 1 if parser.parse_args().quick else 5
    table = Table("cache", "work", "GB/CPU-s", "/ memcpy", "GB/s", "batches/s", title="Cache throughput")
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            for codec in ("bf16", "int8z"):
                measure(Path(folder), shape, codec, passes, table)  # type: ignore[arg-type]
    console = Console()
    console.print(table)
    console.print(f"torch {torch.__version__}, zarr {zarr.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
