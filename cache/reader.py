"""Reading a cache: a base part and the parts that extend it, joined.

Parts of kind `sites` add sites to rows that are there; parts of kind `tokens` add rows, a segment each, at all sites of
the cache. Chunks of a split are numbered through the segments, the base's first, so that everything above sees one
cache. A part that is in the making does not count; one that was finished and is lost is refused (`index`).

While a reader is open it holds a shared lock, so that nothing is pruned under it.
"""

import json
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from thresher.cache import stats
from thresher.cache.codec import Calibration, decode
from thresher.cache.commit import MANIFEST, PARTS, ROOT, harvest_again, is_complete, shard_files
from thresher.cache.contracts import Site, UserError
from thresher.cache.index import INDEX, loss, read_index
from thresher.cache.layout import KEPT, PROVENANCE, ArraySpec, Codec, Contexts, Store, known_split, raw_dtype
from thresher.cache.locks import READ, Lock, share
from thresher.cache.order import SPLITS, ReadOrder
from thresher.cache.part import Part
from thresher.cache.records import differences, fingerprint, nearest
from thresher.cache.sites import unmet
from thresher.cache.stats import SiteStats
from thresher.cache.stored import read_root

_SAMPLED_CHUNKS = 16


class Provenance(NamedTuple):
    """Where every stored row of a split comes from."""

    token_id: np.ndarray
    """[N] int32."""
    document_id: np.ndarray
    """[N] int32, distinct over all segments."""
    context: np.ndarray
    """[N] int32, into `CacheReader.contexts`."""
    position: np.ndarray
    """[N] int32."""
    keep: np.ndarray
    """[N] uint8: 1 kept, 2 special."""


class Segment:
    """Rows of one harvest of text: the part that holds them, and the parts that add sites to them."""

    def __init__(self, base: Part) -> None:
        self.base = base
        self.parts = [base]

    @property
    def sites(self) -> dict[str, Part]:
        """The part that holds each site."""
        return {name: part for part in self.parts for name in part.sites}

    def holding(self, split: str) -> dict[str, Part]:
        """The part that holds each array with one entry a row."""
        return {name: part for part in self.parts for name in part.specs.get(split, {})}


class CacheReader:
    """A complete cache, opened for reading; a `source.Source`. Use `open`."""

    def __init__(self, path: Path, segments: list[Segment], incomplete: list[str], lock: Lock | None = None) -> None:
        """`lock` is freed with the reader."""
        self.path, self.segments, self.incomplete = path, segments, incomplete
        base = segments[0].base
        self.plan, self.facts = base.plan, base.facts
        """Of the base part."""
        self.codec: Codec = base.plan.codec
        self.store: Store = base.plan.store
        self.chunk_rows: int = base.plan.chunk_rows
        held = [segment.sites for segment in segments]
        self.sites: dict[str, Site] = {
            name: part.sites[name] for name, part in held[0].items() if all(name in other for other in held)
        }
        self._holding = {split: [segment.holding(split) for segment in segments] for split in SPLITS}
        self._starts = {split: np.cumsum([0, *(s.base.rows(split) for s in segments)]) for split in SPLITS}
        self.close: Callable[[], object] = weakref.finalize(self, lock.release) if lock is not None else lambda: None
        """Let go of the lock; may be called again. What was read stays valid."""

    @classmethod
    def open(cls, path: Path, *, identity: Mapping[str, Any] | None = None) -> "CacheReader":
        """Open the cache at `path` with every complete part that extends it.

        Raises UserError when it is missing, incomplete, damaged, newer than this program, being pruned, or, with
        `identity`, made of something else; a cache that holds more sites than the identity asks for serves it too.
        """
        lock = share(path / READ)  # before anything is looked at, or it might be pruned meanwhile
        try:
            reader = cls(path, *_joined(path), lock)
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        lines = [] if identity is None else reader.unlike(identity)
        if lines:
            reader.close()
            raise UserError(
                f"the cache {path} was made of something else: {'; '.join(lines)}. Harvest again with this recipe, "
                f"or point --cache at the cache that belongs to it."
            )
        return reader

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def identity(self) -> dict[str, Any]:
        """What the fingerprint is of: the base's, with those of further segments."""
        base, *others = (segment.base.plan.identity for segment in self.segments)
        return {**base, "segments": others} if others else base

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the rows and their order; more sites change neither."""
        prints = [segment.base.fingerprint for segment in self.segments]
        return prints[0] if len(prints) == 1 else fingerprint(prints)

    def unlike(self, identity: Mapping[str, Any]) -> list[str]:
        """What differs between this cache and one that would serve `identity`: a line for each key, [] if nothing.

        It serves the identity of any of its segments, or of all, with any choice of the stored sites.
        """
        wanted = json.loads(json.dumps(dict(identity)))
        candidates = [segment.base.plan.identity for segment in self.segments] + [self.identity]
        if wanted in candidates:
            return []
        lines = [differences(_without_sites(wanted), _without_sites(one)) for one in candidates]
        if all(lines):
            return lines[0]  # against the base
        made = [part.plan.identity["harvest"] for part in self.segments[0].parts]
        return unmet(wanted["harvest"]["sites"], wanted["harvest"]["layers"], self.sites.values(), made)

    def rows(self, split: str) -> int:
        """Stored rows of a split."""
        known_split(split, [name for name in SPLITS if any(name in s.base.plan.splits for s in self.segments)])
        return int(self._starts[split][-1])

    def arrays(self, split: str) -> dict[str, ArraySpec]:
        """Every array with one entry a row, by name."""
        rows, first = self.rows(split), self._first(split)
        names = [*(n for s in self.sites for n in (s, f"{s}.scale") if n in first), *PROVENANCE]
        specs = {name: first[name].specs[split][name] for name in names}
        return {name: spec._replace(shape=(rows, *spec.shape[1:])) for name, spec in specs.items()}

    def stored_bytes(self, split: str, names: Sequence[str]) -> int:
        """Bytes that the given arrays take in memory, decompressed."""
        specs = self.arrays(split)
        return sum(specs[name].shape[0] * specs[name].row_bytes for name in names)

    def site(self, name: str) -> Site:
        """A stored site by name, or UserError with near misses."""
        if name not in self.sites:
            raise UserError(
                f"the cache {self.path} does not hold site {name!r}.{nearest(name, self.sites)} It holds "
                f"{', '.join(self.sites)}. Choose one of them, or harvest again with that site."
            )
        return self.sites[name]

    def statistics(self, site: str) -> SiteStats:
        """Statistics of a site over the kept rows of train, of all segments."""
        self.site(site)
        parts = [segment.sites[site].statistics(site) for segment in self.segments]
        return parts[0] if len(parts) == 1 else stats.merged(map(_moments, parts)).stats()

    def calibration(self, site: str) -> Calibration | None:
        """μ and σ of an int8z site; None for the other codecs."""
        self.site(site)
        return self.segments[0].sites[site].calibration(site)

    def contexts(self, split: str) -> Contexts:
        """The packed tokens of a split, checked against their digests; document ids distinct over all segments."""
        self.rows(split)
        out = []
        for segment, first in zip(self.segments, self._first_documents, strict=True):
            if split in segment.base.plan.splits:
                packed = segment.base.contexts(split)
                out.append(packed._replace(document_id=_shifted(packed.document_id, first)))
        return out[0] if len(out) == 1 else Contexts(*(np.concatenate(column) for column in zip(*out, strict=True)))

    def provenance(self, split: str) -> Provenance:
        """Token, document, context and position of every stored row."""
        specs, n_chunks = self.arrays(split), self.rows(split) // self.chunk_rows
        arrays = {}
        for name in PROVENANCE:
            chunks = [self.chunk(split, name, index) for index in range(n_chunks)]
            arrays[name] = np.concatenate(chunks) if chunks else np.empty(specs[name].shape, np.int32)
        context = 0
        for at, segment, document in zip(self._starts[split][1:], self.segments, self._first_documents, strict=True):
            rows = slice(int(at) - segment.base.rows(split), int(at))
            if context or document:
                arrays["document_id"][rows] = _shifted(arrays["document_id"][rows], document)
                arrays["source"][rows, 0] += context
            context += segment.base.plan.splits[split].contexts if split in segment.base.plan.splits else 0
        source = arrays.pop("source")
        return Provenance(context=source[:, 0], position=source[:, 1], **arrays)

    def order(self, split: str, seed: int, group_chunks: int) -> ReadOrder:
        """The order in which training visits the rows of a split."""
        return ReadOrder(self.rows(split) // self.chunk_rows, self.chunk_rows, seed, split, group_chunks)

    def chunk(self, split: str, name: str, index: int, stop: threading.Event | None = None) -> np.ndarray:
        """[C, …] read-only chunk of an array in stored form, checked on first touch. Raises UserError naming it.

        Ids of documents and contexts are those of the part that holds them.
        """
        part, inner = self._place(split, name, index)
        return part.chunk(split, name, inner)

    def read(self, split: str, name: str, index: int, out: np.ndarray, *, direct: bool = False) -> None:
        """Copy a chunk into `out` [C, …], decompressed; `direct` reads past the page cache where possible."""
        part, inner = self._place(split, name, index)
        part.read(split, name, inner, out, direct=direct)

    def finish(self) -> None:
        """Nothing: nobody fills it."""

    def sample(self, split: str, count: int) -> np.ndarray:
        """Up to `count` kept rows, ascending, from a few chunks spread evenly: a chunk is a sample of its shard."""
        chunks = _spread(self.rows(split) // self.chunk_rows, _SAMPLED_CHUNKS)
        rows = []
        for chunk, wanted in zip(chunks, np.diff(np.linspace(0, count, len(chunks) + 1).astype(int)), strict=True):
            kept = np.flatnonzero(self.chunk(split, "keep", int(chunk)) == KEPT)
            rows.append(chunk * self.chunk_rows + kept[_spread(len(kept), int(wanted))])
        return np.concatenate(rows) if rows else np.empty(0, np.int64)

    def gather(self, split: str, site: str, rows: np.ndarray) -> Tensor:
        """[n, d] float32: any rows of a site, decoded. The plain path; `Batches` is the fast one."""
        specs = self.arrays(split)
        names = [name for name in (self.site(site).name, f"{site}.scale") if name in specs]
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows(split)):
            raise UserError(f"rows of {split!r} are 0 to {self.rows(split) - 1}; got {rows.min()} to {rows.max()}.")
        chunk, inner = np.divmod(rows, self.chunk_rows)
        order = np.argsort(chunk, kind="stable")
        borders = np.flatnonzero(np.diff(chunk[order])) + 1
        raw = {}
        for name in names:
            raw[name] = np.empty((len(rows), *specs[name].shape[1:]), raw_dtype(specs[name].dtype))
            for here in np.split(order, borders) if len(rows) else []:
                raw[name][here] = self.chunk(split, name, int(chunk[here[0]]))[inner[here]]
        scale = torch.from_numpy(raw[names[1]]) if len(names) > 1 else None
        return decode(as_codes(raw[site]), scale, self.calibration(site), torch.float32)

    def parts(self) -> Iterator[Part]:
        """Every complete part, the base first."""
        return (part for segment in self.segments for part in segment.parts)

    def verify(self) -> list[str]:
        """Read every byte of the cache; one line per fault, [] when it is sound."""
        from thresher.cache.verify import faults

        return faults(self.path)

    def summary(self) -> dict[str, Any]:
        """What the cache holds and how good it is: JSON values for `thresher cache info`."""
        quality: dict[str, list[dict[str, float]]] = {name: [] for name in self.sites}
        site_bytes = dict.fromkeys(self.sites, 0)
        parts = []
        for part in self.parts():
            size = sum(entry["bytes"] for entry in part.manifest["files"].values())
            for split, index in part.shards():
                record = part.commit(split, index)
                size += sum(shard_files(part.plan, split, index, record["arrays"]).values())
                for name, q in record["quality"].items():
                    if name in quality:
                        quality[name].append(q)
                        site_bytes[name] += sum(
                            record["arrays"][array]["bytes"]
                            for array in (name, f"{name}.scale")
                            if array in record["arrays"]
                        )
            parts.append(_described(self.path, part, size))
        sites = {}
        for name, site in self.sites.items():
            s, rows = self.statistics(name), quality[name]
            sites[name] = {
                "layer": site.layer,
                "tap": site.tap,
                "width": site.width,
                "bytes": site_bytes[name],
                "fvu": float(np.median([q["fvu"] for q in rows])),
                "fvu_worst_shard": max(q["fvu"] for q in rows),
                "fvu_median_dimension": float(np.median([q["median"] for q in rows])),
                "fvu_worst_dimension": max(q["worst"] for q in rows),
                "mean_norm": s.mean_norm,
                "mean_sq_norm": s.mean_sq_norm,
                "total_variance": s.total_variance,
            }
        return {
            "path": str(self.path),
            "fingerprint": self.fingerprint,
            "codec": self.codec,
            "store": self.store,
            "bytes": sum(part["bytes"] for part in parts),
            "chunk_rows": self.chunk_rows,
            "shard_rows": self.plan.shard_rows,
            "splits": self._splits(),
            "sites": sites,
            "parts": parts,
            "incomplete": self.incomplete,
            "facts": self.facts,
        }

    def _splits(self) -> dict[str, dict[str, int]]:
        """Contexts, rows, shards and dropped rows of every split, over all segments."""
        out: dict[str, dict[str, int]] = {}
        for split in SPLITS:
            held = [s.base.plan.splits[split] for s in self.segments if split in s.base.plan.splits]
            if held:
                summed = ("contexts", "rows", "shards", "dropped")
                out[split] = {"tokens": held[0].tokens} | {k: sum(getattr(h, k) for h in held) for k in summed}
        return out

    def _first(self, split: str) -> dict[str, Part]:
        """The part that holds each array of a split, of the first segment that has rows of it."""
        has = [i for i, segment in enumerate(self.segments) if split in segment.base.plan.splits]
        return self._holding[split][has[0]]

    def _place(self, split: str, name: str, index: int) -> tuple[Part, int]:
        """The part that holds a chunk, and its number there."""
        starts = self._starts[split]
        segment = int(np.searchsorted(starts, index * self.chunk_rows, side="right")) - 1
        return self._holding[split][segment][name], index - int(starts[segment]) // self.chunk_rows

    @cached_property
    def _first_documents(self) -> list[int]:
        """What is added to the document ids of each segment to keep them apart."""
        first = [0]
        for segment in self.segments[:-1]:
            ids = [segment.base.contexts(split).document_id for split in segment.base.plan.splits]
            first.append(first[-1] + 1 + max(int(array.max(initial=-1)) for array in ids))
        return first


def find_complete(path: Path, identity: Mapping[str, Any]) -> CacheReader | None:
    """The finished cache that serves this identity at `path`, or None; what else may be there is not judged.

    None also for one that lost commit records since: the harvest that made it writes those shards anew.
    """
    if not (path / MANIFEST).exists() or not (path / ROOT).exists() or not is_complete(path, read_root(path).plan):
        return None
    reader = CacheReader.open(path)
    if reader.unlike(identity):
        reader.close()
        return None
    return reader


def as_codes(raw: np.ndarray) -> Tensor:
    """Stored rows as a tensor: bf16 patterns (uint16) become bfloat16, codes stay int8; nothing is copied."""
    return (
        torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16) if raw.dtype == np.uint16 else torch.from_numpy(raw)
    )


def _joined(path: Path) -> tuple[list[Segment], list[str]]:
    """The segments of the cache at `path`, and the names of parts in the making.

    Raises UserError when a part that was finished is not there as it was.
    """
    segments, incomplete = [Segment(Part.open(path))], []
    listed, folder = read_index(path), path / PARTS
    for name, entry in sorted(listed.items()):
        lost = loss(path, name, entry)
        if lost is not None:
            raise UserError(
                f"the cache {path} is damaged: {PARTS}/{INDEX} lists {PARTS}/{name} as finished, but {lost}. Restore "
                f"it from a copy, or run `{harvest_again(path, extend=True)}` with the recipe that added it: it writes "
                f"what is missing, and nothing else."
            )
    complete = [Part.open(folder / name) for name in sorted(listed)]
    for each in sorted(folder.iterdir()) if folder.is_dir() else []:
        if each.is_dir() and each.name not in listed:
            incomplete.append(f"{PARTS}/{each.name}")
    for kind in ("tokens", "sites"):
        for part in complete:
            extends = part.plan.extends
            if extends is not None and extends.kind == kind:
                bases = segments[:1] if kind == "tokens" else segments
                owner = next((segment for segment in bases if segment.base.fingerprint == extends.base), None)
                if owner is None:
                    raise UserError(
                        f"{part.path} extends another cache: expected one with fingerprint {extends.base[:12]}…, and "
                        f"this one has {segments[0].base.fingerprint[:12]}…. Move it back to where it belongs."
                    )
                if kind == "tokens":
                    segments.append(Segment(part))
                else:
                    owner.parts.append(part)
    return segments, incomplete


def _without_sites(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without the choice of sites, which a cache with more of them serves as well."""
    harvest = identity.get("harvest")
    if not isinstance(harvest, dict):
        return dict(identity)
    return {**identity, "harvest": {k: v for k, v in harvest.items() if k not in ("sites", "layers")}}


def _moments(s: SiteStats) -> stats.Moments:
    """The sums behind statistics, to be merged with others."""
    norm, sq_norm = np.array(s.mean_norm * s.count), np.array(s.mean_sq_norm * s.count)
    return stats.Moments(s.count, s.mean, s.variance * s.count, norm, sq_norm)


def _shifted(document_id: np.ndarray, first: int) -> np.ndarray:
    """Document ids moved up by `first`; -1 (padding) stays."""
    return np.where(document_id >= 0, document_id + first, document_id).astype(np.int32) if first else document_id


def _spread(available: int, wanted: int) -> np.ndarray:
    """Up to `wanted` of range(available), evenly spaced."""
    return np.unique(np.linspace(0, available - 1, min(wanted, available)).astype(np.int64))


def _described(root: Path, part: Part, size: int) -> dict[str, Any]:
    """What `summary` says of a part."""
    extends = part.plan.extends
    return {
        "name": "base" if extends is None else str(part.path.relative_to(root)),
        "adds": "everything" if extends is None else extends.kind,
        "sites": len(part.sites),
        "rows": sum(sizes.rows for sizes in part.plan.splits.values()),
        "shards": sum(sizes.shards for sizes in part.plan.splits.values()),
        "bytes": size,
    }
