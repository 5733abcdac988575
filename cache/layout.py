"""What a cache looks like on disk: names, dtypes, sizes and the Zarr v3 metadata of every array.

Everything here is a pure function of the plan (`Plan`), so any process that knows the plan writes the same metadata
and any shard at any time. Arrays use Zarr's `sharding_indexed` codec without compression: a shard file is then a plain
[S, d] block followed by an index of its chunks, which we map into memory and which stock zarr reads as usual.

    zarr.json              root group; its attributes are the plan
    MANIFEST.json          written last: a cache without it is not a cache
    commits/<split>.<i>.json
    <split>/<site>, <site>.scale, token_id, document_id, source, keep, moments, contexts/{token_id,document_id,keep}
    calibration/<site>     [2, d] μ and σ (int8z)
    stats/<site>           [2, 2, d] (kept rows, all stored rows) × (mean, variance)

Left out: per-chunk `crc32c` codecs. Four more bytes would break the 4 KiB alignment of chunks, so the checksums of
chunks live in the commit records.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from crc32c import crc32c as _crc32c

from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.order import SPLITS

FORMAT = "thresher-cache"
VERSION = 2
Codec = Literal["int8z", "bf16", "bf16-lz4"]
CODECS: tuple[Codec, ...] = ("int8z", "bf16", "bf16-lz4")
CODEC_IDS = {"int8z": "int8z-1", "bf16": "bf16-1", "bf16-lz4": "bf16-lz4-1"}
"""Name of each codec's definition: other numbers from the same activations would need another name."""
Store = Literal["kept", "all"]

KEPT, SPECIAL = 1, 2
PROVENANCE = ("token_id", "document_id", "source", "keep")
CONTEXT_ARRAYS = ("token_id", "document_id", "keep")

BLOSC: dict[str, Any] = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
"""How chunks of a compressed array are compressed, as Zarr's `blosc` codec states it."""

_CHUNK_ROWS, _CHUNK_BYTES = 1024, 2 << 20
_SHARD_ROWS = 1 << 18
_MISSING = (1 << 64) - 1  # offset and length of a chunk that a shard does not hold


class Contexts(NamedTuple):
    """Packed tokens of one split: M contexts of T tokens."""

    token_id: np.ndarray
    """[M, T] int32."""
    document_id: np.ndarray
    """[M, T] int32, -1 on padding."""
    keep: np.ndarray
    """[M, T] uint8: 0 padding, 1 kept, 2 special (position 0, special-token ids)."""

    def stored(self, store: Store) -> np.ndarray:
        """[M, T] bool: the positions whose activations are stored."""
        return self.keep == KEPT if store == "kept" else self.keep > 0


class ArraySpec(NamedTuple):
    """One Zarr array."""

    shape: tuple[int, ...]
    dtype: str
    """Zarr v3 name."""
    chunk: tuple[int, ...]
    """Inner chunk: the unit that carries a checksum."""
    shard: tuple[int, ...] | None
    """Shape of a shard file; None for a plain chunk per file with a `crc32c` codec."""
    fill: int | str
    """What a reader sees where a piece is missing: never plausible data."""
    compressed: bool = False
    """Whether inner chunks pass through blosc (lz4 over bit-shuffled elements). The size of a chunk then varies and
    stands in the commit record."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * item_size(self.dtype)

    def file_rows(self, index: int) -> int:
        """Rows in shard file `index`, rounded up to whole chunks."""
        assert self.shard is not None
        rows = min(self.shard[0], self.shape[0] - index * self.shard[0])
        return -(-rows // self.chunk[0]) * self.chunk[0]

    @property
    def index_bytes(self) -> int:
        """Size of the index at the end of a shard file."""
        assert self.shard is not None
        return 16 * (self.shard[0] // self.chunk[0]) + 4

    def file_bytes(self, index: int) -> int:
        """Size of shard file `index`: its chunks and the index."""
        assert not self.compressed, "the size of compressed chunks is known to the commit record alone"
        return self.file_rows(index) * self.row_bytes + self.index_bytes

    def file_name(self, index: int) -> str:
        """Name of shard or chunk file `index` along the first axis."""
        return ".".join(["c", str(index), *["0"] * (len(self.shape) - 1)])

    def zarr_json(self, attributes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The array's metadata document."""
        raw: dict[str, Any] = {"name": "bytes"}
        if item_size(self.dtype) > 1:
            raw["configuration"] = {"endian": "little"}
        inner = [raw]
        if self.compressed:
            inner.append({"name": "blosc", "configuration": {**BLOSC, "typesize": item_size(self.dtype)}})
        checksum = {"name": "crc32c"}
        codecs: list[dict[str, Any]] = [raw, checksum]
        if self.shard is not None:
            index = [{"name": "bytes", "configuration": {"endian": "little"}}, checksum]
            sharding = {
                "chunk_shape": list(self.chunk),
                "codecs": inner,
                "index_codecs": index,
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.shard or self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": self.fill,
            "codecs": codecs,
            "attributes": dict(attributes or {}),
        }


def group_json(attributes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The metadata document of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})}


def item_size(dtype: str) -> int:
    """Bytes of one element of a Zarr dtype that a cache uses."""
    return {"int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "float64": 8}[dtype]


def raw_dtype(dtype: str) -> np.dtype[Any]:
    """NumPy dtype in which we handle an array; bfloat16 travels as its bit pattern, uint16."""
    return np.dtype("<u2") if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")


def calibration_array(site: Site) -> ArraySpec:
    """μ and σ of one site."""
    return ArraySpec((2, site.width), "float32", (2, site.width), None, "NaN")


def stats_array(site: Site) -> ArraySpec:
    """Mean and variance of one site over kept rows, then over all stored rows."""
    return ArraySpec((2, 2, site.width), "float64", (2, 2, site.width), None, "NaN")


def row_sizes(widths: Iterable[int], train_rows: int) -> tuple[int, int]:
    """(C, S): rows of a chunk and of a shard.

    C is the largest power of two up to 1024 whose widest bf16 chunk stays within 2 MiB; S is 2¹⁸, halved until `train`
    has 8 shards but not below 16 C. Under 64 C rows C shrinks to keep 64 chunks (not below 16 rows), so that a small
    cache is still shuffled well and loses no more than a 64th of its rows to the cut.
    """
    chunk = min(_CHUNK_ROWS, 1 << (_CHUNK_BYTES // (2 * max(widths))).bit_length() - 1)
    while chunk > 16 and train_rows < 64 * chunk:
        chunk //= 2
    shard = _SHARD_ROWS
    while shard > 16 * chunk and train_rows <= 7 * shard:
        shard //= 2
    return chunk, shard


def estimate_bytes(
    sites: Sequence[Site], codec: str, rows: int, tokens: int, shards: int, *, provenance: bool = True
) -> int:
    """Bytes of a cache: `rows` stored rows cut from `tokens` packed tokens. Metadata and indices add about .01 %.

    A part without `provenance` holds activations alone. bf16-lz4 is counted as if it did not compress.
    """
    per_row = sum(site.width + 2 if codec == "int8z" else 2 * site.width for site in sites) + 17 * provenance
    return rows * per_row + 9 * tokens + 16 * (1 + sum(2 * site.width + 2 for site in sites)) * shards


def check_sites(sites: Sequence[Site]) -> None:
    """Raise UserError for site names that cannot be array names."""
    taken = {*PROVENANCE, "moments", "contexts"}
    for site in sites:
        if site.name in taken or not site.name or set(site.name) & set('/\\:*?"<>|') or site.name.startswith("."):
            raise UserError(
                f"site {site.name!r} cannot name an array of the cache: expected a name that is unique, not reserved "
                f"and usable as a folder. Rename the site."
            )
        taken |= {site.name, f"{site.name}.scale"}
    if not sites:
        raise UserError("harvest.sites is empty: expected at least one site to store. Name one, for example mlp_out.")


def shard_index(spec: ArraySpec, rows: int) -> bytes:
    """The tail of a shard file that holds the first `rows` rows uncompressed."""
    return chunk_index(spec, [spec.chunk[0] * spec.row_bytes] * (rows // spec.chunk[0]))


def chunk_index(spec: ArraySpec, lengths: Sequence[int]) -> bytes:
    """The tail of a shard file whose first chunks lie end to end with these lengths in bytes.

    Offset and length of every chunk, then the CRC32C over them; chunks that the shard does not hold are marked so.
    """
    assert spec.shard is not None
    table = np.full((spec.shard[0] // spec.chunk[0], 2), _MISSING, dtype="<u8")
    table[: len(lengths), 1] = lengths
    table[: len(lengths), 0] = np.concatenate([[0], np.cumsum(lengths, dtype=np.uint64)])[: len(lengths)]
    raw = table.tobytes()
    return raw + struct.pack("<I", crc32c(raw))


def crc32c(data: bytes | np.ndarray) -> int:
    """CRC32C (Castagnoli) of bytes or of a contiguous array."""
    view = data.reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else data
    return int(_crc32c(view, gil_release_mode=1))


def known_split(split: str, splits: Iterable[str]) -> str:
    """`split` itself, or UserError listing the known ones."""
    if split not in splits:
        raise UserError(f"split is {split!r}; this cache has {', '.join(splits)} (of {', '.join(SPLITS)}).")
    return split
