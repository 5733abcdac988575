"""What it costs a processor to store activations: GB (10⁹ bytes of bfloat16 taken) per CPU-second.

    python benchmarks/writer.py [--quick] [--dir FOLDER]

CPU-seconds are those of the whole process, background threads included. Activations are made beforehand, several
batches of them, so that none is still in the core's own cache when it is taken. Planning and packing are left out, and
so are the first two shards of a cache: memory fresh from the kernel is paid for once, and dearly on a virtual machine.

Writing goes through `CacheWriter`: permuting, encoding, measuring, checksums, fsync, commit records. `direct` goes past
the page cache, as the writer does by itself when a cache is large beside the host's memory. FOLDER has to lie on a real
disk with 14 GB to spare; what is written there is removed again.

Every pass times all lines one after another; shown are medians over the passes and the ratio to memcpy in the same
run. Only ratios carry to other machines.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from thresher.cache.buffers import Buffers
from thresher.cache.codec import Calibration
from thresher.cache.contracts import Site
from thresher.cache.host import HostEncoder
from thresher.cache.lane import Lane, Shelf
from thresher.cache.layout import Codec, Contexts, crc32c, raw_dtype
from thresher.cache.writer import CacheWriter

TOKENS, BATCH_CONTEXTS, BATCHES = 1024, 4, 6
SHARD_ROWS = 1 << 18
WARM_SHARDS = 2  # as many as are alive at a time: from then on no memory is fresh
SHARDS_PLANNED = 8  # fewer, and the layout would choose smaller shards


class Shape(NamedTuple):
    """What a cache of the benchmark holds."""

    width: int
    sites: int
    shards: int
    """How many are written."""

    @property
    def gigabytes(self) -> float:
        """Bfloat16 bytes of the shards written."""
        return 2e-9 * self.width * self.sites * self.shards * SHARD_ROWS


SHAPES = (Shape(768, 4, 3), Shape(128, 4, 3))
BARS = {"write bf16, direct": 2.5, "encode int8z": 1.5}
"""GB of bfloat16 taken per CPU-second, at the first shape."""


class Cost(NamedTuple):
    """One piece of work, timed."""

    gigabytes: float
    cpu_s: float
    wall_s: float


def timed(gigabytes: float, work: Callable[[], object]) -> Cost:
    """CPU and wall seconds of a piece of work."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Cost(gigabytes, time.process_time() - cpu, time.perf_counter() - wall)


def activations(shape: Shape, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Batches [b, T, d] by site, with dimensions of different scale and a massive first position."""
    generator, out = torch.Generator().manual_seed(0), []
    scale_D = torch.linspace(-2, 2, shape.width).exp()
    for _ in range(BATCHES):
        acts = {}
        for i in range(shape.sites):
            x_BTD = torch.randn(BATCH_CONTEXTS, TOKENS, shape.width, generator=generator) * scale_D + 1.0
            x_BTD[:, 0] *= 300.0
            acts[f"L{i:02d}.mlp_out"] = x_BTD.to(dtype)
        out.append(acts)
    return out


def sites(shape: Shape) -> tuple[Site, ...]:
    return tuple(Site(f"L{i:02d}.mlp_out", i, "mlp_out", shape.width) for i in range(shape.sites))


def cycled(batches: list[dict[str, torch.Tensor]], contexts: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batches again and again, until there were so many contexts."""
    for number, at in enumerate(range(0, contexts, BATCH_CONTEXTS)):
        batch = batches[number % len(batches)]
        yield {name: x_BTD[: contexts - at] for name, x_BTD in batch.items()}


def encode(shape: Shape, codec: Codec, batches: list[dict[str, torch.Tensor]]) -> Cost:
    """Encode one shard's rows into buffers that are there already."""
    all_sites, device = sites(shape), torch.device("cpu")
    dtype = raw_dtype("int8" if codec == "int8z" else "bfloat16")
    memory = Buffers()
    buffers = {site.name: memory.take((SHARD_ROWS, site.width), dtype) for site in all_sites}
    for array in buffers.values():
        array.fill(1)
    known = {}
    if codec == "int8z":
        buffers |= {f"{site.name}.scale": np.ones(SHARD_ROWS, np.float16) for site in all_sites}
        std_D = torch.linspace(-2, 2, shape.width).exp()
        known = {site.name: Calibration(torch.ones(shape.width), std_D) for site in all_sites}
    lane = Lane(np.arange(SHARD_ROWS), np.random.default_rng(0).permutation(SHARD_ROWS), all_sites)
    encoder = HostEncoder(Shelf(all_sites, buffers, known, device, _unexpected))
    rows = [{name: x_BTD.reshape(-1, shape.width) for name, x_BTD in acts.items()} for acts in batches]
    picked = np.flatnonzero(np.arange(BATCH_CONTEXTS * TOKENS) % TOKENS)
    encoder.add(lane, rows[0], picked[:8])  # compiles

    def run() -> None:
        number = 0
        while lane.done + len(picked) <= SHARD_ROWS:
            encoder.add(lane, rows[number % len(rows)], picked)
            number += 1

    before = lane.done
    cost = timed(0.0, run)
    return cost._replace(gigabytes=2e-9 * shape.width * shape.sites * (lane.done - before))


def _unexpected(site: str, lane: Lane, index: int) -> None:
    raise AssertionError(f"row {index} of {site} cannot be stored")


def write(folder: Path, shape: Shape, codec: Codec, direct: bool, batches: list[dict[str, torch.Tensor]]) -> Cost:
    """Fill shards of a cache, up to their commit records, once two others were."""
    contexts = SHARDS_PLANNED * SHARD_ROWS // (TOKENS - 1)
    keep = np.ones((contexts, TOKENS), np.uint8)
    keep[:, 0] = 2
    zeros = np.zeros((contexts, TOKENS), np.int32)
    path = Path(tempfile.mkdtemp(prefix="thresher-writer-", dir=folder))

    def fill(shards: range) -> None:
        for index in shards:
            shard = writer.shard("train", index)
            for acts in cycled(batches, len(shard.contexts)):
                shard.add(acts)
            shard.commit()
        writer.settle()

    try:
        writer = CacheWriter.open(
            path / "cache",
            identity={},
            sites=sites(shape),
            contexts={"train": Contexts(zeros, zeros, keep)},
            codec=codec,
            seed=0,
        )
        assert writer.plan.shard_rows == SHARD_ROWS
        writer.direct = direct
        fill(range(WARM_SHARDS))
        cost = timed(shape.gigabytes, lambda: fill(range(WARM_SHARDS, WARM_SHARDS + shape.shards)))
        writer.close()
        return cost
    finally:
        shutil.rmtree(path)


def checksum(shape: Shape) -> Cost:
    """CRC32C of a shard file of one site, chunk by chunk."""
    rows = np.ones((SHARD_ROWS, shape.width), np.uint16)
    return timed(rows.nbytes / 1e9, lambda: [crc32c(rows[at : at + 1024]) for at in range(0, len(rows), 1024)])


def memcpy(shape: Shape) -> Cost:
    """Copy a shard file of one site to memory that is there already."""
    rows, other = (np.ones((SHARD_ROWS, shape.width), np.uint16) for _ in range(2))
    return timed(rows.nbytes / 1e9, lambda: np.copyto(other, rows))


def measure(folder: Path, shape: Shape, passes: int, dtype: torch.dtype, table: Table) -> dict[str, float]:
    """Time all lines of one shape and add them to the table; GB per CPU-second by line."""
    batches = activations(shape, dtype)
    work: dict[str, Callable[[], Cost]] = {
        "memcpy": lambda: memcpy(shape),
        "CRC32C": lambda: checksum(shape),
        "encode bf16": lambda: encode(shape, "bf16", batches),
        "encode int8z": lambda: encode(shape, "int8z", batches),
        "write bf16, direct": lambda: write(folder, shape, "bf16", True, batches),
        "write bf16, buffered": lambda: write(folder, shape, "bf16", False, batches),
        "write int8z, direct": lambda: write(folder, shape, "int8z", True, batches),
        "write int8z, buffered": lambda: write(folder, shape, "int8z", False, batches),
        "write bf16-lz4, direct": lambda: write(folder, shape, "bf16-lz4", True, batches),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in work}
    for _ in range(passes):
        for name, function in work.items():
            costs[name].append(function())
    rates = {name: statistics.median(c.gigabytes / c.cpu_s for c in each) for name, each in costs.items()}
    kind = str(dtype).removeprefix("torch.")
    for name, each in costs.items():
        wall = statistics.median(c.gigabytes / c.wall_s for c in each)
        label = f"{shape.sites} × {shape.width}, {kind}" if name == "memcpy" else ""
        table.add_row(label, name, f"{rates[name]:.2f}", f"{rates[name] / rates['memcpy']:.2f}", f"{wall:.2f}")
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pass, bfloat16 activations 768 wide only")
    parser.add_argument("--dir", type=Path, default=None, help="folder on the disk to be written; default: a temporary")
    arguments = parser.parse_args()
    table = Table("activations", "work", "GB/CPU-s", "/ memcpy", "GB/s", title="Writing a cache")
    rates: dict[tuple[Shape, torch.dtype], dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        for dtype in (torch.bfloat16,) if arguments.quick else (torch.bfloat16, torch.float32):
            for shape in SHAPES[:1] if arguments.quick else SHAPES:
                passes = 1 if arguments.quick else 3
                rates[shape, dtype] = measure(Path(folder), shape, passes, dtype, table)
    console = Console()
    console.print(table)
    console.print(f"torch {torch.__version__}, numpy {np.__version__}")
    for name, bar in BARS.items():
        got = rates[SHAPES[0], torch.bfloat16][name]
        console.print(
            f"{name}, bfloat16 {SHAPES[0].width} wide: bar {bar} {'met' if got >= bar else 'missed'}, {got:.2f}"
        )


if __name__ == "__main__":
    main()
