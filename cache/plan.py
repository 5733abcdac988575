"""The plan of a cache: everything that decides which bytes it holds, except the activations themselves.

The plan is stored once, as attributes of the root group. All metadata below it, the size of every file and the content
of every shard follow from it, so any process that knows the plan can do any part of the work.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.layout import (
    CODECS,
    CONTEXT_ARRAYS,
    FORMAT,
    VERSION,
    ArraySpec,
    Codec,
    Contexts,
    Store,
    calibration_array,
    check_sites,
    estimate_bytes,
    group_json,
    row_sizes,
)
from thresher.cache.order import ORDER_ID, SPLITS
from thresher.cache.records import fingerprint

_ROW_BYTES = 60  # of a row of a shard: order, place, context, position (int64 each), provenance and what makes it
_CALIBRATION_ROWS = 65_536
_KERNEL_BYTES, _COMPRESSOR_BYTES = 40_000_000, 30_000_000


class SplitPlan(NamedTuple):
    """One split: its contexts and how many of their rows are stored."""

    contexts: int
    """M."""
    tokens: int
    """T."""
    rows: int
    """N, a multiple of the chunk."""
    shards: int
    dropped: int
    """Rows at the end of the stream that did not fill a chunk."""
    sha256: dict[str, str]
    """Digest of each contexts array."""


class Extends(NamedTuple):
    """What a part adds to a cache that is there already."""

    kind: Literal["sites", "tokens"]
    """sites: more sites of the same rows. tokens: a segment of other text, at all sites of the cache."""
    base: str
    """Fingerprint of the part that it extends."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides which bytes a part of a cache holds, except the activations themselves."""

    identity: dict[str, Any]
    """What the fingerprint is of, as plain JSON values."""
    sites: tuple[Site, ...]
    codec: Codec
    store: Store
    seed: int
    chunk_rows: int
    """C."""
    shard_rows: int
    """S."""
    splits: dict[str, SplitPlan]
    extends: Extends | None = None
    """None for a part that stands by itself."""
    window_shards: int | None = None
    """Shards of train that a window holds, where only some windows exist at a time; None: all of them are kept."""

    @property
    def rows_stored_elsewhere(self) -> bool:
        """Whether tokens and provenance of the rows are those of the part that this one extends."""
        return self.extends is not None and self.extends.kind == "sites"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity."""
        return fingerprint(self.identity)

    @property
    def moments_width(self) -> int:
        """P: a count, then mean, M2, Σ‖x‖ and Σ‖x‖² of every site."""
        return 1 + sum(2 * site.width + 2 for site in self.sites)

    def shard_rows_of(self, split: str, index: int) -> int:
        """Rows in one shard."""
        return min(self.shard_rows, self.splits[split].rows - index * self.shard_rows)

    def site_arrays(self, split: str) -> dict[str, ArraySpec]:
        """Specification of each array of activations, and of their scales, by name."""
        n, c, s = self.splits[split].rows, self.chunk_rows, self.shard_rows
        specs = {}
        for site in self.sites:
            dtype, fill = ("int8", -128) if self.codec == "int8z" else ("bfloat16", "NaN")
            compressed = self.codec == "bf16-lz4"
            specs[site.name] = ArraySpec((n, site.width), dtype, (c, site.width), (s, site.width), fill, compressed)
            if self.codec == "int8z":
                specs[f"{site.name}.scale"] = ArraySpec((n,), "float16", (c,), (s,), "NaN")
        return specs

    def sharded_arrays(self, split: str) -> dict[str, ArraySpec]:
        """`site_arrays` and the provenance of each row: all that one commit covers, but the moments."""
        if self.rows_stored_elsewhere:
            return self.site_arrays(split)
        n, c, s = self.splits[split].rows, self.chunk_rows, self.shard_rows
        return self.site_arrays(split) | {
            "token_id": ArraySpec((n,), "int32", (c,), (s,), -1),
            "document_id": ArraySpec((n,), "int32", (c,), (s,), -1),
            "source": ArraySpec((n, 2), "int32", (c, 2), (s, 2), -1),
            "keep": ArraySpec((n,), "uint8", (c,), (s,), 255),
        }

    def moments_array(self, split: str) -> ArraySpec:
        """Sums of every shard over kept and over special rows."""
        width = self.moments_width
        return ArraySpec((self.splits[split].shards, 2, width), "float64", (1, 2, width), None, "NaN")

    def context_arrays(self, split: str) -> dict[str, ArraySpec]:
        """The packed tokens themselves; none where another part holds them."""
        if self.rows_stored_elsewhere:
            return {}
        m, t = self.splits[split].contexts, self.splits[split].tokens
        shapes = ((m, t), (256, t), (16384, t))
        return {
            "token_id": ArraySpec(shapes[0], "int32", shapes[1], shapes[2], -1),
            "document_id": ArraySpec(shapes[0], "int32", shapes[1], shapes[2], -1),
            "keep": ArraySpec(shapes[0], "uint8", shapes[1], shapes[2], 255),
        }

    def documents(self) -> dict[str, dict[str, Any]]:
        """Every `zarr.json` below the root that follows from the plan alone, by path."""
        out = {}
        for split in self.splits:
            out[split] = group_json()
            if not self.rows_stored_elsewhere:
                out[f"{split}/contexts"] = group_json()
            arrays = self.sharded_arrays(split) | {"moments": self.moments_array(split)}
            arrays |= {f"contexts/{name}": spec for name, spec in self.context_arrays(split).items()}
            out |= {f"{split}/{name}": spec.zarr_json() for name, spec in arrays.items()}
        if self.codec == "int8z":
            out["calibration"] = group_json()
            out |= {f"calibration/{s.name}": calibration_array(s).zarr_json() for s in self.sites}
        out["stats"] = group_json()
        return {f"{path}/zarr.json": document for path, document in out.items()}

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values: root attributes, without facts."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "order": ORDER_ID,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "codec": self.codec,
            "store": self.store,
            "seed": self.seed,
            "chunk_rows": self.chunk_rows,
            "shard_rows": self.shard_rows,
            "sites": [{k: v for k, v in site._asdict().items() if k != "aliases"} for site in self.sites],
            "aliases": {site.name: list(site.aliases) for site in self.sites if site.aliases},
            "splits": {name: split._asdict() for name, split in self.splits.items()},
            "extends": None if self.extends is None else self.extends._asdict(),
            "window_shards": self.window_shards,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_json`, for attributes that passed a checksum."""
        return cls(
            identity=dict(raw["identity"]),
            sites=tuple(
                Site(**site, aliases=tuple(raw.get("aliases", {}).get(site["name"], ()))) for site in raw["sites"]
            ),
            codec=raw["codec"],
            store=raw["store"],
            seed=raw["seed"],
            chunk_rows=raw["chunk_rows"],
            shard_rows=raw["shard_rows"],
            splits={name: SplitPlan(**split) for name, split in raw["splits"].items()},
            extends=None if raw["extends"] is None else Extends(**raw["extends"]),
            window_shards=raw["window_shards"],
        )


def make_plan(
    identity: Mapping[str, Any],
    sites: Sequence[Site],
    contexts: Mapping[str, Contexts],
    codec: Codec,
    seed: int,
    store: Store,
    extends: Extends | None = None,
    base: Plan | None = None,
    window_bytes: int | None = None,
) -> Plan:
    """Decide all sizes of a part. Raises UserError for sites, codec or tokens that cannot be stored.

    A part that extends another (`base`) has its sizes of chunks and shards. `window_bytes` bounds what the shards of
    train take that exist at a time: three windows of them.
    """
    check_sites(sites)
    if codec not in CODECS:
        raise UserError(f"harvest.codec is {codec!r}; expected one of {', '.join(CODECS)}.")
    if not set(contexts) <= set(SPLITS) or "train" not in contexts:
        raise UserError(f"splits are {sorted(contexts)}; expected train and optionally the others of {SPLITS}.")
    stored = {split: int(packed.stored(store).sum()) for split, packed in contexts.items()}
    chunk_rows, shard_rows = row_sizes([site.width for site in sites], stored["train"])
    if base is not None:
        chunk_rows, shard_rows = base.chunk_rows, base.shard_rows
    splits = {}
    for split in (name for name in SPLITS if name in contexts):
        packed, rows = contexts[split], stored[split] // chunk_rows * chunk_rows
        digests = {name: hashlib.sha256(context_array(packed, name).data).hexdigest() for name in CONTEXT_ARRAYS}
        m, t = packed.token_id.shape
        splits[split] = SplitPlan(m, t, rows, -(-rows // shard_rows), stored[split] - rows, digests)
    if not splits["train"].rows:
        raise UserError(
            f"the train split has {stored['train']} rows to store, expected at least {chunk_rows}. Give harvest more "
            f"text, or make data.test_fraction smaller."
        )
    plain = json.loads(json.dumps(dict(identity)))
    return Plan(
        identity=plain,
        sites=tuple(sites),
        codec=codec,
        store=store,
        seed=seed,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
        splits=splits,
        extends=extends,
        window_shards=None if window_bytes is None else _window_shards(sites, codec, shard_rows, window_bytes),
    )


def _window_shards(sites: Sequence[Site], codec: Codec, shard_rows: int, window_bytes: int) -> int:
    """Shards of a window: the last one, the one in use and the next share the space."""
    shard_bytes = estimate_bytes(sites, codec, shard_rows, 0, 1)
    if window_bytes < 3 * shard_bytes:
        raise UserError(
            f"harvest.window_gb is {window_bytes / 1e9:g}; expected at least {3 * shard_bytes / 1e9:.3g}, the size of "
            f"three shards of {shard_rows:,} rows at {len(sites)} sites. Give it more, or harvest fewer sites."
        )
    return window_bytes // (3 * shard_bytes)


def estimate_memory(plan: Plan, *, token_bytes: int, results: int, kept: int, passing: int) -> int:
    """Bytes of host memory that filling a part takes at its peak, beside the model: the largest of three moments.

    1. Two shards are alive, one being filled and one on its way to the disk (their buffers, and 60 bytes a row for
       where each row comes from and goes), while passes run. It is one shard less where each is on the disk before
       the first pass of the next is over.
    2. With int8z, the rows that μ and σ are taken from lie beside the first shard and are encoded; no pass runs.
    3. Before that, they are complete and measured while passes run, and the shard is still empty.

    Numba and the kernels that encode take 40 MB (some 35 more in a process that has to compile them), compressing
    another 30. The contexts take 10 bytes a token, a row `token_bytes` before it is encoded. Forward passes take, all
    together: `results` bytes for activations that wait for the shard, `kept` that stay with them between passes, and
    `passing` only while they run.
    """
    rows = min(plan.shard_rows, max(sizes.rows for sizes in plan.splits.values()))
    shards = sum(sizes.shards for sizes in plan.splits.values())
    shard = rows * (sum(spec.row_bytes for spec in plan.site_arrays("train").values()) + _ROW_BYTES)
    waiting = min(_CALIBRATION_ROWS, rows) * token_bytes if plan.codec == "int8z" else 0
    kernels = _KERNEL_BYTES + (_COMPRESSOR_BYTES if plan.codec == "bf16-lz4" else 0)
    moments = (
        min(shards, 2) * shard + passing,
        shard + waiting,
        rows * _ROW_BYTES + waiting + passing,
    )
    contexts = sum((9 + 1) * sizes.contexts * sizes.tokens for sizes in plan.splits.values())
    return max(moments) + kernels + contexts + results + kept


def context_array(packed: Contexts, name: str) -> np.ndarray:
    """One array of the packed tokens, contiguous and in its stored dtype."""
    return np.ascontiguousarray(getattr(packed, name), np.uint8 if name == "keep" else "<i4")
