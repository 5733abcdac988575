"""Chunks of shard files in an object store: fetched by range, checked on arrival, kept for later epochs.

Neighbours that are wanted together come by one request. A chunk whose checksum is wrong is fetched once more, alone:
memory, a proxy or the network may have changed it. If it is wrong again, it is the store's.

Arrays with small chunks (scales, keep) are read in blocks of some chunks, of which the last ones used stay in memory:
a request takes about as long for 2 kB as for 64.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import numpy as np

from thresher.cache.layout import crc32c
from thresher.cache.remote.keep import Keep
from thresher.cache.remote.place import ObjectPlace

T = TypeVar("T")

BLOCK_BYTES = 1 << 16
RUN_BYTES = 4 << 20
"""Neighbours come by one request up to this size: more would be longer in coming than several beside one another."""
BLOCKS_HELD = 512


class DamagedError(Exception):
    """A chunk that was fetched twice and does not match its checksum."""

    def __init__(self, chunk: int) -> None:
        super().__init__(chunk)
        self.chunk = chunk
        """Within its shard."""


def fetch(
    place: ObjectPlace,
    offsets: np.ndarray,
    sums: np.ndarray,
    first: int,
    outs: Sequence[np.ndarray],
    keep: Keep | None,
    key: str,
) -> None:
    """Chunks `first`, `first` + 1, … of the file at `place` into `outs`, each [bytes as stored] uint8.

    `offsets` [m] and `sums` [m] are those of all chunks of the file; `key` names it among those kept. Raises
    DamagedError, FileNotFoundError, UserError.
    """
    missing = [i for i, out in enumerate(outs) if not _kept(keep, f"{key}.{first + i}", int(sums[first + i]), out)]
    for run in runs(missing, [len(out) for out in outs], RUN_BYTES):
        start, length = int(offsets[first + run[0]]), sum(len(outs[i]) for i in run)
        data, at = place.read_range(start, length), 0
        for i in run:
            outs[i][:] = np.frombuffer(data[at : at + len(outs[i])], np.uint8)
            at += len(outs[i])
            chunk = first + i
            if crc32c(outs[i]) != int(sums[chunk]):
                outs[i][:] = np.frombuffer(place.read_range(int(offsets[chunk]), len(outs[i])), np.uint8)
                if crc32c(outs[i]) != int(sums[chunk]):
                    raise DamagedError(chunk)
            if keep is not None:
                keep.put(f"{key}.{chunk}", outs[i].data)


def runs(numbers: Sequence[int], lengths: Sequence[int] | Mapping[int, int], limit: int) -> list[list[int]]:
    """Ascending numbers cut into runs of neighbours of at most `limit` bytes; `lengths` are by number."""
    found: list[list[int]] = []
    size = 0
    for number in numbers:
        if found and found[-1][-1] == number - 1 and size + lengths[number] <= limit:
            found[-1].append(number)
            size += lengths[number]
        else:
            found.append([number])
            size = lengths[number]
    return found


def block_chunks(chunk_bytes: int) -> int:
    """Chunks that are read together of an array with chunks of so many bytes."""
    return max(1, BLOCK_BYTES // chunk_bytes)


class Once(Generic[T]):
    """What a function made of arguments, the last ones asked for: made once even if several threads ask at a time."""

    def __init__(self, make: Callable[..., T], limit: int) -> None:
        self._make, self._limit = make, limit
        self._held: OrderedDict[tuple[Any, ...], Future[T]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *key: Any) -> T:
        """The result for these arguments. Raises what making it raises, and forgets that."""
        with self._lock:
            future = self._held.get(key)
            mine = future is None
            if future is None:
                future = self._held[key] = Future()
                while len(self._held) > self._limit:
                    self._held.popitem(last=False)
            else:
                self._held.move_to_end(key)
        if mine:
            try:
                future.set_result(self._make(*key))
            except BaseException as error:
                with self._lock:
                    self._held.pop(key, None)
                future.set_exception(error)
        return future.result()


def _kept(keep: Keep | None, key: str, wanted: int, out: np.ndarray) -> bool:
    """Fill `out` with a chunk that was kept, if it is there and whole."""
    data = keep.get(key) if keep is not None else None
    if data is None or keep is None:
        return False
    if len(data) != len(out) or crc32c(data) != wanted:
        keep.discard(key)
        return False
    out[:] = np.frombuffer(data, np.uint8)
    return True
