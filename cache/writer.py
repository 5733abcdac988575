"""Writing a cache so that it is complete, or recognisably not.

1. `open` publishes the packed tokens, then the plan as root attributes (exclusively), then all array metadata. A
   directory that already holds the same plan is resumed; any other is refused with the keys that differ.
2. Every shard is published array by array, each file atomically and durably, and then by its commit record. Data
   without a commit record does not count and is written again.
3. `finalize` checks every commit and file size, merges the statistics and publishes the manifest.

After any kill, running the same again ends in the same bytes. One writer at a time holds `create.lock`, which the
kernel frees with the process. Publishing happens in a background thread while the next shard is being computed; its
errors surface at the next call.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from thresher.cache import stats
from thresher.cache.arrays import check_size, read_plain, write_plain, write_sharded
from thresher.cache.codec import Calibration
from thresher.cache.commit import (
    LOCK,
    MANIFEST,
    ROOT,
    chunk_sums,
    committed,
    publish_commit,
    publish_manifest,
    read_commit,
    shard_files,
)
from thresher.cache.contracts import Site, UserError
from thresher.cache.layout import (
    FORMAT,
    VERSION,
    Codec,
    Contexts,
    Store,
    calibration_array,
    crc32c,
    estimate_bytes,
    group_json,
    known_split,
    shard_index,
    stats_array,
)
from thresher.cache.order import Stream
from thresher.cache.plan import Plan, context_array, make_plan
from thresher.cache.publish import explained, free_bytes, publish, try_lock, write_json
from thresher.cache.records import differences
from thresher.cache.shard import ShardData, ShardWriter

_SLACK = 1.02  # of the estimate: metadata, indices, file-system blocks


class CacheWriter:
    """A cache being filled. Use `open`; close it (or use it as a context manager) when done."""

    def __init__(self, path: Path, plan: Plan, contexts: Mapping[str, Contexts], fvu_gate: float, lock: int) -> None:
        self.path, self.plan, self.fvu_gate = path, plan, fvu_gate
        self._contexts, self._lock = contexts, lock
        self._streams = {
            split: Stream(contexts[split].stored(plan.store), plan.seed, split, sizes.rows)
            for split, sizes in plan.splits.items()
        }
        self._committed = committed(path, plan)
        self._calibrations: dict[str, Calibration] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="thresher-commit")
        self._files = ThreadPoolExecutor(8, thread_name_prefix="thresher-publish")
        self._publishing: Future[None] | None = None
        self._failure: BaseException | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        identity: Mapping[str, Any],
        sites: Sequence[Site],
        contexts: Mapping[str, Contexts],
        codec: Codec,
        seed: int,
        store: Store = "kept",
        fvu_gate: float = 1e-3,
        facts: Mapping[str, Any] | None = None,
    ) -> "CacheWriter":
        """Create the cache at `path`, or resume it.

        `identity` is what the fingerprint is of; `facts` (library versions, device, counts) are stored beside it and
        may differ between runs. Raises UserError when the directory holds something else, another identity, another
        writer, or when the disk is too small: before anything is computed.
        """
        plan = make_plan(identity, sites, contexts, codec, seed, store)
        _refuse_foreign(path)
        try:
            lock = try_lock(path / LOCK)
        except OSError as error:
            raise explained(error, path / LOCK, 0) from error
        if lock is None:
            raise UserError(
                f"another process is writing the cache {path}. Wait for it to end, or choose another place with "
                f"--cache PATH."
            )
        try:
            writer = cls(path, plan, contexts, fvu_gate, lock)
            writer._prepare(facts or {})
        except BaseException:
            os.close(lock)
            raise
        return writer

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def bytes_needed(self) -> int:
        """Estimate of the bytes still to be written."""
        plan, total = self.plan, 0
        for split, sizes in plan.splits.items():
            left = [i for i in range(sizes.shards) if (split, i) not in self._committed]
            rows = sum(plan.shard_rows_of(split, i) for i in left)
            tokens = 0 if (self.path / ROOT).exists() else sizes.contexts * sizes.tokens
            total += estimate_bytes(plan.sites, plan.codec, rows, tokens, len(left))
        return total

    def pending(self) -> list[tuple[str, int]]:
        """(split, shard) of all shards without a commit, train shard 0 first."""
        everything = [(split, i) for split, sizes in self.plan.splits.items() for i in range(sizes.shards)]
        return [shard for shard in everything if shard not in self._committed]

    def contexts_of(self, split: str, index: int) -> np.ndarray:
        """Contexts that a shard needs, in stream order; known before it is begun."""
        known_split(split, self.plan.splits)
        return self._streams[split].shard(index, self.plan.shard_rows).contexts

    def shard(self, split: str, index: int) -> ShardWriter:
        """Begin a shard. With codec int8z, shard 0 of train has to be committed before any other is begun."""
        self._raise_failure()
        known_split(split, self.plan.splits)
        source = self._streams[split].shard(index, self.plan.shard_rows)
        first = (split, index) == ("train", 0)
        assert first or self.plan.codec != "int8z" or self._calibrations, "train shard 0 comes first: it calibrates"
        return ShardWriter(self, split, index, source, self._contexts[split])

    def finalize(self) -> None:
        """Check all that was committed, write the statistics and declare the cache complete."""
        self._wait()
        if (self.path / MANIFEST).exists():
            return
        missing = self.pending()
        assert not missing, f"{len(missing)} shards are not committed"
        for split, sizes in self.plan.splits.items():
            for index in range(sizes.shards):
                self._check_shard(split, index)
        self._write_stats()
        publish_manifest(self.path, self.plan)

    def close(self) -> None:
        """Wait for the shard being published and let the cache go; what is committed stays."""
        if self._lock < 0:
            return
        self._background.shutdown(wait=True)
        self._files.shutdown(wait=True)
        os.close(self._lock)
        self._lock = -1

    # What a shard asks of its owner.

    def calibration(self, site: str) -> Calibration | None:
        """μ and σ of a site once they are fixed."""
        return self._calibrations.get(site)

    def calibrated(self, by_site: Mapping[str, Calibration]) -> None:
        """Fix μ and σ for good: they are published before any row that uses them."""
        for site in self.plan.sites:
            values = by_site[site.name].as_array()
            write_plain(self.path / "calibration" / site.name, calibration_array(site), values)
        self._calibrations = dict(by_site)

    def publish_shard(self, split: str, index: int, finish: Callable[[], ShardData]) -> None:
        """Finish and publish in the background; waits for the shard before it, so at most two are in memory."""
        self._wait()
        self._publishing = self._background.submit(self._publish, split, index, finish)

    # Internals.

    def _publish(self, split: str, index: int, finish: Callable[[], ShardData]) -> None:
        data, specs = finish(), self.plan.sharded_arrays(split)

        def one(name: str) -> tuple[str, dict[str, Any]]:
            spec, rows = specs[name], data.arrays[name]
            sums, tail = chunk_sums(spec, rows), shard_index(spec, len(rows))
            publish(self.path / split / name / spec.file_name(index), [rows, tail])
            return name, {"bytes": rows.nbytes + len(tail), "crc32c": sums}

        arrays = dict(self._files.map(one, specs))
        moments = self.plan.moments_array(split)
        write_plain(self.path / split / "moments", moments, data.moments[None], index)
        arrays["moments"] = {"bytes": data.moments.nbytes + 4, "crc32c": [f"{crc32c(data.moments):08x}"]}
        publish_commit(self.path, self.plan, split, index, arrays, data.quality, self._calibration_digest())
        self._committed.add((split, index))

    def _wait(self) -> None:
        """Wait for the background and raise what went wrong there."""
        if self._publishing is not None:
            try:
                self._publishing.result()
            except BaseException as error:
                self._failure = error
            self._publishing = None
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is None and self._publishing is not None and self._publishing.done():
            self._failure = self._publishing.exception()
        if self._failure is not None:
            raise self._failure

    def _prepare(self, facts: Mapping[str, Any]) -> None:
        """Bring the directory to the state in which any shard can be written."""
        root = self.path / ROOT
        if root.exists():
            self._check_same(json.loads(root.read_bytes())["attributes"].get("thresher", {}))
        self._check_space()
        for leftover in self.path.rglob("*.tmp"):
            leftover.unlink(missing_ok=True)
        if not root.exists():
            for split, packed in self._contexts.items():
                for name, spec in self.plan.context_arrays(split).items():
                    write_sharded(self.path / split / "contexts" / name, spec, context_array(packed, name))
            attributes = {"thresher": {**self.plan.to_json(), "facts": json.loads(json.dumps(dict(facts)))}}
            write_json(root, group_json(attributes), exclusive=True)
        absent = {p: d for p, d in self.plan.documents().items() if not (self.path / p).exists()}
        list(self._files.map(lambda item: write_json(self.path / item[0], item[1]), absent.items()))
        if self.pending():  # a repair: the user removed a commit record
            (self.path / MANIFEST).unlink(missing_ok=True)
        for split, index in sorted(self._committed):
            self._check_shard(split, index)
        self._load_calibrations()

    def _check_same(self, stored: Mapping[str, Any]) -> None:
        """Raise UserError when the directory was planned otherwise."""
        if stored.get("format") != FORMAT or stored.get("version") != VERSION:
            raise UserError(
                f"{self.path} is no cache this version can write: expected format {FORMAT!r} {VERSION}, got "
                f"{stored.get('format')!r} {stored.get('version')!r}. Choose another place with --cache PATH."
            )
        lines = differences(stored["identity"], self.plan.identity)
        if not lines:
            mine = self.plan.to_json()
            lines = differences({key: stored.get(key) for key in mine}, mine)
        if lines:
            raise UserError(
                f"{self.path} holds another cache; what differs (stored, then asked for): {'; '.join(lines)}. Choose "
                f"another place with --cache PATH, or remove that directory if it is no longer wanted."
            )

    def _check_space(self) -> None:
        needed, free = int(_SLACK * self.bytes_needed()), free_bytes(self.path)
        if needed > free:
            raise UserError(
                f"not enough disk space for the cache {self.path}: it needs {needed:,} bytes more and {free:,} are "
                f"free. Make room, choose another place with --cache PATH, or harvest fewer tokens or sites."
            )

    def _check_shard(self, split: str, index: int) -> None:
        """Raise UserError unless the shard's record is sound and its files have their sizes."""
        arrays = read_commit(self.path, self.plan, split, index)["arrays"]
        for name, size in shard_files(self.plan, split, index, arrays).items():
            file = self.path / name
            check_size(file, file.stat().st_size if file.exists() else 0, size)

    def _load_calibrations(self) -> None:
        if self.plan.codec != "int8z":
            return
        folder = self.path / "calibration"
        if not all((folder / site.name / "c.0.0").exists() for site in self.plan.sites):
            if self._committed:
                raise UserError(
                    f"{folder} is incomplete, yet shards were stored with it. Restore the folder, or remove the cache "
                    f"{self.path} and harvest again."
                )
            return
        for site in self.plan.sites:
            mean, std = torch.from_numpy(read_plain(folder / site.name, calibration_array(site)).copy())
            self._calibrations[site.name] = Calibration(mean, std)

    def _calibration_digest(self) -> str | None:
        digest = hashlib.sha256()
        for site in self.plan.sites:
            if site.name in self._calibrations:
                digest.update(self._calibrations[site.name].as_array().data)
        return digest.hexdigest() if self._calibrations else None

    def _write_stats(self) -> None:
        """Merge the moments of all train shards, in shard order."""
        plan, spec = self.plan, self.plan.moments_array("train")
        folder = self.path / "train" / "moments"
        packed = [read_plain(folder, spec, i)[0] for i in range(plan.splits["train"].shards)]
        by_mask = [[stats.unpack(plan.sites, shard[mask]) for shard in packed] for mask in range(2)]
        for site in plan.sites:
            kept, special = (stats.merged(s[site.name] for s in shards) for shards in by_mask)
            both = [kept.stats(), kept.merge(special).stats()]
            values = np.stack([np.stack([s.mean, s.variance]) for s in both])
            attributes = {
                key: [getattr(s, key) for s in both] for key in ("count", "mean_norm", "mean_sq_norm", "total_variance")
            }
            write_plain(self.path / "stats" / site.name, stats_array(site), values)
            write_json(self.path / "stats" / site.name / "zarr.json", stats_array(site).zarr_json(attributes))


def _refuse_foreign(path: Path) -> None:
    """Raise UserError for a file, or a directory with content that is no cache of ours."""
    if path.is_dir() and any(path.iterdir()) and not (path / ROOT).exists() and not (path / LOCK).exists():
        raise UserError(
            f"{path} is not empty and not a cache: expected a new or empty directory, or a cache to go on with. "
            f"Choose another place with --cache PATH."
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; expected a directory for the cache. Choose another with --cache PATH.")
