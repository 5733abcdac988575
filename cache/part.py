"""One complete part of a cache: a directory with a plan, its commit records and a manifest.

A cache is a base part and the parts that extend it (`reader` joins them). `open` needs the manifest and every shard
file with its planned size; it reads no activations. The first touch of a shard in a process checks its commit record
and the index at its end, the first touch of a chunk its CRC32C.

A chunk comes in one of two ways. `chunk` gives a view of the file mapped into memory: an uncompressed shard is a plain
[S, d] block. `read` copies it into memory of the caller's, past the page cache if asked to, or decompresses it there.
In an object store there are no views: chunks are fetched (`remote.fetch`), several at once with `read_run`.

Left out: zarr-python, ten to forty times slower on the same files; the tests show that it reads the same bits.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from thresher.cache.arrays import check_size, file_size, read_file, read_plain
from thresher.cache.codec import Calibration
from thresher.cache.commit import (
    MANIFEST,
    PARTS,
    ROOT,
    check_calibration,
    commit_path,
    committed,
    harvest_again,
    missing_record,
    read_commit,
    repair,
    shard_files,
)
from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.layout import ArraySpec, Contexts, calibration_array, chunk_index, crc32c, raw_dtype, stats_array
from thresher.cache.place import Place, below, local, sizes
from thresher.cache.plan import Plan
from thresher.cache.publish import read_sealed
from thresher.cache.remote.fetch import BLOCKS_HELD, DamagedError, Once, block_chunks, fetch
from thresher.cache.remote.keep import kept
from thresher.cache.remote.place import ObjectPlace
from thresher.cache.remote.settings import Reading
from thresher.cache.stats import SiteStats
from thresher.cache.stored import calibration_digest, read_calibration, read_contexts, read_root

T = TypeVar("T")

ALIGNMENT = 4096
"""Bytes to which address, offset and length of a read past the page cache are aligned."""


class ShardFile(NamedTuple):
    """Where the chunks of one array lie in one shard file, and what their bytes come to."""

    path: Place
    offsets: np.ndarray
    """[m] int64."""
    lengths: np.ndarray
    """[m] int64, bytes as stored."""
    sums: np.ndarray
    """[m] uint32 CRC32C of the stored bytes."""
    packed: bool
    """Whether chunks are compressed."""


def refuse_ring(path: Place, plan: Plan) -> None:
    """Raise UserError for the ring of a rolling training, which is no whole cache and never becomes one."""
    if plan.window_shards is not None:
        raise UserError(
            f"{path} is the ring of a rolling training: some windows of its train shards exist at a time, so it is "
            f"read by `thresher train` with the same recipe, and by nothing else. For a whole cache leave "
            f"harvest.window_gb out and harvest into another place."
        )


class Part:
    """A complete part, opened for reading. Use `open`."""

    def __init__(self, path: Place, plan: Plan, facts: dict[str, Any], manifest: dict[str, Any]) -> None:
        self.path, self.plan, self.facts, self.manifest = path, plan, facts, manifest
        self.fingerprint: str = plan.fingerprint
        self.sites: dict[str, Site] = {site.name: site for site in plan.sites}
        self.specs: dict[str, dict[str, ArraySpec]] = {split: plan.sharded_arrays(split) for split in plan.splits}
        self._keep = kept(Reading.from_environment(), self.fingerprint) if isinstance(path, ObjectPlace) else None
        self._direct = True
        self._checked: dict[tuple[str, str], np.ndarray] = {}
        self._sums = self._remembered(self._read_sums, 8192)
        self._file = self._remembered(self._open_file, 65536)
        self._block = Once(self._fetch_block, BLOCKS_HELD)
        self._map = lru_cache(maxsize=8192)(self._open_map)

    @classmethod
    def open(cls, path: Place) -> "Part":
        """Open the part at `path`. Raises UserError when it is missing, incomplete, damaged or newer than this."""
        plan, facts = read_root(path)
        refuse_ring(path, plan)
        if not (path / MANIFEST).exists():
            total = sum(sizes.shards for sizes in plan.splits.values())
            command = harvest_again(path, extend=(path / PARTS).is_dir())
            raise UserError(
                f"the cache {path} is incomplete: {len(committed(path, plan))} of {total} shards are committed and "
                f"there is no {MANIFEST}. Run the same harvest again (`{command}`); it goes on where it stopped."
            )
        part = cls(path, plan, facts, read_sealed(path / MANIFEST))
        part.side_file(ROOT)
        size_of = sizes(path)
        for split, index in part.shards():
            if size_of(below(path, commit_path(path, split, index))) is None:
                raise missing_record(path, plan, split, index)
            arrays = part.commit(split, index)["arrays"] if plan.codec == "bf16-lz4" else {}
            for name, size in shard_files(plan, split, index, arrays).items():
                got = size_of(name) or 0
                check_size(path / name, got, size, repair(path, plan, split, index) if got != size else "")
        return part

    def shards(self) -> Iterator[tuple[str, int]]:
        """(split, index) of every shard."""
        return ((split, index) for split, sizes in self.plan.splits.items() for index in range(sizes.shards))

    def rows(self, split: str) -> int:
        """Stored rows of a split; 0 for one that the part does not have."""
        return self.plan.splits[split].rows if split in self.plan.splits else 0

    def commit(self, split: str, index: int) -> dict[str, Any]:
        """The commit record of a shard."""
        return read_commit(self.path, self.plan, split, index)

    def statistics(self, site: str) -> SiteStats:
        """Statistics of a site over the kept rows of train."""
        spec = stats_array(self.sites[site])
        attributes = json.loads(self.side_file(f"stats/{site}/zarr.json"))["attributes"]
        self.side_file(f"stats/{site}/{spec.file_name(0)}")
        mean, variance = read_plain(self.path / "stats" / site, spec)[0]
        scalars = {key: attributes[key][0] for key in ("count", "mean_norm", "mean_sq_norm", "total_variance")}
        return SiteStats(mean=mean, variance=variance, **scalars)

    def calibration(self, site: str) -> Calibration | None:
        """μ and σ of an int8z site; None for the other codecs."""
        if self.plan.codec != "int8z":
            return None
        spec = calibration_array(self.sites[site])
        self.side_file(f"calibration/{site}/{spec.file_name(0)}")
        return read_calibration(self.path, self.sites[site])

    @cached_property
    def _calibration_digest(self) -> str | None:
        """As commit records have it, of what is there."""
        return calibration_digest(self.plan, {name: c for name in self.sites if (c := self.calibration(name))})

    def contexts(self, split: str) -> Contexts:
        """The packed tokens of a split, checked against their digests."""
        return read_contexts(self.path, self.plan, split)

    def side_file(self, name: str) -> bytes:
        """Content of a file that the manifest lists, checked. Raises UserError when it changed."""
        data = read_file(self.path / name)
        entry = self.manifest["files"].get(name, {})
        if entry.get("sha256") != hashlib.sha256(data).hexdigest():
            raise UserError(
                f"{self.path / name} is damaged or was changed: its SHA-256 is not the one in {MANIFEST}. Restore the "
                f"file, or remove the cache and harvest again."
            )
        return data

    def chunk(self, split: str, name: str, index: int) -> np.ndarray:
        """[C, …] read-only chunk of an array: a view of the mapped file, or decompressed into memory of its own.

        Checked on first touch. Raises UserError naming the chunk when it is damaged.
        """
        shard, inner = divmod(index, self.plan.shard_rows // self.plan.chunk_rows)
        file, spec = self._file(split, name, shard), self.specs[split][name]
        if isinstance(self.path, ObjectPlace) and not file.packed:
            return self._fetched(split, name, shard, inner)
        if file.packed:
            out = np.empty(spec.chunk, raw_dtype(spec.dtype))
            self.read(split, name, index, out)
            out.flags.writeable = False
            return out
        view = self._map(split, name, shard)[inner * spec.chunk[0] : (inner + 1) * spec.chunk[0]]
        self._check(split, name, index, view, file, inner)
        return view

    def read(self, split: str, name: str, index: int, out: np.ndarray, *, direct: bool = False) -> None:
        """Copy a chunk into `out` [C, …], contiguous; checked on first touch.

        `direct` reads past the page cache where file, buffer and file system allow it.
        """
        shard, inner = divmod(index, self.plan.shard_rows // self.plan.chunk_rows)
        if isinstance(self.path, ObjectPlace):
            self.read_run(split, name, index, [out])
            return
        file = self._file(split, name, shard)
        offset, length = int(file.offsets[inner]), int(file.lengths[inner])
        flat = out.reshape(-1).view(np.uint8)
        stored = np.empty(length, np.uint8) if file.packed else flat
        assert len(stored) == length
        aligned = not (offset % ALIGNMENT or length % ALIGNMENT or stored.ctypes.data % ALIGNMENT)
        advice = partial(repair, self.path, self.plan, split, shard)
        self._pread(file.path, stored, offset, advice, direct=direct and aligned)
        self._check(split, name, index, stored, file, inner)
        if file.packed:
            _unpack(stored, flat, file.path, inner, advice)

    def read_run(self, split: str, name: str, index: int, outs: Sequence[np.ndarray]) -> None:
        """Chunks `index`, `index` + 1, … of one shard in an object store into `outs`, each [C, …]; always checked."""
        shard, inner = divmod(index, self.plan.shard_rows // self.plan.chunk_rows)
        file = self._file(split, name, shard)
        assert isinstance(file.path, ObjectPlace)
        flats = [out.reshape(-1).view(np.uint8) for out in outs]
        lengths = file.lengths[inner : inner + len(outs)].tolist()
        stored = [np.empty(length, np.uint8) for length in lengths] if file.packed else flats
        advice = partial(repair, self.path, self.plan, split, shard)
        try:
            key = f"{self.fingerprint}/{split}/{name}/{shard}"
            fetch(file.path, file.offsets, file.sums, inner, stored, self._keep, key)
        except DamagedError as error:
            raise self._damaged(split, name, shard, error.chunk) from None
        except FileNotFoundError:
            raise UserError(f"{file.path} is missing from the cache. Restore it, or: {advice()}") from None
        if file.packed:
            for i, (each, flat) in enumerate(zip(stored, flats, strict=True)):
                _unpack(each, flat, file.path, inner + i, advice)

    def _fetched(self, split: str, name: str, shard: int, inner: int) -> np.ndarray:
        """A chunk from an object store; small ones come with their neighbours, which are asked for next."""
        rows = self.specs[split][name].chunk[0]
        count = block_chunks(int(self._file(split, name, shard).lengths[inner]))
        first = inner // count * count
        make = self._fetch_block if count == 1 else self._block
        return make(split, name, shard, first, count)[(inner - first) * rows : (inner - first + 1) * rows]

    def _fetch_block(self, split: str, name: str, shard: int, first: int, count: int) -> np.ndarray:
        """[≤ count · C, …] read-only: some chunks of a shard from `first` on."""
        spec, file = self.specs[split][name], self._file(split, name, shard)
        held = min(count, len(file.lengths) - first)
        block = np.empty((held * spec.chunk[0], *spec.shape[1:]), raw_dtype(spec.dtype))
        index = shard * (self.plan.shard_rows // self.plan.chunk_rows) + first
        self.read_run(split, name, index, np.split(block, held))
        block.flags.writeable = False
        return block

    def _remembered(self, make: Callable[..., T], limit: int) -> Callable[..., T]:
        """`make`, its last results kept. Where making one costs requests, threads wait for the one who does it."""
        return Once(make, limit) if isinstance(self.path, ObjectPlace) else lru_cache(maxsize=limit)(make)

    def _damaged(self, split: str, name: str, shard: int, inner: int) -> UserError:
        return UserError(
            f"the cache {self.path} is damaged: chunk {inner} of shard {shard} of {split}/{name} does not match its "
            f"checksum. {repair(self.path, self.plan, split, shard)}"
        )

    def _check(self, split: str, name: str, index: int, stored: np.ndarray, file: ShardFile, inner: int) -> None:
        """Compare the stored bytes of a chunk with its commit record, once a process."""
        checked = self._checked.get((split, name))
        if checked is None:
            fresh = np.zeros(self.rows(split) // self.plan.chunk_rows, bool)
            checked = self._checked.setdefault((split, name), fresh)
        if not checked[index]:
            if crc32c(stored) != int(file.sums[inner]):
                raise self._damaged(split, name, index // (self.plan.shard_rows // self.plan.chunk_rows), inner)
            checked[index] = True

    def _pread(self, path: Place, out: np.ndarray, offset: int, advice: Callable[[], str], *, direct: bool) -> None:
        """Fill `out` from a place in a file. Raises UserError, with advice, when it is shorter or cannot be read."""
        if isinstance(path, ObjectPlace):
            out[:] = np.frombuffer(path.read_range(offset, len(out)), np.uint8)
            return None
        path = local(path, "reading")
        direct = direct and self._direct and hasattr(os, "O_DIRECT")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
            try:
                got = os.preadv(descriptor, [out.data], offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            if direct and error.errno == errno.EINVAL:  # this file system wants it otherwise: through the page cache
                self._direct = False
                return self._pread(path, out, offset, advice, direct=False)
            raise UserError(f"cannot read {path}: {error.strerror}. Restore the file, or: {advice()}") from error
        if got != out.nbytes:
            raise UserError(
                f"{path} is shorter than it was: expected {out.nbytes:,} bytes at {offset:,}, got {got:,}. Restore the "
                f"file, or have the shard written anew. {advice()}"
            )
        return None

    def _read_sums(self, split: str, shard: int) -> dict[str, tuple[np.ndarray, np.ndarray | None, int]]:
        """By array: CRC32C of every chunk, their lengths where they vary, and the size of the file."""
        out = {}
        record = self.commit(split, shard)
        check_calibration(self.path, record, self._calibration_digest)
        for name, entry in record["arrays"].items():
            sums = np.array([int(digits, 16) for digits in entry["crc32c"]], np.uint32)
            lengths = np.array(entry["lengths"], np.int64) if entry.get("lengths") else None
            out[name] = (sums, lengths, int(entry["bytes"]))
        return out

    def _open_file(self, split: str, name: str, shard: int) -> ShardFile:
        """Look up a shard file, after a look at the index at its end."""
        spec = self.specs[split][name]
        sums, lengths, size = self._sums(split, shard)[name]
        if lengths is None:
            lengths = np.full(len(sums), spec.chunk[0] * spec.row_bytes, np.int64)
        path = self.path / split / name / spec.file_name(shard)
        file = ShardFile(path, np.cumsum(lengths) - lengths, lengths, sums, spec.compressed)
        advice = partial(repair, self.path, self.plan, split, shard)
        if isinstance(path, Path):  # an object store was listed a moment ago
            check_size(path, file_size(path), size, advice())
        tail = np.empty(size - int(lengths.sum()), np.uint8)
        index = chunk_index(spec, lengths.tolist())
        for _ in range(2 if isinstance(path, ObjectPlace) else 1):  # once more, as for chunks
            self._pread(path, tail, int(lengths.sum()), advice, direct=False)
            if tail.tobytes() == index:
                break
        else:
            raise UserError(f"{path} is damaged: the index at its end is wrong. Restore the file, or: {advice()}")
        return file

    def _open_map(self, split: str, name: str, shard: int) -> np.ndarray:
        """[rows, …] read-only view of a shard file that is not compressed."""
        spec, file = self.specs[split][name], self._file(split, name, shard)
        body = int(file.lengths.sum())
        # A private mapping through torch closes its descriptor, so thousands of shards do not exhaust the limit.
        mapped = torch.from_file(str(file.path), shared=False, size=body, dtype=torch.uint8).numpy()
        view = mapped.view(raw_dtype(spec.dtype)).reshape(-1, *spec.shape[1:])
        view.flags.writeable = False
        return view


def _unpack(stored: np.ndarray, out: np.ndarray, path: Place, chunk: int, advice: Callable[[], str]) -> None:
    """Decompress a chunk; other threads run meanwhile."""
    from numcodecs import blosc

    try:
        got = blosc.decompress(stored, out)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: chunk {chunk} cannot be decompressed ({error}). {advice()}") from error
    assert np.frombuffer(got, np.uint8).nbytes == out.nbytes
