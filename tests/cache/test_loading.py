"""However chunks get into memory, the batches are the same; threads fail loudly and end when told to."""

import os
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch

from thresher.cache import loading, part
from thresher.cache.batches import Batches, default_group
from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.layout import CODECS, Contexts
from thresher.cache.loading import Loader, Tier, array_names, choose, taken_by
from thresher.cache.order import ReadOrder
from thresher.cache.place import Place, place_at
from thresher.cache.publish import publish
from thresher.cache.reader import CacheReader
from thresher.cache.staging import Pool
from thresher.cache.writer import CacheWriter

TIERS = get_args(Tier)
ON_DISK = [tier for tier in TIERS if tier != "remote"]
SITES = [Site("L00.mlp_in", 0, "mlp_in", 128), Site("L00.mlp_out", 0, "mlp_out", 7)]
NAMES = [site.name for site in SITES]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, toy: ModuleType) -> Callable[..., Path]:
    """A cache whose chunks of the first site are whole pages, so that they can be read past the page cache."""
    made: dict[tuple[str, str], Path] = {}

    def get(codec: str, store: str) -> Path:
        if (codec, store) not in made:
            path = made[codec, store] = tmp_path_factory.mktemp("wide") / "c.zarr"
            _fill(path, toy.toy_contexts(70, 0), codec, store)
        return made[codec, store]

    return get


def _fill(path: Path, packed: Contexts, codec: Any, store: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"identity": {}, "sites": SITES, "contexts": {"train": packed}, "seed": 0}
    with CacheWriter.open(path, codec=codec, store=store, fvu_gate=1.0, **settings) as writer:
        while (claimed := writer.claim()) is not None:
            shard = writer.shard(*claimed)
            shape = (len(shard.contexts), packed.keep.shape[1])
            shard.add({site.name: torch.randn((*shape, site.width), generator=generator) for site in SITES})
            shard.commit()
        writer.finalize()


def in_memory(path: Path) -> Place:
    """The same cache in an object store."""
    there = place_at(f"memory://{path.parent.name}/c.zarr")
    for file in path.rglob("*"):
        if file.is_file() and file.suffix != ".lock":
            publish(there / str(file.relative_to(path)), [file.read_bytes()])
    return there


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("store", ["kept", "all"])
def test_every_tier_gives_the_rows_of_the_read_order(
    tier: Tier, codec: str, store: str, wide: Callable[..., Path]
) -> None:
    path = wide(codec, store)
    reader = CacheReader.open(in_memory(path) if tier == "remote" else path)
    keep = reader.provenance("train").keep
    everything = {name: reader.gather("train", name, np.arange(reader.rows("train"))) for name in NAMES}
    for world, rank, first, dtype in [
        (1, 0, 0, torch.float32),
        (1, 0, 13, torch.float32),  # resumed in the second epoch
        (2, 1, 0, torch.float32),
        (3, 2, 5, torch.float32),
        (16, 5, 4, torch.bfloat16),
    ]:
        settings: dict[str, Any] = {"sites": NAMES, "batch_rows": 240, "seed": 1, "group_chunks": 8, "dtype": dtype}
        batches = Batches(reader, **settings, tier=tier, start=240 * first, rank=rank, world=world)
        for batch in islice(batches, 12):
            rows = batches.order.rows(batch.start, 240)[rank::world]
            rows = rows[keep[rows] == 1]
            assert 0 < len(rows) <= 240 // world
            for name in NAMES:
                assert torch.equal(batch.acts[name], everything[name][rows].to(dtype))
        batches.close()


def test_whole_pages_are_read_past_the_page_cache_and_the_rest_is_not(
    wide: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, bool]] = []
    real = os.open

    def watched(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        opened.append((str(path), bool(flags & os.O_DIRECT)))
        return real(path, flags, *rest, **named)

    reader = CacheReader.open(wide("bf16", "kept"))
    monkeypatch.setattr(part.os, "open", watched)
    take(reader, 5, tier="direct")
    assert any(direct for path, direct in opened if "mlp_in" in path)
    assert not any(direct for path, direct in opened if "mlp_out" in path)


def test_a_file_system_without_direct_reads_is_read_through_the_page_cache(
    wide: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest, **named)

    want = take(CacheReader.open(wide("int8z", "kept")), 20, tier="mapped")
    reader = CacheReader.open(wide("int8z", "kept"))
    monkeypatch.setattr(part.os, "open", refusing)
    got = take(reader, 20, tier="direct")
    assert all(torch.equal(a[name], b[name]) for a, b in zip(got, want, strict=True) for name in NAMES)


@pytest.mark.parametrize("tier", ON_DISK)
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_damaged_or_cut_off_later_is_named_by_whoever_reads_it(
    tier: Tier, codec: str, toy: ModuleType, tmp_path: Path
) -> None:
    _fill(tmp_path / "c", toy.toy_contexts(70, 0), codec, "kept")
    reader, file = CacheReader.open(tmp_path / "c"), tmp_path / "c" / "train" / "L00.mlp_in" / "c.1.0"
    data = bytearray(file.read_bytes())
    data[300] ^= 16
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"chunk 0 of shard 1 of train/L00\.mlp_in does not match its checksum"):
        take(reader, 20, tier=tier)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"c\.1\.0 has the wrong size"):
        take(CacheReader(tmp_path / "c", *_reopened(reader)), 20, tier=tier)
    assert not _ours()


def _reopened(reader: CacheReader) -> tuple[Any, list[str]]:
    """The segments of a reader that has not looked at any file yet."""
    fresh = part.Part(reader.path, reader.plan, reader.facts, reader.segments[0].base.manifest)
    return [type(reader.segments[0])(fresh)], []


def take(reader: CacheReader, n: int, **settings: Any) -> list[dict[str, torch.Tensor]]:
    settings = {"sites": NAMES, "batch_rows": 200, "seed": 1, "group_chunks": 8} | settings
    batches = Batches(reader, **settings)
    try:
        return [batch.acts for batch in islice(batches, n)]
    finally:
        batches.close()


def _ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("thresher-")]


@pytest.mark.parametrize("tier", TIERS)
def test_closing_leaves_no_thread_behind(tier: Tier, wide: Callable[..., Path]) -> None:
    path = wide("int8z", "kept")
    reader = CacheReader.open(in_memory(path) if tier == "remote" else path)
    batches = Batches(reader, sites=NAMES, batch_rows=50, seed=1, tier=tier)
    iterator = iter(batches)
    next(iterator)
    assert "thresher-batches" in _ours()
    batches.close()
    assert next(iterator, None) is None
    assert not _ours()


def test_the_end_is_the_end(wide: Callable[..., Path]) -> None:
    reader = CacheReader.open(wide("int8z", "kept"))
    asked: set[int] = set()
    real = reader.chunk

    def watched(split: str, name: str, index: int, stop: threading.Event | None = None) -> np.ndarray:
        asked.add(index)
        return real(split, name, index)

    reader.chunk = watched  # type: ignore[method-assign]
    batches = Batches(reader, sites=NAMES, batch_rows=100, seed=1, group_chunks=4, start=100, end=450)
    starts = [batch.start for batch in batches]
    assert starts == [100, 200, 300]
    rows = batches.order.group_chunks * reader.chunk_rows
    assert asked == set(batches.order.chunks(0, 0, -(-450 // rows) * 4).tolist())


class _Failing:
    """A source whose chunks cannot be had after the first group."""

    def __init__(self, reader: CacheReader) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        if name in ("read", "stored_bytes"):
            raise AttributeError(name)
        return getattr(self._reader, name)

    def chunk(self, split: str, name: str, index: int, stop: threading.Event | None = None) -> np.ndarray:
        if index not in self._reader.order(split, 1, 8).chunks(0, 0, 8):
            raise ZeroDivisionError("no such chunk")
        return self._reader.chunk(split, name, index)


def test_what_goes_wrong_in_a_thread_reaches_the_consumer_in_its_place(wide: Callable[..., Path]) -> None:
    reader = CacheReader.open(wide("int8z", "kept"))
    batches = Batches(_Failing(reader), sites=NAMES, batch_rows=64, seed=1, group_chunks=8)  # type: ignore[arg-type]
    assert batches.request.tier == "mapped"
    seen = []
    with pytest.raises(ZeroDivisionError):
        seen.extend(batch.start for batch in batches)
    assert seen == list(range(0, 8 * reader.chunk_rows - 63, 64))
    assert not _ours()


def test_slots_are_few_and_never_written_while_in_use(wide: Callable[..., Path]) -> None:
    reader = CacheReader.open(wide("int8z", "kept"))
    names = array_names(reader, "train", NAMES)
    order = ReadOrder(reader.rows("train") // reader.chunk_rows, reader.chunk_rows, 1, "train", 8)
    loader = Loader(reader, "train", names, reader.order("train", 1, 8), "direct")
    memory, at = set(), 0
    for segment in order.segments(0, 3 * reader.rows("train")):
        views = loader.group(segment, at)["L00.mlp_in"]
        for chunk, view in zip(segment.chunks, views, strict=True):
            assert view is not None
            assert not view.flags.writeable
            assert np.array_equal(view, reader.chunk("train", "L00.mlp_in", int(chunk)))
        memory.add(views[0].ctypes.data)  # type: ignore[union-attr]
        at += segment.length
    loader.close()
    assert len(memory) <= 3
    assert not _ours()


@pytest.mark.parametrize("world", [1, 2, 3, 6, 16])
def test_a_rank_loads_the_chunks_that_it_takes_rows_of(world: int) -> None:
    order = ReadOrder(20, 16, 0, "train", 6)
    at = 0
    for segment in order.segments(0, 3 * 20 * 16):
        u = np.arange(segment.length)
        for rank in range(world):
            mine = set((u[(at + u) % world == rank] % len(segment.chunks)).tolist())
            assert mine == set(np.flatnonzero(taken_by(segment, at, rank, world)).tolist())
        at += segment.length


def test_memory_comes_back_only_when_nothing_refers_to_it() -> None:
    pool = Pool()
    first = pool.take((4, 3), np.dtype(np.float32))
    address = first.ctypes.data
    view = torch.from_numpy(first)[1:].view(torch.int32).t()
    del first
    assert pool.take((4, 3), np.dtype(np.float32)).ctypes.data != address
    del view
    assert pool.take((4, 3), np.dtype(np.float32)).ctypes.data == address


def test_batches_that_are_kept_stay_what_they_were(wide: Callable[..., Path]) -> None:
    reader = CacheReader.open(wide("int8z", "kept"))
    kept = take(reader, 30)
    copies = [{name: x.clone() for name, x in acts.items()} for acts in take(reader, 30)]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(kept, copies, strict=True) for name in NAMES)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda size: monkeypatch.setattr(loading, "available_memory", lambda: size)


def test_the_tier_follows_from_the_sizes(wide: Callable[..., Path], memory: Callable[[int], None]) -> None:
    reader, cpu = CacheReader.open(wide("int8z", "kept")), torch.device("cpu")
    needed = reader.rows("train") * (128 + 2 + 7 + 2)
    assert reader.stored_bytes("train", array_names(reader, "train", NAMES)) == needed
    memory(2 * needed)
    assert choose(reader, "train", NAMES, cpu).tier == "mapped"
    memory(2 * needed - 2)
    assert choose(reader, "train", NAMES, cpu).tier == "direct"
    assert choose(reader, "train", NAMES[1:], cpu).tier == "mapped"
    lz4 = CacheReader.open(wide("bf16-lz4", "kept"))
    assert choose(lz4, "train", NAMES, cpu).tier == "unpacked"


def test_groups_grow_with_large_batches() -> None:
    assert [default_group(rows) for rows in (1, 4096, 4097, 8192, 8193, 65536)] == [64, 64, 128, 128, 256, 1024]
