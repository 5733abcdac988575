"""What a cache costs in bytes and time, and whether it pays against running the model again.

    bytes       N · (Σ_sites (d + 2 for int8z, 2d for bf16) + 17) + 9 · tokens + 16 P · shards
    t_disk      bytes / w, with w measured where the cache is to lie
    t_fwd       tokens / the measured rate of the target's body
    t_harvest   max(t_disk, t_fwd): encoding and writing go on beside the passes
    break-even  t_harvest / t_fwd passes over the rows, as long as reading a pass takes less than computing it

A cache pays when training makes more passes than that: for sweeps with several streams, several epochs, or a disk that
is no slower than the model. For one pass over one stream it never does, and the live mode is the better choice.
"""

import dataclasses
import errno
import fcntl
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.filesize import decimal

from thresher.cache.contracts import Site
from thresher.cache.layout import Codec, Store, estimate_bytes, row_sizes
from thresher.cache.plan import Plan, SplitPlan
from thresher.cache.publish import explained

SLACK = 1.02
"""Of the estimate: metadata, indices, blocks of the file system."""

MARGIN = 1.05
"""A cache that saves less than this share is not worth its disk."""

_CHECKSUM = 4  # behind a chunk that lies in a file of its own
_BLOCK, _THREADS = 8 << 20, 4
_ROUND = 256 << 20
_SECONDS = 2.0  # after which no further round is written


class Workload(NamedTuple):
    """What would be stored."""

    sites: tuple[Site, ...]
    rows: dict[str, int]
    """By split."""
    contexts: dict[str, int]
    """By split."""
    context: int
    """T."""
    store: Store

    @property
    def tokens(self) -> int:
        """Packed, each of which goes through the model once."""
        return sum(self.contexts.values()) * self.context


class DiskRates(NamedTuple):
    """What a file system sustains."""

    write: float
    """Bytes per second, flushed."""
    read: float
    """Bytes per second, past the page cache where it can be avoided."""


class Rates(NamedTuple):
    """What was measured here."""

    disk: DiskRates
    free: int
    """Bytes, where the cache is to lie."""
    forward: float
    """Tokens per second through the target's body, several passes at a time as in a harvest."""
    lz4: float
    """How much bf16-lz4 shrinks activations of this model."""


class Training(NamedTuple):
    """What a recipe reads."""

    dictionaries: int
    streams: int
    """Distinct orders of rows: dictionaries that share batch size and seed share one."""
    passes: float
    """Over the rows of train, of all streams together."""


class Outlook(NamedTuple):
    """A cache in one codec."""

    codec: Codec
    site_bytes: dict[str, int]
    """By site, its scales included."""
    bytes: int
    """Everything."""
    needed: int
    """Free bytes that the harvest asks for."""
    write_s: float
    forward_s: float
    read_s: float
    """One pass of training over all sites."""
    rows_per_s: float
    """That the disk can feed to a training of all sites."""

    @property
    def harvest_s(self) -> float:
        """The longer of writing and running the model."""
        return max(self.write_s, self.forward_s)

    @property
    def break_even(self) -> float:
        """Passes of training from which on the cache has paid; infinite when reading is no faster than the model."""
        return self.harvest_s / self.forward_s if self.read_s < self.forward_s else float("inf")


def sketched(work: Workload, codec: Codec) -> Plan:
    """The plan of such a cache as far as sizes go: without identity, seed and digests."""
    chunk, shard = row_sizes([site.width for site in work.sites], work.rows["train"])
    splits = {}
    for split, stored in work.rows.items():
        rows = stored // chunk * chunk
        splits[split] = SplitPlan(work.contexts[split], work.context, rows, -(-rows // shard), stored - rows, {})
    return Plan(
        identity={},
        sites=work.sites,
        codec=codec,
        store=work.store,
        seed=0,
        chunk_rows=chunk,
        shard_rows=shard,
        splits=splits,
    )


def array_bytes(plan: Plan) -> int:
    """Bytes of every file of a cache that holds numbers: exactly, padding, indices and checksums included.

    What is not in it are documents (zarr.json, commit records, manifest). bf16-lz4 is counted as if it did not
    compress.
    """
    total = 0
    plain = dataclasses.replace(plan, codec="bf16") if plan.codec == "bf16-lz4" else plan
    for split, sizes in plan.splits.items():
        for spec in (*plain.sharded_arrays(split).values(), *plain.context_arrays(split).values()):
            assert spec.shard is not None
            last = -(-spec.shape[0] // spec.shard[0]) - 1
            total += last * spec.file_bytes(0) + spec.file_bytes(last) if last >= 0 else 0
        total += sizes.shards * (2 * 8 * plan.moments_width + _CHECKSUM)
    for site in plan.sites:
        total += 4 * 8 * site.width + _CHECKSUM
        total += 2 * 4 * site.width + _CHECKSUM if plan.codec == "int8z" else 0
    return total


def outlook(work: Workload, rates: Rates, codec: Codec) -> Outlook:
    """Sizes and times of a cache in one codec."""
    plan = sketched(work, codec)
    rows = sum(sizes.rows for sizes in plan.splits.values())
    shards = sum(sizes.shards for sizes in plan.splits.values())
    shrink = rates.lz4 if codec == "bf16-lz4" else 1.0
    row_bytes = {site.name: site.width + 2 if codec == "int8z" else 2 * site.width / shrink for site in work.sites}
    per_row, plain = sum(row_bytes.values()), sum(2 * site.width for site in work.sites)
    size = estimate_bytes(work.sites, codec, rows, work.tokens, shards)
    if codec == "bf16-lz4":  # counted as if it did not compress
        size -= int(rows * (plain - per_row))
    return Outlook(
        codec,
        {name: int(rows * each) for name, each in row_bytes.items()},
        size,
        int(SLACK * size + min(plan.shard_rows, rows) * per_row),
        size / rates.disk.write,
        work.tokens / rates.forward,
        plan.splits["train"].rows * per_row / rates.disk.read,
        rates.disk.read / per_row,
    )


def verdict(chosen: Outlook, others: Sequence[Outlook], rates: Rates, training: Training) -> str:
    """Which mode to use, and why, in a few sentences."""
    live_s = training.passes * chosen.forward_s
    live = f"{_times(training.passes)} of running the model take {duration(live_s)}"
    harvest = f"a harvest takes {duration(chosen.harvest_s)} and {decimal(chosen.bytes)} of disk"
    if chosen.read_s >= chosen.forward_s:
        return (
            f"Live activations are cheaper: reading a pass would take {duration(chosen.read_s)}, running the model "
            f"{duration(chosen.forward_s)}. Train with --live; a cache pays on a faster disk only."
        )
    if training.passes <= MARGIN * chosen.break_even:
        return (
            f"Live activations are cheaper: {live}, and {harvest} before training begins. Train with --live. "
            f"A cache pays from {chosen.break_even:.2f} passes on, this training and later ones together."
        )
    pays = (
        f"Caching pays: {live}, {harvest} and saves {duration(live_s - chosen.harvest_s)} (break-even at "
        f"{chosen.break_even:.2f} passes)."
    )
    if chosen.needed <= rates.free:
        return pays
    fitting = [other.codec for other in others if other.needed <= rates.free]
    smaller = f" harvest.codec = {fitting[0]!r} would fit." if fitting else ""
    return (
        f"{pays} But the disk is too small: {decimal(chosen.needed)} are needed and {decimal(rates.free)} are free."
        f"{smaller} Choose another disk (--cache), fewer tokens (data.max_tokens), fewer sites or layers; or rolling "
        f"mode, with harvest.window_gb = {max(1, rates.free // 2 // 10**9)}: training reads a ring of that size while "
        "harvest refills it, and the model runs in every pass."
    )


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3.4 min`, `2.1 h`, `1.5 days`."""
    for limit, unit, name in ((120.0, 1.0, "s"), (7200.0, 60.0, "min"), (172800.0, 3600.0, "h")):
        if seconds < limit:
            return f"{_short(seconds / unit)} {name}"
    return f"{_short(seconds / 86400.0)} days"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def _times(passes: float) -> str:
    return f"{passes:.2g} times the rows" if passes < 1 else f"{passes:.1f} times the rows"


def disk_rates(folder: Path, at_most: int) -> DiskRates:
    """Write up to `at_most` bytes to the file system of `folder` or its nearest parent, flush, read them back.

    The file has no name while it is in use, so nothing is left whatever happens. Raises UserError where this user may
    not write or the disk is full.
    """
    while not folder.is_dir():
        folder = folder.parent
    path = folder / f".thresher-{secrets.token_hex(6)}.tmp"
    size = max(_BLOCK, min(at_most, shutil.disk_usage(folder).free // 4) // _BLOCK * _BLOCK)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            path.unlink()
            _bypass_page_cache(descriptor)
            return _timed(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise explained(error, path, size) from error


def _bypass_page_cache(descriptor: int) -> None:
    """Set O_DIRECT where there is such a thing and the file system takes it."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | getattr(os, "O_DIRECT", 0))
        os.pwrite(descriptor, mmap.mmap(-1, _BLOCK), 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def _timed(descriptor: int, size: int) -> DiskRates:
    block = mmap.mmap(-1, _BLOCK)  # its address is aligned to a page, as O_DIRECT wants
    block.write(os.urandom(_BLOCK))
    landings = [mmap.mmap(-1, _BLOCK) for _ in range(_THREADS)]
    written = 0
    with ThreadPoolExecutor(_THREADS) as pool:

        def spread(action: Callable[[int, int], int], first: int, last: int) -> None:
            """Do the action for every block in [first, last), dealt out to the threads."""
            lanes = [range(first + i * _BLOCK, last, _THREADS * _BLOCK) for i in range(_THREADS)]
            list(pool.map(lambda i: [action(i, at) for at in lanes[i]], range(_THREADS)))

        began = time.perf_counter()
        while written < size and time.perf_counter() - began < _SECONDS:
            stop = min(size, written + _ROUND)
            spread(lambda _, at: os.pwrite(descriptor, block, at), written, stop)
            written = stop
        os.fsync(descriptor)
        write = written / (time.perf_counter() - began)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        spread(lambda i, at: os.preadv(descriptor, [landings[i]], at), 0, written)
        return DiskRates(write, written / (time.perf_counter() - began))
