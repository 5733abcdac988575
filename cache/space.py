"""Room on the disk: what is still to be written, and what is missing for it.

Pure: how much is free is passed in.
"""

from collections.abc import Sequence

from thresher.cache.claims import Shard
from thresher.cache.layout import estimate_bytes
from thresher.cache.plan import Plan

SLACK = 1.02
"""Of the estimate: metadata, indices, file-system blocks."""


def shards_bytes(plan: Plan, shards: Sequence[Shard]) -> int:
    """Estimate of the bytes of some shards."""
    rows = sum(plan.shard_rows_of(*shard) for shard in shards)
    provenance = not plan.rows_stored_elsewhere
    return estimate_bytes(plan.sites, plan.codec, rows, 0, len(shards), provenance=provenance)


def tokens_bytes(plan: Plan) -> int:
    """Bytes of the packed tokens that the part holds."""
    return 0 if plan.rows_stored_elsewhere else 9 * sum(s.contexts * s.tokens for s in plan.splits.values())


def to_come(plan: Plan, pending: Sequence[Shard]) -> list[Shard]:
    """Of the shards without a commit, those that will have to lie on the disk at one time."""
    if plan.window_shards is None:
        return list(pending)
    train = [shard for shard in pending if shard[0] == "train"]
    return train[: 3 * plan.window_shards] + [shard for shard in pending if shard[0] != "train"]


def lack(needed: int, in_all: int, free: int) -> str:
    """What is missing, in words, for what comes next, which needs so many bytes, and for all that is to come."""
    missing = [(needed - free, "for the next shard"), (in_all - free, "for all that is to come")]
    lines = [f"{count:,} are missing {what}" for count, what in missing[needed >= in_all :] if count > 0]
    return (
        f"it needs {in_all:,} bytes more and {free:,} are free{'; ' if lines else ''}{', '.join(lines)}. Make "
        f"room, choose another place with --cache PATH, or harvest fewer tokens or sites. What was committed "
        f"before stays valid: run the same command again and it goes on from there."
    )
