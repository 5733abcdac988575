"""The bytes of a shard file, and what its commit record says of them.

Chunks of `bf16-lz4` are compressed into the front of the buffer that their rows lie in, which the compressor has read
by then: a shard takes no second buffer, and its file is still written from one page-aligned block.
"""

from collections import deque
from typing import Any, NamedTuple

import numpy as np
from numcodecs import blosc

from thresher.cache.commit import chunk_sums
from thresher.cache.layout import BLOSC, ArraySpec, chunk_index, crc32c, item_size, shard_index


class ShardFile(NamedTuple):
    """One file, ready to be published."""

    pieces: list[np.ndarray | bytes]
    """Its bytes, one piece after another."""
    entry: dict[str, Any]
    """For the commit record: size of the file, CRC32C of every stored chunk (8 hex digits), and for compressed arrays
    the lengths of the chunks in bytes."""


def shard_file(spec: ArraySpec, rows: np.ndarray) -> ShardFile:
    """File of the rows of one shard, whole chunks of them. A compressed array is packed in place: `rows` is lost."""
    if spec.compressed:
        return _compressed(spec, rows)
    tail = shard_index(spec, len(rows))
    return ShardFile([rows, tail], {"bytes": rows.nbytes + len(tail), "crc32c": chunk_sums(spec, rows)})


def _compressed(spec: ArraySpec, rows: np.ndarray) -> ShardFile:
    flat = rows.reshape(-1).view(np.uint8)
    step = spec.chunk[0] * spec.row_bytes
    waiting: deque[bytes] = deque()
    lengths: list[int] = []
    sums: list[str] = []
    filled = 0
    for start in range(0, len(flat), step):
        packed = compress(spec, flat[start : start + step])
        lengths.append(len(packed))
        sums.append(f"{crc32c(packed):08x}")
        waiting.append(packed)
        while waiting and filled + len(waiting[0]) <= start + step:  # room that was read; noise may take 16 bytes more
            first = waiting.popleft()
            flat[filled : filled + len(first)] = np.frombuffer(first, np.uint8)
            filled += len(first)
    tail = chunk_index(spec, lengths)
    entry = {"bytes": sum(lengths) + len(tail), "crc32c": sums, "lengths": lengths}
    return ShardFile([flat[:filled], *waiting, tail], entry)


def compress(spec: ArraySpec, chunk: np.ndarray) -> bytes:
    """One chunk [bytes] as Zarr's `blosc` codec stores it."""
    shuffle = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}[BLOSC["shuffle"]]
    size, name = item_size(spec.dtype), BLOSC["cname"].encode()
    return bytes(blosc.compress(chunk, name, BLOSC["clevel"], shuffle, BLOSC["blocksize"], size))
