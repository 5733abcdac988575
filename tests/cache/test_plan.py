"""What a plan says it takes, by hand-worked numbers."""

from pathlib import Path
from types import ModuleType
from typing import Any

from thresher.cache.plan import Plan, estimate_memory

WIDTHS, CONTEXTS = 24 + 24 + 7, 10 * (100 + 20 + 3) * 32
PASSES: dict[str, Any] = {"pass_tokens": 64, "token_bytes": 4 * WIDTHS}
KERNELS = 40_000_000


def planned(toy: ModuleType, path: Path, codec: str) -> Plan:
    with toy.open_writer(path / codec, codec=codec) as writer:
        return writer.plan


def test_memory_is_two_shards_contexts_and_passes(toy: ModuleType, tmp_path: Path) -> None:
    plan = planned(toy, tmp_path, "bf16")
    beside = 2 * plan.shard_rows * (2 * WIDTHS + 60) + CONTEXTS + KERNELS
    assert estimate_memory(plan, **PASSES, passes=0, running_bytes=0) == beside
    assert estimate_memory(plan, **PASSES, passes=3, running_bytes=1000) == beside + 4 * 64 * 4 * WIDTHS + 3000


def test_memory_with_int8z_is_the_largest_of_three_moments(toy: ModuleType, tmp_path: Path) -> None:
    plan = planned(toy, tmp_path, "int8z")
    shard, waiting = plan.shard_rows * (WIDTHS + 3 * 2 + 60), plan.shard_rows * 4 * WIDTHS
    results = 4 * 64 * 4 * WIDTHS
    idle = estimate_memory(plan, **PASSES, passes=3, running_bytes=0)
    assert idle == shard + waiting + KERNELS + CONTEXTS + results  # encoding what waited
    narrow = PASSES | {"token_bytes": WIDTHS}
    busy = estimate_memory(plan, **narrow, passes=3, running_bytes=10**9)
    assert busy == 2 * shard + KERNELS + 3 * 10**9 + CONTEXTS + results // 4  # two shards while passes run
    wide = PASSES | {"token_bytes": 10**6}
    rows_wait = plan.shard_rows * 60 + plan.shard_rows * 10**6 + KERNELS + 3 * 10**9
    assert estimate_memory(plan, **wide, passes=3, running_bytes=10**9) == rows_wait + CONTEXTS + 4 * 64 * 10**6


def test_compressing_takes_thirty_megabytes_more(toy: ModuleType, tmp_path: Path) -> None:
    plain, packed = (planned(toy, tmp_path, codec) for codec in ("bf16", "bf16-lz4"))
    arguments = PASSES | {"passes": 0, "running_bytes": 0}
    assert estimate_memory(packed, **arguments) - estimate_memory(plain, **arguments) == 30_000_000
