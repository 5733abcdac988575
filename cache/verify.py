"""Reading a whole cache, all its parts, to see whether any bit of it changed.

Nothing here stops at the first fault: what can be named is named, down to the chunk. Files are mapped and summed where
they lie, several at a time. The kernel is asked for many pages at once, before they are touched: that spares a fault
for each few of them, lets the disk read on in large pieces, and makes of a sector that cannot be read an error, where
touching it would end the process. Reading into a buffer instead costs a copy, a quarter of the speed.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from thresher.cache.arrays import read_plain
from thresher.cache.commit import MANIFEST, PARTS, ROOT, commits_digest, file_digest, read_commit, shard_files
from thresher.cache.errors import UserError
from thresher.cache.index import INDEX, loss, read_index
from thresher.cache.layout import ArraySpec, chunk_index, crc32c
from thresher.cache.part import refuse_ring
from thresher.cache.place import Place, below, local, size_of, sizes, walk
from thresher.cache.plan import Plan
from thresher.cache.publish import read_sealed
from thresher.cache.records import canonical
from thresher.cache.remote.fetch import RUN_BYTES, runs
from thresher.cache.remote.place import ObjectPlace
from thresher.cache.segments import joined, shared_calibration
from thresher.cache.stored import calibration_digest, read_calibrations, read_contexts, read_root

Progress = Callable[[int], None]
"""Told of bytes that were read."""


_WINDOW = 64 << 20
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which Python does not name


class _Part(NamedTuple):
    """A part under examination."""

    root: Place
    prefix: str
    """Its path below the cache, as messages show it."""
    plan: Plan
    manifest: dict[str, Any]
    size_of: Callable[[str], int | None]
    """Size of a file below it; None where it is missing."""


def faults(path: Place, progress: Progress | None = None) -> list[str]:
    """One line per fault of the cache at `path`: the file, and for activations the chunk; [] when it is sound.

    Raises UserError when there is no finished cache at all.
    """
    tell = progress or (lambda count: None)
    roots = _roots(path)
    found = _lost_parts(path)
    for root in roots:
        prefix = "" if root == path else f"{below(path, root)}/"
        try:
            part = _Part(root, prefix, read_root(root).plan, read_sealed(root / MANIFEST), sizes(root))
        except UserError as error:
            found.append(str(error))
        else:
            found += _part_faults(part, tell)
    return found or _joint_faults(path)


def _joint_faults(path: Place) -> list[str]:
    """What is wrong with parts that are sound one by one: they were not made for one another."""
    try:
        segments = joined(path).segments
        for site in segments[0].sites:
            shared_calibration(segments, site)
    except UserError as error:
        return [str(error)]
    return []


def total_bytes(path: Place) -> int:
    """Bytes that `faults` is going to read."""
    if isinstance(path, ObjectPlace):
        return sum(path.listing().values())
    return sum(size_of(file) or 0 for root in _roots(path) for file in _files(root))


def _roots(path: Place) -> list[Place]:
    """The parts of a cache that were finished, as far as they are there; all with a manifest if nobody can tell."""
    if not (path / MANIFEST).exists():
        refuse_ring(path, read_root(path).plan)
        raise UserError(f"{path} is not complete: {MANIFEST} is missing. Run the same harvest again, then verify.")
    try:
        parts = [path / PARTS / name for name in sorted(read_index(path))]
    except UserError:
        parts = sorted((path / PARTS).glob("*-*"))
    return [path, *(part for part in parts if (part / MANIFEST).exists() and (part / ROOT).exists())]


def _lost_parts(path: Place) -> list[str]:
    """What the index lists and is not there as it was; the index itself, if it is damaged."""
    try:
        lost = {name: loss(path, name, entry) for name, entry in sorted(read_index(path).items())}
    except UserError as error:
        return [f"{PARTS}/{INDEX}: {error}"]
    return [f"{PARTS}/{name}: listed in {PARTS}/{INDEX} as finished, but {why}" for name, why in lost.items() if why]


def in_the_making(path: Place) -> list[str]:
    """Names of the extensions that were not finished: they do not count, and are no fault."""
    try:
        listed = read_index(path)
    except UserError:
        return []
    return [f"{PARTS}/{part.name}" for part in sorted((path / PARTS).glob("*-*")) if part.name not in listed]


def _files(root: Place) -> Iterator[Place]:
    """Every file of one part that is data, not a lock or a leftover of a writer that died."""
    return (file for file in walk(root, skip=PARTS) if not file.name.endswith((".lock", ".tmp")))


def _part_faults(part: _Part, progress: Progress) -> list[str]:
    """Every fault of one part: shards in order, then the other files, then files that nobody knows."""
    plan, found, known = part.plan, list[str](), {MANIFEST, *part.manifest["files"]}
    work: list[Callable[[], list[str]]] = []
    calibrated: dict[str | None, list[str]] = {}
    for split, each in plan.splits.items():
        for index in range(each.shards):
            known.add(f"commits/{split}.{index}.json")
            try:
                record = read_commit(part.root, plan, split, index)
                arrays = record["arrays"]
                calibrated.setdefault(record["calibration"], []).append(f"commits/{split}.{index}.json")
                files = shard_files(plan, split, index, arrays)
            except (UserError, KeyError):
                specs = plan.sharded_arrays(split) | {"moments": plan.moments_array(split)}
                known |= {f"{split}/{name}/{spec.file_name(index)}" for name, spec in specs.items()}
                found.append(f"{part.prefix}commits/{split}.{index}.json: missing, damaged or of another cache")
                continue
            known |= files.keys()
            for name, spec in plan.sharded_arrays(split).items():
                file = f"{split}/{name}/{spec.file_name(index)}"
                work.append(_later(part, split, name, index, spec, arrays[name], file, files[file], progress))
            found += _moments_faults(part, split, index, arrays["moments"]["crc32c"])
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="thresher-verify") as pool:
        found += [line for lines in pool.map(lambda job: job(), work) for line in lines]
    sides = list(_side_faults(part))
    found += sides or [*_plan_faults(part), *_calibration_faults(part, calibrated)]
    if not found and commits_digest(part.root, plan) != part.manifest["commits"]:
        found.append(
            f"{part.prefix}commits: the records are sound one by one, but not the ones that MANIFEST.json was made of"
        )
    strangers = sorted(below(part.root, file) for file in _files(part.root))
    return found + [f"{part.prefix}{name}: does not belong to the cache" for name in strangers if name not in known]


def _later(
    part: _Part,
    split: str,
    name: str,
    index: int,
    spec: ArraySpec,
    entry: dict[str, Any],
    file: str,
    size: int,
    progress: Progress,
) -> Callable[[], list[str]]:
    """The check of one shard file, to be run in some thread."""

    def check() -> list[str]:
        path = part.root / file
        there = part.size_of(file)
        if there is None:
            return [f"{part.prefix}{file}: missing"]
        if there != size:
            return [f"{part.prefix}{file}: expected {size} bytes, got {there}"]
        expected = [int(digits, 16) for digits in entry["crc32c"]]
        lengths = entry.get("lengths") or [spec.chunk[0] * spec.row_bytes] * len(expected)
        got = list[int]()
        try:
            for data in _chunks(path, lengths):
                got.append(crc32c(np.frombuffer(data, np.uint8)))
                progress(len(data))
            tail = _tail(path, sum(lengths), size)
        except (UserError, FileNotFoundError) as error:
            return [f"{part.prefix}{file}: cannot be read at chunk {len(got)} or after it: {error}"]
        lines = [
            f"{part.prefix}{file}: chunk {chunk} does not match its checksum"
            for chunk, (have, want) in enumerate(zip(got, expected, strict=True))
            if have != want
        ]
        if len(lines) == len(got) and (other := _shard_of(part, split, name, got)) is not None:
            lines = [f"{part.prefix}{file}: holds the rows of shard {other}, not of shard {index}"]
        if tail != chunk_index(spec, lengths):
            lines.append(f"{part.prefix}{file}: the index at its end is wrong")
        return lines

    return check


def _chunks(path: Place, lengths: list[int]) -> Iterator[memoryview | np.ndarray]:
    """The chunks of a file, one after another. Raises UserError when they cannot be read."""
    ends = np.cumsum(lengths).tolist()
    if isinstance(path, ObjectPlace):
        for run in runs(range(len(lengths)), lengths, RUN_BYTES):
            start = ends[run[0]] - lengths[run[0]]
            data = path.read_range(start, ends[run[-1]] - start)
            yield from (data[ends[i] - lengths[i] - start : ends[i] - start] for i in run)
        return
    mapped, there = _mapped(local(path, "checking")), 0
    for end, length in zip(ends, lengths, strict=True):
        while there < end:
            if (reason := _fetch(mapped[there : there + _WINDOW])) is not None:
                raise UserError(reason)
            there += _WINDOW
        yield mapped[end - length : end]


def _tail(path: Place, start: int, size: int) -> bytes:
    """What follows the chunks of a file."""
    if isinstance(path, ObjectPlace):
        return bytes(path.read_range(start, size - start))
    with local(path, "checking").open("rb") as file:
        file.seek(start)
        return file.read(size - start)


def _mapped(path: Path) -> np.ndarray:
    """A file in memory, to be read from its beginning to its end."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    return np.frombuffer(mapped, np.uint8)


def _fetch(data: np.ndarray) -> str | None:
    """Read a part of a mapped file, from a page on, into memory; why that is impossible, or None.

    Not by `mmap.madvise`, which keeps the interpreter's lock while the disk reads.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data)), _POPULATE_READ) == 0:
        return None
    code = ctypes.get_errno()
    if code == errno.EINVAL:  # an older kernel, which reads a page when it is touched
        return None
    return os.strerror(errno.EIO if code == errno.EFAULT else code)


def _shard_of(part: _Part, split: str, name: str, sums: list[int]) -> int | None:
    """The shard whose commit record has these checksums for an array."""
    wanted = [f"{value:08x}" for value in sums]
    for index in range(part.plan.splits[split].shards):
        try:
            if read_commit(part.root, part.plan, split, index)["arrays"][name]["crc32c"] == wanted:
                return index
        except (UserError, KeyError):
            continue
    return None


def _moments_faults(part: _Part, split: str, index: int, sums: list[str]) -> list[str]:
    """The check of a shard's sums."""
    spec = part.plan.moments_array(split)
    try:
        moments = read_plain(part.root / split / "moments", spec, index)
    except UserError as error:
        return [f"{part.prefix}{split}/moments/{spec.file_name(index)}: {error}"]
    if [f"{crc32c(moments):08x}"] != sums:
        return [f"{part.prefix}{split}/moments/{spec.file_name(index)}: does not match its checksum"]
    return []


def _plan_faults(part: _Part) -> Iterator[str]:
    """The checks of files that the manifest vouches for against the plan: they may have been wrong before it."""
    for name, document in part.plan.documents().items():
        if (part.root / name).read_bytes() != canonical(document):
            yield f"{part.prefix}{name}: is not what the plan in {ROOT} says"
    for split in () if part.plan.rows_stored_elsewhere else part.plan.splits:
        try:
            read_contexts(part.root, part.plan, split)
        except UserError as error:
            yield f"{part.prefix}{split}/contexts: {error}"


def _calibration_faults(part: _Part, calibrated: dict[str | None, list[str]]) -> Iterator[str]:
    """The check of μ and σ against the records of the shards that were stored with them, by digest."""
    try:
        there = calibration_digest(part.plan, read_calibrations(part.root, part.plan))
    except UserError as error:
        yield f"{part.prefix}calibration: {error}"
        return
    others = [record for digest, records in calibrated.items() if digest != there for record in records]
    if others:
        yield f"{part.prefix}calibration: not the one that {len(others)} shards were stored with ({others[0]} …)"


def _side_faults(part: _Part) -> Iterator[str]:
    """The checks of every file that the manifest lists."""
    for name, entry in part.manifest["files"].items():
        path, there = part.root / name, part.size_of(name)
        if there is None:
            yield f"{part.prefix}{name}: missing"
        elif there != entry["bytes"]:
            yield f"{part.prefix}{name}: expected {entry['bytes']} bytes, got {there}"
        elif file_digest(path) != entry["sha256"]:
            yield f"{part.prefix}{name}: SHA-256 differs from MANIFEST.json"
    if ROOT not in part.manifest["files"]:
        yield f"{part.prefix}{MANIFEST}: does not list {ROOT}"
