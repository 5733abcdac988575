"""Whole arrays to and from files, for the small ones: contexts, moments, calibration, statistics.

Activations do not pass here: their shards are written by `shard` and mapped by `reader`.
"""

import struct
from collections.abc import Iterator

import numpy as np

from thresher.cache.errors import UserError
from thresher.cache.layout import ArraySpec, crc32c, raw_dtype, shard_index
from thresher.cache.place import Place, size_of
from thresher.cache.publish import publish


def write_plain(folder: Place, spec: ArraySpec, chunk: np.ndarray, index: int = 0, *, exclusive: bool = False) -> None:
    """Publish one chunk of an array without shards, followed by its CRC32C as Zarr's `crc32c` codec has it."""
    raw = np.ascontiguousarray(chunk, raw_dtype(spec.dtype))
    assert raw.shape == spec.chunk
    publish(folder / spec.file_name(index), [raw, struct.pack("<I", crc32c(raw))], exclusive=exclusive)


def read_plain(folder: Place, spec: ArraySpec, index: int = 0) -> np.ndarray:
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


def write_sharded(folder: Place, spec: ArraySpec, array: np.ndarray) -> None:
    """Publish every shard of an array that is in memory; a last chunk that is not full is padded with the fill."""
    for index, rows in _by_shard(spec, array):
        publish(folder / spec.file_name(index), [rows, _tail(spec, index, len(rows))])


def repair_sharded(folder: Place, spec: ArraySpec, array: np.ndarray) -> list[Place]:
    """Write those files of `write_sharded` anew that do not hold what it would write; the files that did not."""
    wrong = []
    for index, rows in _by_shard(spec, array):
        path, tail = folder / spec.file_name(index), _tail(spec, index, len(rows))
        there = np.frombuffer(path.read_bytes() if path.exists() else b"", np.uint8)
        body, end = rows.reshape(-1).view(np.uint8), rows.nbytes
        if not np.array_equal(there[:end], body) or there[end:].tobytes() != tail:
            publish(path, [rows, tail])
            wrong.append(path)
    return wrong


def read_sharded(folder: Place, spec: ArraySpec) -> np.ndarray:
    """The array that `write_sharded` wrote; the caller checks its digest. Raises UserError naming a file whose size,
    padding or index is wrong."""
    assert spec.shard is not None
    parts = []
    for index, start in enumerate(range(0, spec.shape[0], spec.shard[0])):
        data = read_file(folder / spec.file_name(index))
        check_size(folder / spec.file_name(index), len(data), spec.file_bytes(index))
        count = min(spec.shard[0], spec.shape[0] - start)
        body = np.frombuffer(data, raw_dtype(spec.dtype), count * int(np.prod(spec.shape[1:])))
        if data[body.nbytes :] != _tail(spec, index, count):
            raise UserError(
                f"{folder / spec.file_name(index)} is damaged: the padding or the index at its end is wrong. Restore "
                f"the file, or remove the cache and harvest again."
            )
        parts.append(body.reshape(count, *spec.shape[1:]))
    return np.concatenate(parts) if parts else np.empty(spec.shape, raw_dtype(spec.dtype))


def _by_shard(spec: ArraySpec, array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(index, rows) of each shard of an array, in its stored dtype."""
    assert spec.shard is not None
    assert array.shape == spec.shape
    for index, start in enumerate(range(0, len(array), spec.shard[0])):
        yield index, np.ascontiguousarray(array[start : start + spec.shard[0]], raw_dtype(spec.dtype))


def _tail(spec: ArraySpec, index: int, rows: int) -> bytes:
    """What follows the rows in a shard file: the padding of the last chunk, and the index."""
    whole = spec.file_rows(index)
    padding = np.full((whole - rows, *spec.shape[1:]), spec.fill, raw_dtype(spec.dtype))
    return padding.tobytes() + shard_index(spec, whole)


def file_size(path: Place) -> int:
    """Bytes of a file; 0 for one that is not there, or no longer."""
    return size_of(path) or 0


def read_file(path: Place) -> bytes:
    """All bytes of a file, or UserError when it is not there."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing from the cache. Restore it, or remove the cache and harvest again."
        ) from None


def check_size(path: Place, got: int, expected: int, advice: str = "") -> None:
    """Raise UserError when a file is not as long as the plan says; `advice` is what to do beside restoring it."""
    if got != expected:
        raise UserError(
            f"{path} has the wrong size: expected {expected:,} bytes, got {got:,}. Restore the file"
            f"{', or have the shard written anew. ' + advice if advice else ', or harvest again elsewhere.'}"
        )
