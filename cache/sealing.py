"""Declaring a part complete: nothing is vouched for that was not looked at again.

`seal` checks the record and the file sizes of every shard, writes anew what follows from the plan and is not as it was
written, merges the statistics and publishes the manifest, all under `create.lock`. An extension is then entered in the
index of its cache; one killed in between is checked again first.

A ring is never complete, but before one may train from it the same is done for its first window (`ring`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from thresher.cache import stats
from thresher.cache.arrays import check_size, read_file, read_plain, repair_sharded, write_plain
from thresher.cache.commit import (
    MANIFEST,
    ROOT,
    check_calibration,
    publish_manifest,
    read_commit,
    repair,
    shard_files,
)
from thresher.cache.directory import discard, leftovers
from thresher.cache.errors import UserError
from thresher.cache.index import enter, is_listed
from thresher.cache.layout import Contexts, crc32c, group_json, stats_array
from thresher.cache.locks import CREATE, hold
from thresher.cache.place import Place, sizes
from thresher.cache.plan import Plan, context_array
from thresher.cache.publish import write_json
from thresher.cache.records import canonical
from thresher.cache.stored import calibration_digest, read_calibrations, read_root


def seal(path: Place, plan: Plan, contexts: Mapping[str, Contexts], notify: Callable[[str], None]) -> None:
    """Check, complete and declare the part at `path`, of which every shard is committed; once, by one process."""
    create = hold(path / CREATE, lambda: notify(f"waiting for another process to finish {path}"))
    try:
        if (path / MANIFEST).exists() and (plan.extends is None or is_listed(path)):
            return
        digest = calibration_digest(plan, read_calibrations(path, plan))
        size = sizes(path)
        for split, each in plan.splits.items():
            for index in range(each.shards):
                check_shard(path, plan, split, index, digest, size)
        repair_plan(path, plan, contexts, notify)
        write_statistics(path, plan, range(plan.splits["train"].shards))
        discard(leftovers(path))
        publish_manifest(path, plan)
        discard(path.glob("commits/*.lock"))
    finally:
        create.release()
    if plan.extends is not None:
        cache = path.parent.parent
        create = hold(cache / CREATE, lambda: notify(f"waiting for another process to plan {cache}"))
        try:
            enter(cache, path.name, plan)
        finally:
            create.release()


def check_shard(
    path: Place, plan: Plan, split: str, index: int, calibration: str | None, size_of: Callable[[str], int | None]
) -> None:
    """Raise UserError unless the shard's record is sound, its files have their sizes (`place.sizes`), and it was stored
    with the calibration of that digest."""
    record = read_commit(path, plan, split, index)
    check_calibration(path, record, calibration)
    for name, size in shard_files(plan, split, index, record["arrays"]).items():
        got = size_of(name) or 0
        check_size(path / name, got, size, repair(path, plan, split, index) if got != size else "")


def repair_plan(path: Place, plan: Plan, contexts: Mapping[str, Contexts], notify: Callable[[str], None]) -> None:
    """Write anew what follows from the plan and is not as it was written, so that no manifest vouches for it."""
    root = {"thresher": {**plan.to_json(), "facts": read_root(path).facts}}
    wrong = []
    for name, document in {ROOT: group_json(root), **plan.documents()}.items():
        if read_file(path / name) != canonical(document):
            write_json(path / name, document)
            wrong.append(path / name)
    for split, packed in contexts.items():
        for name, spec in plan.context_arrays(split).items():
            wrong += repair_sharded(path / split / "contexts" / name, spec, context_array(packed, name))
    for file in wrong:
        notify(f"{file} was damaged or changed; it was written anew")


def write_statistics(path: Place, plan: Plan, shards: Iterable[int]) -> None:
    """Publish the statistics over some train shards: their moments merged, in the order given.

    Raises UserError when the moments are not those of the shard's commit record.
    """
    spec, folder = plan.moments_array("train"), path / "train" / "moments"
    packed = []
    for i in shards:
        packed.append(read_plain(folder, spec, i)[0])
        if read_commit(path, plan, "train", i)["arrays"]["moments"] != moments_entry(packed[-1]):
            raise UserError(
                f"{folder / spec.file_name(i)} is damaged: it does not match the checksum in its commit record. "
                f"Restore the file, or have the shard written anew. {repair(path, plan, 'train', i)}"
            )
    by_mask = [[stats.unpack(plan.sites, shard[mask]) for shard in packed] for mask in range(2)]
    for site in plan.sites:
        kept, special = (stats.merged(s[site.name] for s in each) for each in by_mask)
        both = [kept.stats(), kept.merge(special).stats()]
        values = np.stack([np.stack([s.mean, s.variance]) for s in both])
        attributes = {
            key: [getattr(s, key) for s in both] for key in ("count", "mean_norm", "mean_sq_norm", "total_variance")
        }
        write_plain(path / "stats" / site.name, stats_array(site), values)
        write_json(path / "stats" / site.name / "zarr.json", stats_array(site).zarr_json(attributes))


def moments_entry(moments: np.ndarray) -> dict[str, Any]:
    """What the commit record says of a shard's moments [2, P]."""
    return {"bytes": moments.nbytes + 4, "crc32c": [f"{crc32c(moments):08x}"]}
