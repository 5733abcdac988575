"""Reading a complete cache: what it holds, any row of it, and whether every bit is still right.

`open` needs the manifest, the same identity, and every shard file with its planned size; it reads no activations.
Shard files are mapped into memory: an uncompressed shard is a plain [S, d] block. The first touch of a chunk in a
process checks its CRC32C, and the first touch of a shard its commit record and the index at its end.

Left out: zarr-python, ten to forty times slower on the same files; the tests show that it reads the same bits.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.arrays import check_size, read_file, read_plain, read_sharded
from thresher.cache.codec import Calibration, decode
from thresher.cache.commit import MANIFEST, ROOT, committed, read_commit, shard_files
from thresher.cache.contracts import Site, UserError
from thresher.cache.layout import (
    CONTEXT_ARRAYS,
    FORMAT,
    PROVENANCE,
    VERSION,
    ArraySpec,
    Codec,
    Contexts,
    calibration_array,
    crc32c,
    known_split,
    raw_dtype,
    shard_index,
    stats_array,
)
from thresher.cache.plan import Plan
from thresher.cache.publish import read_sealed
from thresher.cache.records import differences, nearest
from thresher.cache.stats import SiteStats


class Provenance(NamedTuple):
    """Where every stored row of a split comes from."""

    token_id: np.ndarray
    """[N] int32."""
    document_id: np.ndarray
    """[N] int32."""
    context: np.ndarray
    """[N] int32, into `CacheReader.contexts`."""
    position: np.ndarray
    """[N] int32."""
    keep: np.ndarray
    """[N] uint8: 1 kept, 2 special."""


class CacheReader:
    """A complete cache, opened for reading. Use `open`."""

    def __init__(self, path: Path, plan: Plan, facts: dict[str, Any], manifest: dict[str, Any]) -> None:
        self.path, self.plan, self.facts = path, plan, facts
        self.identity: dict[str, Any] = plan.identity
        self.fingerprint: str = plan.fingerprint
        self.codec: Codec = plan.codec
        self.sites: dict[str, Site] = {site.name: site for site in plan.sites}
        self._files: dict[str, dict[str, Any]] = manifest["files"]
        self._checked: dict[tuple[str, str], np.ndarray] = {}
        self._commit = lru_cache(maxsize=4096)(lambda split, index: read_commit(path, plan, split, index))
        self._map = lru_cache(maxsize=8192)(self._open_map)
        self._specs = {split: plan.sharded_arrays(split) for split in plan.splits}

    @classmethod
    def open(cls, path: Path, *, identity: Mapping[str, Any] | None = None) -> "CacheReader":
        """Open the cache at `path`.

        Raises UserError when it is missing, incomplete, damaged, newer than this program, or, with `identity`, made
        of something else.
        """
        plan, facts = _read_root(path)
        if identity is not None:
            lines = differences(json.loads(json.dumps(dict(identity))), plan.identity)
            if lines:
                raise UserError(
                    f"the cache {path} was made of something else: {'; '.join(lines)}. Harvest again with this recipe, "
                    f"or point --cache at the cache that belongs to it."
                )
        if not (path / MANIFEST).exists():
            total = sum(sizes.shards for sizes in plan.splits.values())
            raise UserError(
                f"the cache {path} is incomplete: {len(committed(path, plan))} of {total} shards are committed and "
                f"there is no {MANIFEST}. Run the same harvest again; it goes on where it stopped."
            )
        manifest = read_sealed(path / MANIFEST)
        reader = cls(path, plan, facts, manifest)
        reader._side_file(ROOT)
        for split, sizes in plan.splits.items():
            for index in range(sizes.shards):
                arrays = reader._commit(split, index)["arrays"] if plan.codec == "bf16-lz4" else {}
                for name, size in shard_files(plan, split, index, arrays).items():
                    file = path / name
                    check_size(file, file.stat().st_size if file.exists() else 0, size)
        return reader

    def rows(self, split: str) -> int:
        """Stored rows of a split."""
        return self.plan.splits[known_split(split, self.plan.splits)].rows

    def statistics(self, site: str) -> SiteStats:
        """Statistics of a site over the kept rows of train."""
        spec = stats_array(self.site(site))
        attributes = json.loads(self._side_file(f"stats/{site}/zarr.json"))["attributes"]
        self._side_file(f"stats/{site}/{spec.file_name(0)}")
        mean, variance = read_plain(self.path / "stats" / site, spec)[0]
        scalars = {key: attributes[key][0] for key in ("count", "mean_norm", "mean_sq_norm", "total_variance")}
        return SiteStats(mean=mean, variance=variance, **scalars)

    def site(self, name: str) -> Site:
        """A stored site by name, or UserError with near misses."""
        if name not in self.sites:
            raise UserError(
                f"the cache {self.path} does not hold site {name!r}.{nearest(name, self.sites)} It holds "
                f"{', '.join(self.sites)}. Choose one of them, or harvest again with that site."
            )
        return self.sites[name]

    def contexts(self, split: str) -> Contexts:
        """The packed tokens of a split, checked against their digests."""
        known_split(split, self.plan.splits)
        arrays = {}
        for name in CONTEXT_ARRAYS:
            folder = self.path / split / "contexts" / name
            array = read_sharded(folder, self.plan.context_arrays(split)[name])
            if hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() != self.plan.splits[split].sha256[name]:
                raise UserError(f"{folder} is damaged: its digest differs from the plan's. Harvest again elsewhere.")
            arrays[name] = array
        return Contexts(**arrays)

    def provenance(self, split: str) -> Provenance:
        """Token, document, context and position of every stored row."""
        n_chunks = self.rows(split) // self.plan.chunk_rows
        parts = {}
        for name in PROVENANCE:
            chunks = [self.chunk(split, name, c) for c in range(n_chunks)]
            parts[name] = np.concatenate(chunks) if chunks else np.empty(self._specs[split][name].shape, np.int32)
        source = parts.pop("source")
        return Provenance(context=source[:, 0], position=source[:, 1], **parts)

    def calibration(self, site: str) -> Calibration | None:
        """μ and σ of an int8z site; None for bf16."""
        if self.codec != "int8z":
            return None
        spec = calibration_array(self.site(site))
        self._side_file(f"calibration/{site}/{spec.file_name(0)}")
        mean, std = torch.from_numpy(read_plain(self.path / "calibration" / site, spec).copy())
        return Calibration(mean, std)

    def gather(self, split: str, site: str, rows: np.ndarray) -> Tensor:
        """[n, d] float32: any rows of a site, decoded. The plain path; `Batches` is the fast one."""
        names = [site] if self.site(site) and self.codec == "bf16" else [site, f"{site}.scale"]
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows(split)):
            raise UserError(f"rows of {split!r} are 0 to {self.rows(split) - 1}; got {rows.min()} to {rows.max()}.")
        chunk, inner = np.divmod(rows, self.plan.chunk_rows)
        order = np.argsort(chunk, kind="stable")
        borders = np.flatnonzero(np.diff(chunk[order])) + 1
        raw = {}
        for name in names:
            spec = self._specs[split][name]
            raw[name] = np.empty((len(rows), *spec.shape[1:]), raw_dtype(spec.dtype))
            for here in np.split(order, borders) if len(rows) else []:
                raw[name][here] = self.chunk(split, name, int(chunk[here[0]]))[inner[here]]
        scale = torch.from_numpy(raw[names[1]]) if len(names) > 1 else None
        return decode(as_codes(raw[site]), scale, self.calibration(site), torch.float32)

    def chunk(self, split: str, name: str, index: int) -> np.ndarray:
        """[C, …] read-only view of a chunk of an array, checked on first touch. Raises UserError naming it."""
        per_shard = self.plan.shard_rows // self.plan.chunk_rows
        shard, inner = divmod(index, per_shard)
        view = self._map(split, name, shard)[inner * self.plan.chunk_rows : (inner + 1) * self.plan.chunk_rows]
        checked = self._checked.get((split, name))
        if checked is None:
            checked = self._checked[split, name] = np.zeros(self.rows(split) // self.plan.chunk_rows, bool)
        if not checked[index]:
            if f"{crc32c(view):08x}" != self._commit(split, shard)["arrays"][name]["crc32c"][inner]:
                raise UserError(_damaged(self.path, split, name, shard, inner))
            checked[index] = True
        return view

    def verify(self) -> list[str]:
        """Read every byte of the cache; one line per fault, [] when it is sound."""
        from thresher.cache.verify import faults

        return faults(self.path, self.plan, read_sealed(self.path / MANIFEST))

    def summary(self) -> dict[str, Any]:
        """What the cache holds and how good it is: JSON values for `thresher cache info`."""
        quality: dict[str, list[dict[str, float]]] = {name: [] for name in self.sites}
        size = sum(entry["bytes"] for entry in self._files.values())
        for split, sizes in self.plan.splits.items():
            for index in range(sizes.shards):
                record = self._commit(split, index)
                size += sum(shard_files(self.plan, split, index, record["arrays"]).values())
                for name, q in record["quality"].items():
                    quality[name].append(q)
        sites = {}
        for name, site in self.sites.items():
            s, fvu = self.statistics(name), [q["fvu"] for q in quality[name]]
            sites[name] = {
                "width": site.width,
                "fvu_median": float(np.median(fvu)),
                "fvu_worst": max(fvu),
                "fvu_worst_dimension": max(q["worst"] for q in quality[name]),
                "mean_norm": s.mean_norm,
                "mean_sq_norm": s.mean_sq_norm,
                "total_variance": s.total_variance,
            }
        return {
            "path": str(self.path),
            "fingerprint": self.fingerprint,
            "codec": self.codec,
            "store": self.plan.store,
            "bytes": size,
            "chunk_rows": self.plan.chunk_rows,
            "shard_rows": self.plan.shard_rows,
            "splits": {name: _without_digests(sizes._asdict()) for name, sizes in self.plan.splits.items()},
            "sites": sites,
            "facts": self.facts,
        }

    def _side_file(self, name: str) -> bytes:
        """Content of a file that the manifest lists, checked. Raises UserError when it changed."""
        data = read_file(self.path / name)
        entry = self._files.get(name, {})
        if entry.get("sha256") != hashlib.sha256(data).hexdigest():
            raise UserError(
                f"{self.path / name} is damaged or was changed: its SHA-256 is not the one in {MANIFEST}. Restore the "
                f"file, or remove the cache and harvest again."
            )
        return data

    def _open_map(self, split: str, name: str, shard: int) -> np.ndarray:
        """[rows, …] read-only view of a shard file, after a look at the index at its end."""
        spec: ArraySpec = self._specs[split][name]
        rows = self.plan.shard_rows_of(split, shard)
        path = self.path / split / name / spec.file_name(shard)
        size = spec.file_bytes(shard)
        check_size(path, path.stat().st_size, size)
        # A private mapping through torch closes its descriptor, so thousands of shards do not exhaust the limit.
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
        body = rows * spec.row_bytes
        if mapped[body:].tobytes() != shard_index(spec, rows):
            raise UserError(f"{path} is damaged: the index at its end is wrong. Restore the file or harvest again.")
        view = mapped[:body].view(raw_dtype(spec.dtype)).reshape(rows, *spec.shape[1:])
        view.flags.writeable = False
        return view


def find_complete(path: Path, identity: Mapping[str, Any]) -> CacheReader | None:
    """The finished cache with this identity at `path`, or None; what else may be there is for the writer to judge."""
    if not (path / MANIFEST).exists() or not (path / ROOT).exists():
        return None
    if differences(json.loads(json.dumps(dict(identity))), _read_root(path)[0].identity):
        return None
    return CacheReader.open(path)


def as_codes(raw: np.ndarray) -> Tensor:
    """Stored rows as a tensor: bf16 patterns (uint16) become bfloat16, codes stay int8; nothing is copied."""
    return (
        torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16) if raw.dtype == np.uint16 else torch.from_numpy(raw)
    )


def _read_root(path: Path) -> tuple[Plan, dict[str, Any]]:
    """Plan and facts of the cache at `path`, or UserError when there is none that this program understands."""
    root = path / ROOT
    if not root.exists():
        raise UserError(f"there is no cache at {path}: {root} is missing. Run harvest first, or correct --cache PATH.")
    try:
        raw = json.loads(root.read_bytes())["attributes"]["thresher"]
        found, version = raw["format"], int(raw["version"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{root} is not the root of a Thresher cache: expected a Zarr group with the attribute 'thresher'. "
            f"Correct --cache PATH, or restore the file if it was one."
        ) from None
    if found != FORMAT or version > VERSION:
        raise UserError(
            f"the cache {path} has format {found!r} version {version}; this program reads {FORMAT!r} up to version "
            f"{VERSION}. Update thresher to read it."
        )
    return Plan.from_json(raw), raw["facts"]


def _damaged(path: Path, split: str, name: str, shard: int, chunk: int) -> str:
    return (
        f"the cache {path} is damaged: chunk {chunk} of shard {shard} of {split}/{name} does not match its checksum. "
        f"Delete commits/{split}.{shard}.json and MANIFEST.json and run harvest again to write that shard anew."
    )


def _without_digests(split: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in split.items() if key != "sha256"}
