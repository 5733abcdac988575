"""What a cache holds and how good it is, in JSON values: `thresher cache info` prints it."""

from typing import Any

import numpy as np

from thresher.cache.commit import shard_files
from thresher.cache.order import SPLITS
from thresher.cache.part import Part
from thresher.cache.place import Place, below
from thresher.cache.reader import CacheReader

_LIMITS = ("max_tokens", "max_documents", "skip_documents")
"""Keys of [data] in which segments of one text differ."""


class _Records:
    """What the commit records of a cache come to, read once."""

    def __init__(self, reader: CacheReader) -> None:
        self.quality: dict[str, list[dict[str, float]]] = {name: [] for name in reader.sites}
        """Of every shard, by site."""
        self.stored = dict.fromkeys(reader.sites, 0)
        """Bytes, by site."""
        self.parts = [_part(reader.path, part, self._size(part)) for part in reader.parts()]

    def _size(self, part: Part) -> int:
        """Bytes of a part, its locks and records left out; what its records say of sites is kept."""
        size = sum(entry["bytes"] for entry in part.manifest["files"].values())
        for split, index in part.shards():
            record = part.commit(split, index)
            size += sum(shard_files(part.plan, split, index, record["arrays"]).values())
            for name in record["quality"].keys() & self.quality.keys():
                self.quality[name].append(record["quality"][name])
                held = record["arrays"].keys() & {name, f"{name}.scale"}
                self.stored[name] += sum(record["arrays"][array]["bytes"] for array in held)
        return size


def summary(reader: CacheReader) -> dict[str, Any]:
    """Size, splits, sites with their quality, parts and texts of a cache, and what it was made with."""
    records = _Records(reader)
    return {
        "path": str(reader.path),
        "fingerprint": reader.fingerprint,
        "codec": reader.codec,
        "store": reader.store,
        "bytes": sum(part["bytes"] for part in records.parts),
        "chunk_rows": reader.chunk_rows,
        "shard_rows": reader.plan.shard_rows,
        "splits": _splits(reader),
        "sites": {name: _site(reader, name, records.stored[name], records.quality[name]) for name in reader.sites},
        "texts": _texts(reader),
        "parts": records.parts,
        "incomplete": reader.incomplete,
        "facts": reader.facts,
    }


def _part(root: Place, part: Part, size: int) -> dict[str, Any]:
    """Name, kind, and sizes of a part."""
    extends = part.plan.extends
    return {
        "name": "base" if extends is None else below(root, part.path),
        "adds": "everything" if extends is None else extends.kind,
        "sites": len(part.sites),
        "rows": sum(sizes.rows for sizes in part.plan.splits.values()),
        "shards": sum(sizes.shards for sizes in part.plan.splits.values()),
        "bytes": size,
    }


def _splits(reader: CacheReader) -> dict[str, dict[str, int]]:
    """Contexts, rows, shards and dropped rows of every split, over all segments."""
    out: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        held = [s.base.plan.splits[split] for s in reader.segments if split in s.base.plan.splits]
        if held:
            summed = ("contexts", "rows", "shards", "dropped")
            out[split] = {"tokens": held[0].tokens} | {k: sum(getattr(h, k) for h in held) for k in summed}
    return out


def _site(reader: CacheReader, name: str, stored: int, shards: list[dict[str, float]]) -> dict[str, Any]:
    """Place, bytes, loss and norms of a site; `shards` say how well each of them stores it."""
    site, s = reader.sites[name], reader.statistics(name)
    return {
        "layer": site.layer,
        "tap": site.tap,
        "width": site.width,
        "bytes": stored,
        "fvu": float(np.median([q["fvu"] for q in shards])),
        "fvu_worst_shard": max(q["fvu"] for q in shards),
        "fvu_median_dimension": float(np.median([q["median"] for q in shards])),
        "fvu_worst_dimension": max(q["worst"] for q in shards),
        "mean_norm": s.mean_norm,
        "mean_sq_norm": s.mean_sq_norm,
        "total_variance": s.total_variance,
    }


def _texts(reader: CacheReader) -> list[dict[str, Any]]:
    """Of every text that rows come from: its source, and the documents of it that were read.

    A further segment of the same text has to skip `documents`; those before the first that was read count too.
    """
    texts: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for segment in reader.segments:
        data, corpus = segment.base.plan.identity.get("data"), segment.base.facts.get("corpus", {})
        if not isinstance(data, dict) or "documents_read" not in corpus:
            continue  # not made by a harvest
        text = {key: value for key, value in data.items() if key not in _LIMITS}
        known = next((entry for other, entry in texts if other == text), None)
        if known is None:
            texts.append((text, known := {"source": data["source"], "documents": 0}))
        known["documents"] = max(known["documents"], int(corpus["documents_read"]))
    return [entry for _, entry in texts]
