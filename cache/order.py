"""Where every row goes and when it comes back: pure functions of integers, the same on every machine and for ever.

Two permutations hide behind the word shuffle. While harvesting, contexts are drawn in the order of a keyed hash and
the rows of a shard are permuted, so a stored chunk is a sample of the whole shard. While training, whole chunks are
visited in another keyed order, `group_chunks` of them at a time, taking one row from each chunk in turn. A training
position is therefore a single integer, seeking costs nothing, and the global sequence of batches does not depend on
the number of ranks. NumPy's generators are not used: their streams may change between releases (NEP 19).

An order of up to 2²³ chunks (8.6 billion rows in chunks of 1024) is sorted once an epoch: .1 s and 8 MB per million
chunks. A longer one is a Feistel network that is evaluated only where it is asked for, so no order takes more than
64 MB.

Sources: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014); four Feistel
rounds (Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", SIAM J. Comput.
1988); cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "test", "validation")
"""Names of the splits; the index is the split's code p in every key below."""

ORDER_ID = "splitmix64-1"
"""Name of this family of permutations, stored in a cache: other constants would need another name."""

LONGEST_SORTED = 1 << 23
"""Elements of a permutation up to which it is made by sorting."""

_MASK = (1 << 64) - 1
_STRIDE = 0xD1342543DE82EF95
_HARVEST, _SHARD, _CHUNKS, _WITHIN, _SPLIT, _PRETRAIN = (
    1,
    2,
    3,
    4,
    5,
    6,
)  # second word of a key: what the permutation is for


def mix(x: int) -> int:
    """Scramble 64 bits with the SplitMix64 finaliser (a bijection)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def mix_array(x: np.ndarray) -> np.ndarray:
    """`mix` of every element of a uint64 array."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*words: int) -> int:
    """Fold integers into one 64-bit key: start at 0, then k = mix(k ^ word) for each word."""
    k = 0
    for word in words:
        k = mix(k ^ (word & _MASK))
    return k


def perm(n: int, *words: int) -> np.ndarray:
    """Permutation of range(n), int64, that depends on `words` alone.

    Sorts i by mix(i · odd constant + key): both maps are bijections, so no two i tie.
    """
    ranks = mix_array(np.arange(n, dtype=np.uint64) * np.uint64(_STRIDE) + np.uint64(key(*words)))
    return np.argsort(ranks).astype(np.int64, copy=False)


def feistel(n: int, places: np.ndarray, *words: int) -> np.ndarray:
    """Elements at `places` of another permutation of range(n), n > 1, that depends on `words` alone; int64.

    Numbers of as many bits as n - 1 has are cut into a high and a low part, which are mixed into one another in turn,
    twice each. That permutes all numbers of so many bits, fewer than 2n; one that comes out at n or above is sent
    through again until it is below (it belongs to the cycle of one that is).
    """
    bits = (n - 1).bit_length()
    low = np.uint64((bits + 1) // 2)
    low_mask, high_mask = (np.uint64((1 << b) - 1) for b in (int(low), bits - int(low)))
    keys = [np.uint64(key(*words, turn)) for turn in range(4)]
    out = places.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        a, b = out[walking] >> low, out[walking] & low_mask
        for even, odd in (keys[:2], keys[2:]):
            a = a ^ (mix_array(b ^ even) & high_mask)
            b = b ^ (mix_array(a ^ odd) & low_mask)
        out[walking] = a << low | b
        walking = walking[out[walking] >= n]
    return out.astype(np.int64)


def split_of(document_key: int, seed: int, test_fraction: float, validation_fraction: float) -> str:
    """Name of the split that a document belongs to, given a 64-bit key of its content."""
    u = key(seed, _SPLIT, document_key) / 2.0**64
    if u < test_fraction:
        return "test"
    return "validation" if u < test_fraction + validation_fraction else "train"


def context_order(n_contexts: int, seed: int, split: str) -> np.ndarray:
    """[M] context ids in the order in which their rows enter the stream of a split."""
    return perm(n_contexts, seed, _HARVEST, SPLITS.index(split))


def shard_order(rows: int, seed: int, split: str, shard: int) -> np.ndarray:
    """[rows]: stored row j of a shard is row `shard_order[j]` of the shard's part of the stream."""
    return perm(rows, seed, _SHARD, SPLITS.index(split), shard)


def pretraining_order(rows: int, seed: int, epoch: int, chunk: int) -> np.ndarray:
    """[rows] in the order in which a language model is trained on the rows of a chunk of its text."""
    return perm(rows, seed, _PRETRAIN, epoch, chunk)


class ShardSource(NamedTuple):
    """What one shard is made of."""

    contexts: np.ndarray
    """[K] context ids to run, in stream order; the first and the last may contribute a part of their rows."""
    context: np.ndarray
    """[R] index into `contexts` of every stream row of the shard."""
    position: np.ndarray
    """[R] position of that row in its context."""


class Stream:
    """The row stream of one split: the stored rows of its contexts, in harvest order, cut to `rows`."""

    def __init__(self, stored: np.ndarray, seed: int, split: str, rows: int) -> None:
        """`stored` [M, T] bool says which positions are stored at all."""
        self.stored, self.rows = stored, rows
        self.order = context_order(stored.shape[0], seed, split)
        self.ends = np.cumsum(stored.sum(axis=1, dtype=np.int64)[self.order])

    def shard(self, index: int, shard_rows: int) -> ShardSource:
        """Contexts and positions of stream rows [index · shard_rows, (index + 1) · shard_rows)."""
        start, stop = index * shard_rows, min((index + 1) * shard_rows, self.rows)
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        contexts = self.order[first : last + 1]
        context, position = np.nonzero(self.stored[contexts])
        skipped = start - (int(self.ends[first - 1]) if first else 0)
        rows = slice(skipped, skipped + stop - start)
        return ShardSource(contexts, context[rows], position[rows])


class Segment(NamedTuple):
    """A run of consecutive positions inside one group of chunks."""

    epoch: int
    group: int
    """Number of the group within the epoch."""
    first: int
    """Offset u of the first position within the group."""
    length: int
    chunks: np.ndarray
    """[r] chunk ids of the group; offset u takes row u // r of chunk u % r."""


class ReadOrder:
    """Training order over the chunks of a split: positions 0, 1, … to rows, epoch after epoch.

    With `window_chunks` = W the chunks come window by window: positions [wWC, (w + 1)WC) of an epoch hold the rows of
    chunks [wW, (w + 1)W) and no others, so that no more than W chunks need to exist at a time (and the next W to go on
    with). Without, the split is one window.
    """

    def __init__(
        self,
        n_chunks: int,
        chunk_rows: int,
        seed: int,
        split: str,
        group_chunks: int,
        window_chunks: int | None = None,
    ) -> None:
        self.n_chunks, self.chunk_rows, self.group_chunks = n_chunks, chunk_rows, group_chunks
        self.window_chunks = n_chunks if window_chunks is None else min(window_chunks, n_chunks)
        self.seed, self.code = seed, SPLITS.index(split)
        self._words: tuple[int, ...] = ()  # of the permutation sorted last
        self._sorted = np.empty(0, np.int64)

    def segments(self, start: int, count: int) -> Iterator[Segment]:
        """Cut positions [start, start + count) at borders of groups; no group reaches over the end of a window."""
        stop = start + count
        groups = -(-self.window_chunks // self.group_chunks)  # of a full window
        while start < stop:
            epoch, q = divmod(start, self.n_chunks * self.chunk_rows)
            window, q = divmod(q, self.window_chunks * self.chunk_rows)
            group, u = divmod(q, self.group_chunks * self.chunk_rows)
            before, place = window * self.window_chunks, group * self.group_chunks
            end = min(place + self.group_chunks, self.window_chunks, self.n_chunks - before)
            chunks = self.chunks(epoch, before + place, end - place)
            taken = min(stop - start, len(chunks) * self.chunk_rows - u)
            yield Segment(epoch, window * groups + group, u, taken, chunks)
            start += taken

    def chunks(self, epoch: int, first: int, count: int) -> np.ndarray:
        """[count] ids of the chunks that come at places [first, first + count) of an epoch."""
        pieces, stop = [], first + count
        while first < stop:
            window, place = divmod(first, self.window_chunks)
            before = window * self.window_chunks
            length = min(self.window_chunks, self.n_chunks - before)
            taken = min(stop - first, length - place)
            pieces.append(before + self._permuted(length, epoch, window, place, taken))
            first += taken
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _permuted(self, n: int, epoch: int, window: int, first: int, count: int) -> np.ndarray:
        """Elements [first, first + count) of the permutation of a window of n chunks."""
        windowed = self.window_chunks < self.n_chunks
        words = (self.seed, _CHUNKS, self.code, epoch, *((window,) if windowed else ()))
        if n > LONGEST_SORTED:
            return feistel(n, np.arange(first, first + count), *words)
        if words != self._words:
            self._words, self._sorted = words, perm(n, *words)
        return self._sorted[first : first + count]

    def within(self, epoch: int, chunk: int) -> np.ndarray | None:
        """[C] order of the rows of a chunk, or None for the stored order, which epoch 0 keeps."""
        return perm(self.chunk_rows, self.seed, _WITHIN, self.code, epoch, chunk) if epoch else None

    def rows(self, start: int, count: int) -> np.ndarray:
        """[count] stored rows at positions [start, start + count): the plain definition that `Batches` must meet."""
        out = []
        for segment in self.segments(start, count):
            u = np.arange(segment.first, segment.first + segment.length)
            turn, chunk = u // len(segment.chunks), segment.chunks[u % len(segment.chunks)]
            if segment.epoch:
                inner = {int(c): self.within(segment.epoch, int(c)) for c in segment.chunks}
                turn = np.array([inner[int(c)][a] for c, a in zip(chunk, turn, strict=True)])  # type: ignore[index]
            out.append(chunk * self.chunk_rows + turn)
        return np.concatenate(out) if out else np.empty(0, np.int64)
