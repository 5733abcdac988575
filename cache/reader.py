"""Reading a cache: a base part and the parts that extend it, joined (`segments`).

Chunks of a split are numbered through the segments, the base's first, so that everything above sees one cache.

While a reader is open it holds a shared lock, so that nothing is pruned under it.
"""

import json
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from thresher.cache import stats
from thresher.cache.codec import Calibration
from thresher.cache.commit import MANIFEST, ROOT, is_complete
from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.layout import PROVENANCE, ArraySpec, Codec, Contexts, Store, known_split
from thresher.cache.locks import READ, Lock, share
from thresher.cache.order import SPLITS, ReadOrder
from thresher.cache.part import Part
from thresher.cache.place import Place
from thresher.cache.records import differences, fingerprint
from thresher.cache.remote.place import ObjectPlace
from thresher.cache.remote.settings import Reading
from thresher.cache.rows import Rows
from thresher.cache.segments import Segment, joined, shared_calibration
from thresher.cache.sites import unmet
from thresher.cache.stats import SiteStats
from thresher.cache.stored import read_root
from thresher.cache.verify import faults


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


class CacheReader(Rows):
    """A complete cache, opened for reading; a `source.Source`. Use `open`."""

    SAMPLED_CHUNKS: ClassVar[int] = 16

    def __init__(self, path: Place, segments: list[Segment], incomplete: list[str], lock: Lock | None = None) -> None:
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
        self.reading = Reading.from_environment() if isinstance(path, ObjectPlace) else None
        self.close: Callable[[], object] = weakref.finalize(self, lock.release) if lock is not None else lambda: None
        """Let go of the lock; may be called again. What was read stays valid."""

    @classmethod
    def open(cls, path: Place, *, identity: Mapping[str, Any] | None = None) -> "CacheReader":
        """Open the cache at `path` with every complete part that extends it.

        Raises UserError when it is missing, incomplete, damaged, newer than this program, being pruned, or, with
        `identity`, made of something else; a cache that holds more sites than the identity asks for serves it too.
        """
        lock = share(path / READ)  # before anything is looked at, or it might be pruned meanwhile
        try:
            reader = cls(path, *joined(path), lock)
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

    def statistics(self, site: str) -> SiteStats:
        """Statistics of a site over the kept rows of train, of all segments."""
        self.site(site)
        parts = [segment.sites[site].statistics(site) for segment in self.segments]
        return parts[0] if len(parts) == 1 else stats.merged(map(_moments, parts)).stats()

    def calibration(self, site: str) -> Calibration | None:
        """μ and σ of an int8z site, one for all segments; None for the other codecs."""
        return shared_calibration(self.segments, self.site(site).name)

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

    def read_run(self, split: str, name: str, index: int, outs: Sequence[np.ndarray]) -> None:
        """Chunks `index`, `index` + 1, … of one shard in an object store into `outs`, each [C, …]."""
        part, inner = self._place(split, name, index)
        part.read_run(split, name, inner, outs)

    def by_file(self, split: str, name: str, run: Sequence[int]) -> list[list[int]]:
        """A run of neighbouring chunks cut where one file ends and the next begins."""
        per_shard, cut = self.plan.shard_rows // self.plan.chunk_rows, dict[tuple[int, int], list[int]]()
        for index in run:
            part, inner = self._place(split, name, index)
            cut.setdefault((id(part), inner // per_shard), []).append(index)
        return list(cut.values())

    def finish(self) -> None:
        """Nothing: nobody fills it."""

    def chunks_at_hand(self, split: str) -> int:
        """All of them."""
        return self.rows(split) // self.chunk_rows

    def parts(self) -> Iterator[Part]:
        """Every complete part, the base first."""
        return (part for segment in self.segments for part in segment.parts)

    def verify(self) -> list[str]:
        """Read every byte of the cache; one line per fault, [] when it is sound."""
        return faults(self.path)

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


def find_complete(path: Place, identity: Mapping[str, Any]) -> CacheReader | None:
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
