"""Whole arrays to and from files, for the small ones: contexts, moments, calibration, statistics.

Activations do not pass here: their shards are written by `shard` and mapped by `reader`.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from thresher.cache.contracts import UserError
from thresher.cache.layout import ArraySpec, crc32c, raw_dtype, shard_index
from thresher.cache.publish import publish


def write_plain(folder: Path, spec: ArraySpec, chunk: np.ndarray, index: int = 0, *, exclusive: bool = False) -> None:
    """Publish one chunk of an array without shards, followed by its CRC32C as Zarr's `crc32c` codec has it."""
    raw = np.ascontiguousarray(chunk, raw_dtype(spec.dtype))
    assert raw.shape == spec.chunk
    publish(folder / spec.file_name(index), [raw, struct.pack("<I", crc32c(raw))], exclusive=exclusive)


def read_plain(folder: Path, spec: ArraySpec, index: int = 0) -> np.ndarray:
    """The chunk that `write_plain` wrote. Raises UserError naming the file when it is missing or damaged."""
    path = folder / spec.file_name(index)
    data = read_file(path)
    expected = int(np.prod(spec.chunk)) * raw_dtype(spec.dtype).itemsize + 4
    if len(data) != expected or struct.unpack("<I", data[-4:])[0] != crc32c(data[:-4]):
        raise UserError(
            f"{path} is damaged: expected {expected} bytes ending in their CRC32C, got {len(data)} bytes that do not "
            f"match. Restore the file, or remove the cache and harvest again."
        )
    return np.frombuffer(data[:-4], raw_dtype(spec.dtype)).reshape(spec.chunk)


def write_sharded(folder: Path, spec: ArraySpec, array: np.ndarray) -> None:
    """Publish every shard of an array that is in memory; a last chunk that is not full is padded with the fill."""
    assert spec.shard is not None
    raw = np.ascontiguousarray(array, raw_dtype(spec.dtype))
    assert raw.shape == spec.shape
    for index, start in enumerate(range(0, len(raw), spec.shard[0])):
        rows = raw[start : start + spec.shard[0]]
        whole = spec.file_rows(index)
        pieces: list[Any] = [rows]
        if whole > len(rows):
            pieces.append(np.full((whole - len(rows), *spec.shape[1:]), spec.fill, raw.dtype))
        publish(folder / spec.file_name(index), [*pieces, shard_index(spec, whole)])


def read_sharded(folder: Path, spec: ArraySpec) -> np.ndarray:
    """The array that `write_sharded` wrote; the caller checks its digest."""
    assert spec.shard is not None
    parts = []
    for index, start in enumerate(range(0, spec.shape[0], spec.shard[0])):
        data = read_file(folder / spec.file_name(index))
        check_size(folder / spec.file_name(index), len(data), spec.file_bytes(index))
        count = min(spec.shard[0], spec.shape[0] - start)
        body = np.frombuffer(data, raw_dtype(spec.dtype), count * int(np.prod(spec.shape[1:])))
        parts.append(body.reshape(count, *spec.shape[1:]))
    return np.concatenate(parts) if parts else np.empty(spec.shape, raw_dtype(spec.dtype))


def read_file(path: Path) -> bytes:
    """All bytes of a file, or UserError when it is not there."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing from the cache. Restore it, or remove the cache and harvest again."
        ) from None


def check_size(path: Path, got: int, expected: int) -> None:
    """Raise UserError when a file is not as long as the plan says."""
    if got != expected:
        raise UserError(
            f"{path} has the wrong size: expected {expected:,} bytes, got {got:,}. Restore the file, or delete its "
            f"commit record and MANIFEST.json and run harvest again."
        )
