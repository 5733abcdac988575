"""Reading a whole cache to see whether any bit of it changed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from thresher.cache.arrays import read_plain
from thresher.cache.commit import commits_digest, file_digest, read_commit, shard_files
from thresher.cache.contracts import UserError
from thresher.cache.layout import crc32c, shard_index
from thresher.cache.plan import Plan

_THREADS = 2


def faults(root: Path, plan: Plan, manifest: dict[str, Any]) -> list[str]:
    """One line per fault: the file, and for activations the chunk."""
    shards = [(split, index) for split, sizes in plan.splits.items() for index in range(sizes.shards)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [line for lines in pool.map(lambda shard: list(_shard(root, plan, *shard)), shards) for line in lines]
    found += list(_side_files(root, manifest))
    if not found and commits_digest(root, plan) != manifest["commits"]:
        found.append("commits: the records are sound one by one, but not the ones that MANIFEST.json was made of")
    return found


def _side_files(root: Path, manifest: dict[str, Any]) -> Iterator[str]:
    for name, entry in manifest["files"].items():
        path = root / name
        if not path.exists():
            yield f"{name}: missing"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{name}: expected {entry['bytes']} bytes, got {path.stat().st_size}"
        elif file_digest(path) != entry["sha256"]:
            yield f"{name}: SHA-256 differs from MANIFEST.json"


def _shard(root: Path, plan: Plan, split: str, index: int) -> Iterator[str]:
    try:
        arrays = read_commit(root, plan, split, index)["arrays"]
    except UserError:
        yield f"commits/{split}.{index}.json: missing, damaged or of another cache"
        return
    sizes = shard_files(plan, split, index, arrays)
    for name, spec in plan.sharded_arrays(split).items():
        file = f"{split}/{name}/{spec.file_name(index)}"
        path = root / file
        if not path.exists():
            yield f"{file}: missing"
            continue
        if path.stat().st_size != sizes[file]:
            yield f"{file}: expected {sizes[file]} bytes, got {path.stat().st_size}"
            continue
        data = np.memmap(path, np.uint8, "r")
        rows = plan.shard_rows_of(split, index)
        step = spec.chunk[0] * spec.row_bytes
        for chunk, expected in enumerate(arrays[name]["crc32c"]):
            if f"{crc32c(np.asarray(data[chunk * step : (chunk + 1) * step])):08x}" != expected:
                yield f"{file}: chunk {chunk} does not match its checksum"
        if data[rows * spec.row_bytes :].tobytes() != shard_index(spec, rows):
            yield f"{file}: the index at its end is wrong"
    try:
        moments = read_plain(root / split / "moments", plan.moments_array(split), index)
        sound = [f"{crc32c(moments):08x}"] == arrays["moments"]["crc32c"]
    except UserError:
        sound = False
    if not sound:
        yield f"{split}/moments/{plan.moments_array(split).file_name(index)}: does not match its checksum"
