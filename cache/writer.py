"""Writing a cache so that it is complete, or recognisably not.

1. `open` publishes the packed tokens, then the plan as root attributes (exclusively), then all array metadata. A
   directory that already holds the same plan is resumed; any other is refused with the keys that differ.
2. `claim` locks a shard. It is published array by array, each file atomically and durably, and then by its commit
   record. Data without a commit record does not count and is written again.
3. `finalize` checks every commit and file size, merges the statistics and publishes the manifest.

After any kill, running the same again ends in the same bytes. Any number of processes may fill one cache: a shard is a
pure function of the plan, each is written by whoever holds its lock, and steps 1 and 3 happen under `create.lock`.
Publishing happens in a background thread while the next shard is being computed; its errors surface at the next call.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from thresher.cache import stats
from thresher.cache.arrays import (
    check_size,
    file_size,
    read_file,
    read_plain,
    repair_sharded,
    write_plain,
    write_sharded,
)
from thresher.cache.buffers import Buffers
from thresher.cache.codec import Calibration
from thresher.cache.commit import (
    MANIFEST,
    PARTS,
    ROOT,
    check_calibration,
    commit_path,
    committed,
    publish_commit,
    publish_manifest,
    read_commit,
    repair,
    shard_files,
)
from thresher.cache.contracts import Site, UserError
from thresher.cache.index import begin_index, enter, is_listed
from thresher.cache.layout import (
    Codec,
    Contexts,
    Store,
    calibration_array,
    crc32c,
    estimate_bytes,
    group_json,
    known_split,
    stats_array,
)
from thresher.cache.locks import CREATE, READ, Lock, excludes, hold, share, sole_writer, try_hold
from thresher.cache.memory import available_memory
from thresher.cache.order import Stream
from thresher.cache.pieces import shard_file
from thresher.cache.plan import Extends, Plan, context_array, make_plan
from thresher.cache.publish import DiskFullError, flush_directory, free_bytes, publish, write_json
from thresher.cache.records import canonical, differences
from thresher.cache.shard import ShardData, ShardWriter
from thresher.cache.stored import (
    calibration_digest,
    extended_part,
    has_calibration,
    parts,
    read_calibration,
    read_calibrations,
    read_root,
)

_SLACK = 1.02  # of the estimate: metadata, indices, file-system blocks
_POLL_SECONDS = 0.2

Shard = tuple[str, int]
"""(split, index)."""


class CacheWriter:
    """A cache being filled. Use `open`; close it (or use it as a context manager) when done."""

    def __init__(
        self,
        path: Path,
        plan: Plan,
        contexts: Mapping[str, Contexts],
        fvu_gate: float,
        notify: Callable[[str], None],
    ) -> None:
        self.path, self.plan, self.fvu_gate = path, plan, fvu_gate
        self._contexts, self._notify = contexts, notify
        self._streams = {
            split: Stream(contexts[split].stored(plan.store), plan.seed, split, sizes.rows)
            for split, sizes in plan.splits.items()
        }
        self._order = _scan_order(plan)
        self._committed: set[Shard] = set()
        self._held: dict[Shard, Lock] = {}
        self._sole: Lock | None = None
        self._alive: Lock | None = None  # between two shards, this alone tells that somebody is at work
        self._calibrations: dict[str, Calibration] = {}
        self.buffers = Buffers()
        self.direct = self.bytes_needed() > available_memory() // 4
        """Whether shards go to the disk past the page cache: cheaper, but then training right after finds them cold."""
        self._background = ThreadPoolExecutor(1, thread_name_prefix="thresher-commit")
        self._files = ThreadPoolExecutor(8, thread_name_prefix="thresher-publish")
        self._publishing: Future[None] | None = None
        self._failure: BaseException | None = None
        self._surfaced = False

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
        extends: Extends | None = None,
        window_bytes: int | None = None,
        create: Lock | None = None,
        notify: Callable[[str], None] = lambda line: None,
    ) -> "CacheWriter":
        """Create the part of a cache at `path`, or resume it; several processes may do so at once.

        `identity` is what the fingerprint is of; `facts` (library versions, device, counts) are stored beside it and
        may differ between runs. With `extends`, `path` is `<cache>/parts/<name>`; with `window_bytes` it is a ring
        (`ring`) whose train shards take no more than that. `create` is the lock that `planning` gave, which is freed
        here. `notify` gets a line when something has to be waited for. Raises UserError when the directory holds
        something else, another identity, or when the disk is too small: before anything is computed.
        """
        create = create or planning(path, notify)
        writer = None
        try:
            base = None if extends is None else extended_part(path, extends).plan
            plan = make_plan(identity, sites, contexts, codec, seed, store, extends, base, window_bytes)
            writer = cls(path, plan, contexts, fvu_gate, notify)
            if not excludes(create):
                writer._sole = sole_writer(path)
                notify(f"the file system of {path} has no locks between processes: this one writes alone")
            writer._prepare(facts or {})
        except BaseException:
            if writer is not None:
                writer.close()
            forget_plan(path, create)
            raise
        finally:
            create.release()
        try:
            digest = calibration_digest(plan, writer._calibrations)
            for split, index in sorted(writer._committed):
                writer._check_there(split, index, digest)
        except BaseException:
            writer.close()
            raise
        return writer

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None and not self._surfaced:
            self.settle()

    def bytes_needed(self) -> int:
        """Estimate of the bytes still to be written, by whomever."""
        sizes = self.plan.splits.values()
        planned = (self.path / ROOT).exists() or self.plan.rows_stored_elsewhere
        return self._bytes_of(self._to_come()) + (
            0 if planned else 9 * sum(each.contexts * each.tokens for each in sizes)
        )

    def pending(self) -> list[Shard]:
        """(split, shard) of all shards without a commit, train shard 0 first."""
        everything = [(split, i) for split, sizes in self.plan.splits.items() for i in range(sizes.shards)]
        return [shard for shard in everything if not self._is_committed(shard)]

    def claim(self) -> Shard | None:
        """Lock the next shard that needs work; None once everything is committed or in this writer's hands.

        Waits while all that is left is in the hands of others, whose death would free it, and, with codec int8z, until
        the calibration is there, which comes from whoever has train shard 0.
        """
        told = False
        while (shard := self.take()) is None:
            if self.exhausted():
                return None
            if not told:
                self._notify(f"waiting for the other processes that are filling {self.path}")
                told = True
            time.sleep(_POLL_SECONDS)
        return shard

    def take(self, among: Sequence[Shard] | None = None) -> Shard | None:
        """`claim` without waiting, of all shards or of some: None also when there is nothing to take at the moment."""
        self._raise_failure()
        ready = self._can_encode()
        if among is not None:  # of a ring, from which others evict
            self._committed -= {shard for shard in among if not commit_path(self.path, *shard).exists()}
        known = self._committed | self._held.keys()
        for shard in [shard for shard in (self._order if among is None else among) if shard not in known]:
            if not (ready or shard == ("train", 0)) or self._is_committed(shard):
                continue
            if self._lock(shard):
                self._require_space([shard])
                return shard
        return None

    def exhausted(self) -> bool:
        """Whether every shard is committed or in this writer's hands."""
        return all(shard in self._held or self._is_committed(shard) for shard in self._order)

    def contexts_of(self, split: str, index: int) -> np.ndarray:
        """Contexts that a shard needs, in stream order; known before it is begun."""
        known_split(split, self.plan.splits)
        return self._streams[split].shard(index, self.plan.shard_rows).contexts

    def shard(self, split: str, index: int) -> ShardWriter:
        """Begin a shard, locking it where `claim` did not.

        With codec int8z the rows of train shard 0 have to come before any other, unless they did in another process.
        Bytes of a shard that is committed already are compared, not written.
        """
        self._raise_failure()
        known_split(split, self.plan.splits)
        if (
            (split, index) not in self._held
            and not self._is_committed((split, index))
            and not self._lock((split, index))
        ):
            raise UserError(
                f"shard {index} of {split!r} of {self.path} is being written by another process. Claim a shard that is "
                f"free."
            )
        source = self._streams[split].shard(index, self.plan.shard_rows)
        first = (split, index) == ("train", 0)
        assert first or self.plan.codec != "int8z" or self._calibrations, "train shard 0 comes first: it calibrates"
        return ShardWriter(self, split, index, source, self._contexts[split])

    def finalize(self) -> None:
        """Check all that was committed, write the statistics and declare the part complete; once, by one process.

        An extension is then entered in the index of its cache; one killed in between is checked again first.
        """
        self.settle()
        missing = self.pending()
        assert not missing, f"{len(missing)} shards are not committed"
        create = hold(self.path / CREATE, lambda: self._notify(f"waiting for another process to finish {self.path}"))
        try:
            if (self.path / MANIFEST).exists() and (self.plan.extends is None or is_listed(self.path)):
                return
            digest = calibration_digest(self.plan, read_calibrations(self.path, self.plan))
            for split, index in self._order:
                self._check_shard(split, index, digest)
            self.repair_plan()
            self.write_statistics(range(self.plan.splits["train"].shards))
            self._collect(self._leftovers())
            publish_manifest(self.path, self.plan)
            self._collect(self.path.glob("commits/*.lock"))
        finally:
            create.release()
        if self.plan.extends is not None:
            cache = self.path.parent.parent
            create = hold(cache / CREATE, lambda: self._notify(f"waiting for another process to plan {cache}"))
            try:
                enter(cache, self.path.name, self.plan)
            finally:
                create.release()

    def repair_plan(self) -> None:
        """Write anew what follows from the plan and is not as it was written, so that no manifest vouches for it."""
        root = {"thresher": {**self.plan.to_json(), "facts": read_root(self.path).facts}}
        wrong = []
        for name, document in {ROOT: group_json(root), **self.plan.documents()}.items():
            if read_file(self.path / name) != canonical(document):
                write_json(self.path / name, document)
                wrong.append(self.path / name)
        for split, packed in self._contexts.items():
            for name, spec in self.plan.context_arrays(split).items():
                folder = self.path / split / "contexts" / name
                wrong += repair_sharded(folder, spec, context_array(packed, name))
        for path in wrong:
            self._notify(f"{path} was damaged or changed; it was written anew")

    def write_statistics(self, shards: Iterable[int]) -> None:
        """Publish the statistics over some train shards: their moments merged, in the order given.

        Raises UserError when the moments are not those of the shard's commit record.
        """
        plan, spec = self.plan, self.plan.moments_array("train")
        folder = self.path / "train" / "moments"
        packed = []
        for i in shards:
            packed.append(read_plain(folder, spec, i)[0])
            if read_commit(self.path, plan, "train", i)["arrays"]["moments"] != _moments_entry(packed[-1]):
                raise UserError(
                    f"{folder / spec.file_name(i)} is damaged: it does not match the checksum in its commit record. "
                    f"Restore the file, or have the shard written anew. {repair(self.path, plan, 'train', i)}"
                )
        by_mask = [[stats.unpack(plan.sites, shard[mask]) for shard in packed] for mask in range(2)]
        for site in plan.sites:
            kept, special = (stats.merged(s[site.name] for s in each) for each in by_mask)
            both = [kept.stats(), kept.merge(special).stats()]
            values = np.stack([np.stack([s.mean, s.variance]) for s in both])
            attributes = {
                key: [getattr(s, key) for s in both] for key in ("count", "mean_norm", "mean_sq_norm", "total_variance")
            }
            write_plain(self.path / "stats" / site.name, stats_array(site), values)
            write_json(self.path / "stats" / site.name / "zarr.json", stats_array(site).zarr_json(attributes))

    def evict(self, split: str, index: int) -> None:
        """Remove a committed shard, its record first; left alone while another process has it."""
        lock = try_hold(commit_path(self.path, split, index).with_suffix(".lock"))
        if lock is None:
            return
        try:
            self._committed.discard((split, index))
            if not commit_path(self.path, split, index).exists():  # another was faster
                return
            arrays = read_commit(self.path, self.plan, split, index)["arrays"]
            commit_path(self.path, split, index).unlink()
            flush_directory(self.path / "commits")
            self._collect(self.path / name for name in shard_files(self.plan, split, index, arrays))
            lock.remove()
        finally:
            lock.release()

    def settle(self) -> None:
        """Wait for the shard being published, and raise what went wrong with it."""
        if self._publishing is not None:
            try:
                self._publishing.result()
            except BaseException as error:
                self._failure = error
            self._publishing = None
        self._raise_failure()

    def close(self) -> None:
        """Wait for the shard being published and let the cache go; what is committed stays."""
        self._background.shutdown(wait=True)
        self._files.shutdown(wait=True)
        for lock in self._held.values():
            lock.release()
        self._held = {}
        if self._alive is not None:
            self._alive.release()
        if self._sole is not None:
            self._sole.remove()
            self._sole = None

    # What a shard asks of its owner.

    def calibration(self, site: str) -> Calibration | None:
        """μ and σ of a site once they are fixed."""
        return self._calibrations.get(site)

    def calibrated(self, by_site: Mapping[str, Calibration]) -> None:
        """Fix μ and σ for good: they are published before any row that uses them.

        A process that was killed here may have published some. They were made from the same rows.
        """
        for site in self.plan.sites:
            values = by_site[site.name].as_array()
            if not has_calibration(self.path, site):
                write_plain(self.path / "calibration" / site.name, calibration_array(site), values, exclusive=True)
            elif not np.array_equal(values, read_calibration(self.path, site).as_array()):
                raise UserError(
                    f"the calibration of {site.name!r} in {self.path} differs from the one computed now, and rows may "
                    f"be stored with it. Expected the same rows on every run: use one kind of device, dtype and "
                    f"software, or harvest into another place."
                )
        self._calibrations = dict(by_site)

    def publish_shard(self, split: str, index: int, finish: Callable[[], ShardData]) -> None:
        """Finish and publish in the background; waits for the shard before it, so at most two are in memory."""
        self.settle()
        self._publishing = self._background.submit(self._publish, split, index, finish)

    # Internals.

    def _publish(self, split: str, index: int, finish: Callable[[], ShardData]) -> None:
        try:
            self._publish_held(split, index, finish)
        except DiskFullError as error:
            needed, free = int(_SLACK * self._bytes_of([(split, index)])), free_bytes(self.path)
            raise UserError(f"{error.reason} For the cache {self.path}, {self._lack(needed, free)}") from error
        finally:
            if (split, index) in self._held:
                self._held.pop((split, index)).release()

    def _publish_held(self, split: str, index: int, finish: Callable[[], ShardData]) -> None:
        data, specs = finish(), self.plan.sharded_arrays(split)
        there = self._is_committed((split, index))  # then these bytes are compared with the record and not written

        def one(name: str) -> tuple[str, dict[str, Any]]:
            spec = specs[name]
            file = shard_file(spec, data.arrays[name])
            if not there:
                publish(self.path / split / name / spec.file_name(index), file.pieces, direct=self.direct)
            return name, file.entry

        files = [self._files.submit(one, name) for name in specs]
        wait(files)  # all of them, also when one failed: the shard's lock is free after this
        arrays = dict(file.result() for file in files)
        moments = self.plan.moments_array(split)
        if not there:
            write_plain(self.path / split / "moments", moments, data.moments[None], index)
        arrays["moments"] = _moments_entry(data.moments)
        digest = calibration_digest(self.plan, self._calibrations)
        publish_commit(self.path, self.plan, split, index, arrays, data.quality, digest)
        self.buffers.give(data.arrays.values())
        self._committed.add((split, index))

    def _to_come(self) -> list[Shard]:
        """The shards without a commit that will have to lie on the disk at one time."""
        pending, plan = self.pending(), self.plan
        if plan.window_shards is None:
            return pending
        train = [shard for shard in pending if shard[0] == "train"]
        return train[: 3 * plan.window_shards] + [shard for shard in pending if shard[0] != "train"]

    def _is_committed(self, shard: Shard) -> bool:
        """Whether a shard has its commit record by now, from whomever."""
        if shard not in self._committed and commit_path(self.path, *shard).exists():
            self._committed.add(shard)
        return shard in self._committed

    def _can_encode(self) -> bool:
        """Whether any shard may be begun: the calibration is there, or this writer is about to make it."""
        if self.plan.codec == "int8z" and not self._calibrations:
            self._load_calibrations()
        return self.plan.codec != "int8z" or bool(self._calibrations) or ("train", 0) in self._held

    def _lock(self, shard: Shard) -> bool:
        """Take a shard for this writer, unless another has it or it is committed; clear what a dead one left of it."""
        lock = try_hold(commit_path(self.path, *shard).with_suffix(".lock"))
        if lock is None:
            return False
        if self._is_committed(shard):
            lock.release()
            return False
        if not lock.fresh:
            split, index = shard
            self._collect(self.path.glob(f"commits/{split}.{index}.json.*.tmp"))
            self._collect(self.path.glob(f"{split}/*/c.{index}.*.tmp"))
        if shard == ("train", 0):
            self._collect(self.path.glob("calibration/*/c.*.tmp"))
        self._held[shard] = lock
        return True

    def _leftovers(self) -> Iterator[Path]:
        """Temporary files of this part; those below parts/ are of others, which may be at work."""
        for folder, inside, names in os.walk(self.path):
            if Path(folder) == self.path and PARTS in inside:
                inside.remove(PARTS)
            yield from (Path(folder) / name for name in names if name.endswith(".tmp"))

    def _collect(self, leftovers: Iterable[Path]) -> None:
        """Remove files that nobody needs any more."""
        for file in list(leftovers):
            file.unlink(missing_ok=True)

    def _bytes_of(self, shards: Sequence[Shard]) -> int:
        rows = sum(self.plan.shard_rows_of(*shard) for shard in shards)
        provenance = not self.plan.rows_stored_elsewhere
        return estimate_bytes(self.plan.sites, self.plan.codec, rows, 0, len(shards), provenance=provenance)

    def _raise_failure(self) -> None:
        if self._failure is None and self._publishing is not None and self._publishing.done():
            self._failure = self._publishing.exception()
        if self._failure is not None:
            self._surfaced = True
            raise self._failure

    def _prepare(self, facts: Mapping[str, Any]) -> None:
        """Bring the directory to the state in which any shard can be written; under `create.lock`."""
        root = self.path / ROOT
        if root.exists():
            self._check_same(read_root(self.path).plan)
        self._committed = committed(self.path, self.plan)
        self._require_space(self._to_come(), planned=root.exists())
        if self.plan.extends is not None:
            begin_index(self.path.parent.parent)
        if not root.exists():
            self._collect(self._leftovers())
            for split, packed in self._contexts.items():
                for name, spec in self.plan.context_arrays(split).items():
                    write_sharded(self.path / split / "contexts" / name, spec, context_array(packed, name))
            attributes = {"thresher": {**self.plan.to_json(), "facts": json.loads(json.dumps(dict(facts)))}}
            write_json(root, group_json(attributes), exclusive=True)
        (self.path / READ).touch()
        self._alive = share(self.path / READ)
        absent = {p: d for p, d in self.plan.documents().items() if not (self.path / p).exists()}
        list(self._files.map(lambda item: write_json(self.path / item[0], item[1]), absent.items()))
        if self.pending():  # a repair: the user removed a commit record
            (self.path / MANIFEST).unlink(missing_ok=True)
        if self.plan.extends is not None:
            self._inherit_calibrations()
        self._load_calibrations()

    def _check_same(self, stored: Plan) -> None:
        """Raise UserError when the directory was planned otherwise."""
        lines = differences(self.plan.identity, stored.identity)
        lines = lines or differences(self.plan.to_json(), stored.to_json())
        if lines:
            raise UserError(
                f"{self.path} holds another cache: {'; '.join(lines)} ('expected' is this recipe's). Choose "
                f"another place with --cache PATH, or remove that directory if it is no longer wanted."
            )

    def _require_space(self, shards: Sequence[Shard], *, planned: bool = True) -> None:
        """Raise UserError unless the disk has room for shards, those being published, and the plan if it is to come."""
        tokens = 0 if planned else self.bytes_needed() - self._bytes_of(self._to_come())
        at_once = [*shards, *(s for s in list(self._held) if s not in shards)]
        needed, free = int(_SLACK * (self._bytes_of(at_once) + tokens)), free_bytes(self.path)
        if needed > free:
            raise UserError(f"not enough disk space for the cache {self.path}: {self._lack(needed, free)}")

    def _lack(self, needed: int, free: int) -> str:
        """What is missing for what comes next, which needs so many bytes, and for all that is to come."""
        in_all = int(_SLACK * self.bytes_needed())
        missing = [(needed - free, "for the next shard"), (in_all - free, "for all that is to come")]
        lines = [f"{count:,} are missing {what}" for count, what in missing[needed >= in_all :] if count > 0]
        return (
            f"it needs {in_all:,} bytes more and {free:,} are free{'; ' if lines else ''}{', '.join(lines)}. Make "
            f"room, choose another place with --cache PATH, or harvest fewer tokens or sites. What was committed "
            f"before stays valid: run the same command again and it goes on from there."
        )

    def _check_shard(self, split: str, index: int, calibration: str | None) -> None:
        """Raise UserError unless the shard's record is sound, its files have their sizes, and it was stored with the
        calibration of that digest."""
        record = read_commit(self.path, self.plan, split, index)
        check_calibration(self.path, record, calibration)
        for name, size in shard_files(self.plan, split, index, record["arrays"]).items():
            got = file_size(self.path / name)
            check_size(self.path / name, got, size, repair(self.path, self.plan, split, index) if got != size else "")

    def _check_there(self, split: str, index: int, calibration: str | None) -> None:
        """`_check_shard`, but for a shard that another process evicts from a ring at this moment."""
        try:
            self._check_shard(split, index, calibration)
        except UserError:
            if self.plan.window_shards is None or commit_path(self.path, split, index).exists():
                raise
            self._committed.discard((split, index))

    def _load_calibrations(self) -> None:
        if self.plan.codec != "int8z":
            return
        if not all(has_calibration(self.path, site) for site in self.plan.sites):
            if self._committed:
                raise UserError(
                    f"{self.path / 'calibration'} is incomplete, yet shards were stored with it. Restore the folder, "
                    f"or remove the cache {self.path} and harvest again."
                )
            return
        self._calibrations = read_calibrations(self.path, self.plan)

    def _inherit_calibrations(self) -> None:
        """Copy μ and σ of sites that the cache knows already: there is one calibration per site in all its parts."""
        if self.plan.codec != "int8z":
            return
        others = [part.path for part in parts(self.path.parent.parent) if part.path != self.path]
        for site in self.plan.sites:
            holder = next((path for path in others if has_calibration(path, site)), None)
            if holder is not None and not has_calibration(self.path, site):
                values = read_calibration(holder, site).as_array()
                write_plain(self.path / "calibration" / site.name, calibration_array(site), values)


def _moments_entry(moments: np.ndarray) -> dict[str, Any]:
    """What the commit record says of a shard's moments [2, P]."""
    return {"bytes": moments.nbytes + 4, "crc32c": [f"{crc32c(moments):08x}"]}


def planning(path: Path, notify: Callable[[str], None] = lambda line: None) -> Lock:
    """The right to decide what the part at `path` is going to be. Raises UserError when it is not ours to fill."""
    _refuse_foreign(path)
    return hold(path / CREATE, lambda: notify(f"waiting for another process that is planning or finishing {path}"))


def forget_plan(path: Path, create: Lock) -> None:
    """Free the lock that `planning` gave, leaving no empty directory behind when nothing was planned."""
    if create.fresh and [file.name for file in path.iterdir()] == [CREATE]:
        create.remove()
        with contextlib.suppress(OSError):  # another process may be waiting there by now
            path.rmdir()
    create.release()


def _scan_order(plan: Plan) -> list[Shard]:
    """All shards in the order in which this process tries to take them.

    Under torchrun every process begins at another place, so that they do not meet at every lock; train shard 0, which
    everything waits for with codec int8z, always comes first.
    """
    shards = [(split, i) for split, sizes in plan.splits.items() for i in range(sizes.shards)]
    world = max(1, _environment_number("WORLD_SIZE", 1))
    start = len(shards) * (_environment_number("RANK", 0) % world) // world
    return shards[:1] + shards[max(start, 1) :] + shards[1 : max(start, 1)]


def _environment_number(name: str, default: int) -> int:
    with contextlib.suppress(ValueError):
        return int(os.environ.get(name, ""))
    return default


def _refuse_foreign(path: Path) -> None:
    """Raise UserError for a file, or a directory with content that is no cache of ours."""
    if path.is_dir() and any(path.iterdir()) and not (path / ROOT).exists() and not (path / CREATE).exists():
        raise UserError(
            f"{path} is not empty and not a cache: expected a new or empty directory, or a cache to go on with. "
            f"Choose another place with --cache PATH."
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; expected a directory for the cache. Choose another with --cache PATH.")
