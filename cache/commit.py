"""Commit records and the manifest: what makes bytes on disk count.

A shard exists once `commits/<split>.<i>.json` does, and not before; the record holds the CRC32C of every chunk of every
array. A cache exists once MANIFEST.json does; it holds a hash over all commit records and of every other file.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from thresher.cache.errors import UserError
from thresher.cache.layout import FORMAT, VERSION, ArraySpec, crc32c
from thresher.cache.place import Place, size_of, sizes
from thresher.cache.plan import Plan
from thresher.cache.publish import publish, read_sealed, sealed, write_json
from thresher.cache.quality import Quality
from thresher.cache.records import canonical, fingerprint

MANIFEST = "MANIFEST.json"
ROOT = "zarr.json"
LOCK = "create.lock"
COMMITS = "commits"
PARTS = "parts"
"""Folder of a cache in which the parts lie that extend it: `<NN>-sites`, `<NN>-tokens`, in order of creation."""


def commit_path(root: Place, split: str, index: int) -> Place:
    return root / COMMITS / f"{split}.{index}.json"


def harvest_again(cache: Place, *, extend: bool) -> str:
    """The command that goes on with a cache, or with its extensions."""
    return f"thresher harvest RECIPE --cache {cache}{' --extend' if extend else ''}"


def repair(root: Place, plan: Plan, split: str, index: int) -> str:
    """What to do about a damaged shard of the part at `root`."""
    return (
        f"Delete {commit_path(root, split, index)} and {root / MANIFEST}, then run `{_made_by(root, plan)}` with the "
        f"recipe it was made by: it writes that shard anew, and nothing else."
    )


def _made_by(root: Place, plan: Plan) -> str:
    """The command that goes on with the part at `root`."""
    extends = plan.extends is not None
    return harvest_again(root.parent.parent if extends else root, extend=extends or _has_parts(root))


def _has_parts(root: Place) -> bool:
    """Whether anything extends a cache; False where that cannot be asked, since it is asked for a message's sake."""
    try:
        return (root / PARTS).is_dir()
    except UserError:
        return False


def chunk_sums(spec: ArraySpec, rows: np.ndarray) -> list[str]:
    """CRC32C of every chunk of a shard's rows, 8 hex digits each."""
    return [f"{crc32c(rows[at : at + spec.chunk[0]]):08x}" for at in range(0, len(rows), spec.chunk[0])]


def publish_commit(
    root: Place,
    plan: Plan,
    split: str,
    index: int,
    arrays: Mapping[str, Mapping[str, Any]],
    quality: Mapping[str, Quality],
    calibration: str | None,
) -> None:
    """Make a shard count. If it already does, its bytes must be these: raises UserError otherwise."""
    record = {
        "format": f"{FORMAT}-commit",
        "version": VERSION,
        "split": split,
        "shard": index,
        "rows": plan.shard_rows_of(split, index),
        "fingerprint": plan.fingerprint,
        "plan": fingerprint(plan.to_json()),
        "calibration": calibration,
        "arrays": arrays,
        "quality": {site: q._asdict() for site, q in quality.items()},
        "writer": {name: version(name) for name in ("thresher", "torch", "numpy")},
    }
    path = commit_path(root, split, index)
    try:
        write_json(path, sealed(record), exclusive=True)
    except FileExistsError:
        if read_sealed(path)["arrays"] != arrays:
            raise UserError(
                f"shard {index} of {split!r} was already committed with different bytes ({path}); the first stands. "
                f"Expected every writer to compute the same: use one kind of device, dtype and software for all."
            ) from None


def missing_record(root: Place, plan: Plan, split: str, index: int) -> UserError:
    """The error for a commit record that is not there; harvest sees to it by itself."""
    return UserError(
        f"{commit_path(root, split, index)} is missing: without its commit record shard {index} of {split!r} does not "
        f"count. Restore it, or run `{_made_by(root, plan)}` with the recipe it was made by: it writes that shard and "
        f"{root / MANIFEST} anew, and nothing else."
    )


def read_commit(root: Place, plan: Plan, split: str, index: int) -> dict[str, Any]:
    """A shard's commit record. Raises UserError when it is missing, damaged or of another cache."""
    path = commit_path(root, split, index)
    try:
        record = read_sealed(path)
    except FileNotFoundError:
        raise missing_record(root, plan, split, index) from None
    expected = (split, index, plan.shard_rows_of(split, index), fingerprint(plan.to_json()))
    if (record["split"], record["shard"], record["rows"], record["plan"]) != expected:
        raise UserError(
            f"{path} belongs to another cache: expected split, shard, rows and plan digest {expected}, got "
            f"{(record['split'], record['shard'], record['rows'], record['plan'])}. Restore the right file, or have "
            f"the shard written anew. {repair(root, plan, split, index)}"
        )
    return record


def check_calibration(root: Place, record: Mapping[str, Any], digest: str | None) -> None:
    """Raise UserError unless the rows of a shard were stored with the calibration that is there now.

    `record` is the shard's commit record, `digest` that of what is there (`stored.calibration_digest`).
    """
    if record["calibration"] != digest:
        raise UserError(
            f"{root / 'calibration'} is not the one that shard {record['shard']} of {record['split']!r} was stored "
            f"with: expected μ and σ with the digest {record['calibration']}, got {digest}. Restore the folder, or "
            f"remove the cache and harvest again."
        )


def shard_files(plan: Plan, split: str, index: int, arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Size in bytes of every file that one commit covers, by path below the root.

    `arrays` is what the commit record says of each array. Only the sizes of compressed files come from there; the
    others follow from the plan.
    """
    files = {
        f"{split}/{name}/{spec.file_name(index)}": arrays[name]["bytes"] if spec.compressed else spec.file_bytes(index)
        for name, spec in plan.sharded_arrays(split).items()
    }
    files[f"{split}/moments/{plan.moments_array(split).file_name(index)}"] = 16 * plan.moments_width + 4
    return files


def committed(root: Place, plan: Plan) -> set[tuple[str, int]]:
    """The shards that have a commit record, by name only."""
    size = sizes(root / COMMITS)
    shards = ((split, index) for split, each in plan.splits.items() for index in range(each.shards))
    return {shard for shard in shards if size(commit_path(root, *shard).name) is not None}


def is_complete(root: Place, plan: Plan) -> bool:
    """Whether a part was declared complete and every shard still has its commit record."""
    return (root / MANIFEST).exists() and len(committed(root, plan)) == sum(s.shards for s in plan.splits.values())


def file_digest(path: Place) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    if not isinstance(path, Path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commits_digest(root: Place, plan: Plan) -> str:
    """SHA-256 over all commit records, splits by name and shards ascending."""
    digest = hashlib.sha256()
    for split in sorted(plan.splits):
        for index in range(plan.splits[split].shards):
            digest.update(commit_path(root, split, index).read_bytes())
    return digest.hexdigest()


def side_files(plan: Plan) -> list[str]:
    """Every file below the root that no commit covers and the manifest lists, sorted."""
    files = [ROOT, *plan.documents()]
    for split in plan.splits:
        for name, spec in plan.context_arrays(split).items():
            assert spec.shard is not None
            shards = -(-spec.shape[0] // spec.shard[0])
            files += [f"{split}/contexts/{name}/{spec.file_name(i)}" for i in range(shards)]
    if plan.codec == "int8z":
        files += [f"calibration/{site.name}/c.0.0" for site in plan.sites]
    files += [f"stats/{site.name}/{name}" for site in plan.sites for name in ("c.0.0.0", "zarr.json")]
    return sorted(files)


def side_digests(root: Place, plan: Plan) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every side file, by path."""
    return {name: {"bytes": size_of(root / name), "sha256": file_digest(root / name)} for name in side_files(plan)}


def publish_manifest(root: Place, plan: Plan) -> None:
    """Declare the cache complete."""
    record = {
        "format": f"{FORMAT}-manifest",
        "version": VERSION,
        "complete": True,
        "fingerprint": plan.fingerprint,
        "splits": {name: {"rows": sizes.rows, "shards": sizes.shards} for name, sizes in plan.splits.items()},
        "commits": commits_digest(root, plan),
        "files": side_digests(root, plan),
    }
    publish(root / MANIFEST, [canonical(sealed(record))])
