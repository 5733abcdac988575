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

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from thresher.cache.arrays import write_plain
from thresher.cache.buffers import Buffers
from thresher.cache.calibrations import inherit, inheritance, load_calibrations, publish_calibrations
from thresher.cache.claims import FIRST, Claims, Shard
from thresher.cache.codec import Calibration
from thresher.cache.commit import MANIFEST, ROOT, commit_path, publish_commit
from thresher.cache.contracts import Site
from thresher.cache.directory import check_same, forget_plan, lay_out, planning
from thresher.cache.errors import UserError
from thresher.cache.index import begin_index
from thresher.cache.layout import Codec, Contexts, Store, known_split
from thresher.cache.locks import READ, Lock, excludes, share, sole_writer
from thresher.cache.memory import available_memory
from thresher.cache.order import Stream
from thresher.cache.pieces import shard_file
from thresher.cache.place import Place, local, sizes
from thresher.cache.plan import Extends, Plan, make_plan
from thresher.cache.publish import DiskFullError, free_bytes, publish, write_json
from thresher.cache.sealing import check_shard, moments_entry, repair_plan, seal, write_statistics
from thresher.cache.shard import ShardData, ShardWriter
from thresher.cache.space import SLACK, lack, shards_bytes, to_come, tokens_bytes
from thresher.cache.stored import calibration_digest, extended_part, read_root

_POLL_SECONDS = 0.2


class CacheWriter:
    """A cache being filled. Use `open`; close it (or use it as a context manager) when done."""

    def __init__(
        self,
        path: Place,
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
        self.claims = Claims(path, plan)
        """Which shards are committed, held, or free."""
        self._sole: Lock | None = None
        self._alive: Lock | None = None  # between two shards, this alone tells that somebody is at work
        self._calibrations: dict[str, Calibration] = {}
        self.buffers, self._other_buffers = Buffers(), Buffers()  # shards take turns, so memory hangs on no timing
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
        path: Place,
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
                writer._sole = sole_writer(local(path, "a writer"))
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
            size = sizes(path)
            for split, index in writer.claims.committed():
                writer._check_there(split, index, digest, size)
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
        return shards_bytes(self.plan, to_come(self.plan, self.pending())) + self._tokens_to_come()

    def pending(self) -> list[Shard]:
        """(split, shard) of all shards without a commit, train shard 0 first."""
        return self.claims.pending()

    def exhausted(self) -> bool:
        """Whether every shard is committed or in this writer's hands."""
        return self.claims.exhausted()

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
        if among is not None:
            self.claims.strike(among)
        for shard in self.claims.open(self.claims.order if among is None else among):
            if (ready or shard == FIRST) and self.claims.take(shard):
                self._require_space([shard])
                return shard
        return None

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
        shard = (split, index)
        if shard not in self.claims.held and not self.claims.is_committed(shard) and not self.claims.take(shard):
            raise UserError(
                f"shard {index} of {split!r} of {self.path} is being written by another process. Claim a shard that is "
                f"free."
            )
        source = self._streams[split].shard(index, self.plan.shard_rows)
        assert shard == FIRST or self.plan.codec != "int8z" or self._calibrations, (
            "train shard 0 comes first: it calibrates"
        )
        self.buffers, self._other_buffers = self._other_buffers, self.buffers
        return ShardWriter(self, split, index, source, self._contexts[split])

    def finalize(self) -> None:
        """Check all that was committed, write the statistics and declare the part complete; once, by one process.

        An extension is then entered in the index of its cache; one killed in between is checked again first.
        """
        self.settle()
        missing = self.pending()
        assert not missing, f"{len(missing)} shards are not committed"
        seal(self.path, self.plan, self._contexts, self._notify)

    def prepare_reading(self, shards: Sequence[int]) -> None:
        """Check and complete what a ring is opened with: what follows from the plan, statistics over some shards."""
        repair_plan(self.path, self.plan, self._contexts, self._notify)
        write_statistics(self.path, self.plan, shards)

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
        self.claims.close()
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
        """Fix μ and σ for good: they are published before any row that uses them."""
        publish_calibrations(self.path, self.plan, by_site)
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
            needed, free = int(SLACK * shards_bytes(self.plan, [(split, index)])), free_bytes(self.path)
            lacking = lack(needed, int(SLACK * self.bytes_needed()), free)
            raise UserError(f"{error.reason} For the cache {self.path}, {lacking}") from error
        finally:
            self.claims.release((split, index))

    def _publish_held(self, split: str, index: int, finish: Callable[[], ShardData]) -> None:
        data, specs = finish(), self.plan.sharded_arrays(split)
        there = self.claims.is_committed(
            (split, index)
        )  # then these bytes are compared with the record and not written

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
        arrays["moments"] = moments_entry(data.moments)
        digest = calibration_digest(self.plan, self._calibrations)
        publish_commit(self.path, self.plan, split, index, arrays, data.quality, digest)
        for buffers in (self.buffers, self._other_buffers):
            buffers.give(data.arrays.values())
        self.claims.enter((split, index))

    def _can_encode(self) -> bool:
        """Whether any shard may be begun: the calibration is there, or this writer is about to make it."""
        if self.plan.codec == "int8z" and not self._calibrations:
            self._load_calibrations()
        return self.plan.codec != "int8z" or bool(self._calibrations) or FIRST in self.claims.held

    def _load_calibrations(self) -> None:
        self._calibrations = load_calibrations(self.path, self.plan, used=bool(self.claims.committed()))

    def _raise_failure(self) -> None:
        if self._failure is None and self._publishing is not None and self._publishing.done():
            self._failure = self._publishing.exception()
        if self._failure is not None:
            self._surfaced = True
            raise self._failure

    def _prepare(self, facts: Mapping[str, Any]) -> None:
        """Bring the directory to the state in which any shard can be written; under `create.lock`."""
        planned = (self.path / ROOT).exists()
        if planned:
            check_same(self.path, self.plan, read_root(self.path).plan)
        self._require_space(to_come(self.plan, self.pending()))
        inherited = inheritance(self.path, self.plan)
        if self.plan.extends is not None:
            begin_index(self.path.parent.parent)
        if not planned:
            lay_out(self.path, self.plan, self._contexts, facts)
        if isinstance(self.path, Path):
            (self.path / READ).touch()
        self._alive = share(self.path / READ)
        absent = {p: d for p, d in self.plan.documents().items() if not (self.path / p).exists()}
        list(self._files.map(lambda item: write_json(self.path / item[0], item[1]), absent.items()))
        if self.pending():  # a repair: the user removed a commit record
            (self.path / MANIFEST).unlink(missing_ok=True)
        inherit(self.path, self.plan, inherited)
        self._load_calibrations()

    def _tokens_to_come(self) -> int:
        """Bytes of the packed tokens, as long as they are not there."""
        return 0 if (self.path / ROOT).exists() else tokens_bytes(self.plan)

    def _require_space(self, shards: Sequence[Shard]) -> None:
        """Raise UserError unless the disk has room for shards, those in hand, and the tokens if they are to come."""
        at_once = [*shards, *(s for s in list(self.claims.held) if s not in shards)]
        needed = int(SLACK * (shards_bytes(self.plan, at_once) + self._tokens_to_come()))
        free = free_bytes(self.path)
        if needed > free:
            lacking = lack(needed, int(SLACK * self.bytes_needed()), free)
            raise UserError(f"not enough disk space for the cache {self.path}: {lacking}")

    def _check_there(self, split: str, index: int, calibration: str | None, size: Callable[[str], int | None]) -> None:
        """Raise UserError unless a committed shard is sound; one that another evicts from a ring meanwhile is none."""
        try:
            check_shard(self.path, self.plan, split, index, calibration, size)
        except UserError:
            if self.plan.window_shards is None or commit_path(self.path, split, index).exists():
                raise
            self.claims.strike([(split, index)])
