"""What a plan says it takes, by hand-worked numbers."""

import dataclasses
import json
from pathlib import Path
from types import ModuleType

from thresher.cache.plan import Plan, estimate_memory

WIDTHS, CONTEXTS = 24 + 24 + 7, 10 * (100 + 20 + 3) * 32
KERNELS = 40_000_000


def planned(toy: ModuleType, path: Path, codec: str) -> Plan:
    with toy.open_writer(path / codec, codec=codec) as writer:
        return writer.plan


def test_memory_is_two_shards_contexts_and_passes(toy: ModuleType, tmp_path: Path) -> None:
    plan = planned(toy, tmp_path, "bf16")
    beside = 2 * plan.shard_rows * (2 * WIDTHS + 60) + CONTEXTS + KERNELS
    assert estimate_memory(plan, token_bytes=4 * WIDTHS, results=0, kept=0, passing=0) == beside
    assert estimate_memory(plan, token_bytes=4 * WIDTHS, results=1, kept=20, passing=300) == beside + 321


def test_memory_with_int8z_is_the_largest_of_three_moments(toy: ModuleType, tmp_path: Path) -> None:
    plan = planned(toy, tmp_path, "int8z")
    shard, waiting = plan.shard_rows * (WIDTHS + 3 * 2 + 60), plan.shard_rows * 4 * WIDTHS
    always = {"results": 5 * 10**6, "kept": 7 * 10**6}
    beside = KERNELS + CONTEXTS + sum(always.values())
    idle = estimate_memory(plan, token_bytes=4 * WIDTHS, passing=0, **always)
    assert idle == shard + waiting + beside  # encoding what waited
    busy = estimate_memory(plan, token_bytes=WIDTHS, passing=10**9, **always)
    assert busy == 2 * shard + beside + 10**9  # two shards while passes run
    wide = estimate_memory(plan, token_bytes=10**6, passing=10**9, **always)
    assert wide == plan.shard_rows * (60 + 10**6) + beside + 10**9  # measuring what waited while passes run


def test_compressing_takes_thirty_megabytes_more(toy: ModuleType, tmp_path: Path) -> None:
    plain, packed = (
        estimate_memory(planned(toy, tmp_path, codec), token_bytes=0, results=0, kept=0, passing=0)
        for codec in ("bf16", "bf16-lz4")
    )
    assert packed - plain == 30_000_000


def test_a_plan_keeps_the_other_names_of_its_sites(toy: ModuleType, tmp_path: Path) -> None:
    plan = planned(toy, tmp_path, "bf16")
    named = dataclasses.replace(plan, sites=(plan.sites[0]._replace(aliases=("blocks.0.mlp", "h.0")), *plan.sites[1:]))
    stored = json.loads(json.dumps(named.to_json()))
    assert Plan.from_json(stored).sites == named.sites
    assert named.fingerprint == plan.fingerprint
    del stored["aliases"]  # a cache from before
    assert Plan.from_json(stored).sites == plan.sites
