"""Whose a shard is: committed, in this process's hands, or free to be taken.

A shard that is being written is held by a lock beside the place of its commit record, which the kernel frees when its
holder dies; the file stays then, and tells whoever takes the shard that there may be leftovers. Commit records tell
what is done, by whomever. So any number of processes share the work without a word between them.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from thresher.cache.commit import COMMITS, commit_path, committed, read_commit, shard_files
from thresher.cache.directory import discard
from thresher.cache.locks import Lock, try_hold
from thresher.cache.place import Place, local
from thresher.cache.plan import Plan
from thresher.cache.publish import flush_directory
from thresher.cache.world import from_environment

Shard = tuple[str, int]
"""(split, index)."""

_ASK_AGAIN_SECONDS = 1.0

FIRST: Shard = ("train", 0)
"""The shard that calibrates (int8z): none may be written before it."""


class Claims:
    """The shards of one part, as one writer sees them."""

    def __init__(self, path: Place, plan: Plan) -> None:
        self.path, self.plan = path, plan
        self.order = _scan_order(plan)
        """All shards, in the order in which this process tries to take them."""
        self.held: dict[Shard, Lock] = {}
        """In this writer's hands."""
        self._committed = committed(path, plan)
        self._taken_until: dict[Shard, float] = {}
        """In an object store asking costs two requests: when to do so again, by the clock of this process."""

    def close(self) -> None:
        """Let go of what is held."""
        for shard in list(self.held):
            self.release(shard)

    def committed(self) -> list[Shard]:
        """The shards known to be committed, sorted."""
        return sorted(self._committed)

    def is_committed(self, shard: Shard) -> bool:
        """Whether a shard has its commit record by now, from whomever."""
        if shard not in self._committed and commit_path(self.path, *shard).exists():
            self._committed.add(shard)
        return shard in self._committed

    def enter(self, shard: Shard) -> None:
        """A commit record of this writer's was published."""
        self._committed.add(shard)

    def strike(self, shards: Iterable[Shard]) -> None:
        """Forget those whose records are gone: of a ring, from which others evict."""
        self._committed -= {shard for shard in shards if not commit_path(self.path, *shard).exists()}

    def pending(self) -> list[Shard]:
        """All shards without a commit record, split by split, train shard 0 first."""
        if not isinstance(self.path, Path):  # one listing for all
            self._committed |= committed(self.path, self.plan)
            return [shard for shard in self._all() if shard not in self._committed]
        return [shard for shard in self._all() if not self.is_committed(shard)]

    def _all(self) -> list[Shard]:
        return [(split, i) for split, sizes in self.plan.splits.items() for i in range(sizes.shards)]

    def exhausted(self) -> bool:
        """Whether every shard is committed or in this writer's hands."""
        return all(shard in self.held or self.is_committed(shard) for shard in self.order)

    def open(self, among: Iterable[Shard]) -> Iterator[Shard]:
        """Those of the given shards that have no record and are not in this writer's hands."""
        known = self._committed | self.held.keys()
        return (shard for shard in among if shard not in known and not self.is_committed(shard))

    def take(self, shard: Shard) -> bool:
        """Hold a shard, unless another does or it is committed; clear what a dead writer left of it."""
        if time.monotonic() < self._taken_until.get(shard, 0.0):
            return False
        lock = try_hold(commit_path(self.path, *shard).with_suffix(".lock"))
        if lock is None:
            if not isinstance(self.path, Path):
                self._taken_until[shard] = time.monotonic() + _ASK_AGAIN_SECONDS
            return False
        if self.is_committed(shard):
            lock.release()
            return False
        if not isinstance(self.path, Path):  # objects appear whole: nothing of a dead writer is left
            self.held[shard] = lock
            return True
        if not lock.fresh:
            split, index = shard
            discard(self.path.glob(f"commits/{split}.{index}.json.*.tmp"))
            discard(self.path.glob(f"{split}/*/c.{index}.*.tmp"))
        if shard == FIRST:
            discard(self.path.glob("calibration/*/c.*.tmp"))
        self.held[shard] = lock
        return True

    def release(self, shard: Shard) -> None:
        """Let go of a shard, if it is held."""
        if shard in self.held:
            self.held.pop(shard).release()

    def evict(self, shard: Shard) -> None:
        """Remove a committed shard, its record first; left alone while another process has it."""
        lock = try_hold(commit_path(self.path, *shard).with_suffix(".lock"))
        if lock is None:
            return
        try:
            self._committed.discard(shard)
            if not commit_path(self.path, *shard).exists():  # another was faster
                return
            arrays = read_commit(self.path, self.plan, *shard)["arrays"]
            commit_path(self.path, *shard).unlink()
            flush_directory(local(self.path, "a ring") / COMMITS)
            discard(self.path / name for name in shard_files(self.plan, *shard, arrays))
            lock.remove()
        finally:
            lock.release()


def _scan_order(plan: Plan) -> list[Shard]:
    """All shards in the order in which this process tries to take them.

    Under torchrun every process begins at another place, so that they do not meet at every lock; train shard 0, which
    everything waits for with codec int8z, always comes first.
    """
    shards = [(split, i) for split, sizes in plan.splits.items() for i in range(sizes.shards)]
    world = from_environment()
    start = len(shards) * world.rank // world.size
    return shards[:1] + shards[max(start, 1) :] + shards[1 : max(start, 1)]
