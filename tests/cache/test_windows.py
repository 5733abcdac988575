"""Rolling and live mode: windows of shards that come and go, read as if they were always there."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from thresher.cache.batches import Batches
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.memory_shards import MemoryShards, MemoryWriter
from thresher.cache.plan import make_plan
from thresher.cache.reader import CacheReader
from thresher.cache.ring import CURSOR, Cursor, RingKeeper, open_ring, read_cursor, write_cursor
from thresher.cache.shard import ShardData
from thresher.cache.verify import faults
from thresher.cache.windows import WindowedSource, Windows, merged_statistics

SITES = ["L00.mlp_in", "blocks.1.x"]
WINDOW_BYTES = 140_000  # a window of two shards of the toy's eight


def produce(toy: ModuleType, writer: object, split: str, index: int) -> None:
    """Make one shard of the toy."""
    shard = writer.shard(split, index)  # type: ignore[attr-defined]
    shard.add(toy.activations(split, shard.contexts))
    shard.commit()


@contextmanager
def filler(toy: ModuleType, path: Path, made: list[tuple[str, int]] | None = None) -> Iterator[threading.Thread]:
    """A thread that refills the ring as harvest does, until training is over or the block ends."""
    stop = threading.Event()

    def fill() -> None:
        with toy.open_writer(path, window_bytes=WINDOW_BYTES) as writer:
            keeper = RingKeeper(writer)
            while not stop.is_set() and not keeper.over():
                keeper.publish_ready()
                shard = writer.take(keeper.wanted())
                if shard is None:
                    stop.wait(0.01)
                    continue
                produce(toy, writer, *shard)
                writer.settle()
                present = list((path / "train" / "L00.mlp_in").glob("c.*"))
                assert len(present) <= 3 * writer.plan.window_shards
                if made is not None:
                    made.append(shard)
            keeper.close()

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()


def batches(
    source: WindowedSource | CacheReader, start: int, count: int, rows: int = 64
) -> list[dict[str, torch.Tensor]]:
    """Some batches over train from a position on."""
    stream = Batches(source, sites=SITES, batch_rows=rows, seed=5, start=start, group_chunks=4)
    out = []
    for batch in stream:
        out.append({name: x_ND.clone() for name, x_ND in batch.acts.items()})
        if len(out) == count:
            break
    stream.close()
    return out


@contextmanager
def live(toy: ModuleType, tmp_path: Path) -> Iterator[WindowedSource]:
    """The toy as a live source: shards made in memory by the writer's own code."""
    plan = make_plan(toy.IDENTITY, toy.SITES, toy.CONTEXTS, "int8z", 3, "kept", window_bytes=WINDOW_BYTES)
    maker = MemoryWriter(plan, toy.CONTEXTS)

    def make(split: str, index: int) -> ShardData:
        shard = maker.shard(split, index)
        shard.add(toy.activations(split, shard.contexts))
        shard.commit()
        return maker.made()

    shards = MemoryShards(plan, make)
    first = {index: shards.shard("train", index).moments for index in Windows.of(plan).shards_in(0)}
    source = WindowedSource(
        tmp_path, plan, shards, toy.CONTEXTS.__getitem__, maker.calibrations, merged_statistics(plan, first)
    )
    with source:
        yield source


def test_windows_hold_every_shard_once_and_know_their_neighbours() -> None:
    windows = Windows(11, 3)
    assert [list(windows.shards_in(w)) for w in range(windows.number)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert all(shard in windows.shards_in(windows.holding(shard)) for shard in range(11))
    assert windows.after(3) == 0
    assert windows.kept(0) == {3, 0, 1}
    assert list(windows.wanted(3)) == [9, 10, 0, 1, 2]
    assert [windows.turned(2, asked) for asked in range(4)] == [0, 2, 2, 3]
    two = Windows(4, 2)  # where the window before is also the next one, asking for it moves on
    assert two.turned(0, 1) == 1
    assert list(Windows(2, 5).wanted(0)) == [0, 1]


def test_a_ring_gives_the_rows_of_a_cache_in_the_order_of_its_windows(
    toy: ModuleType, finished: Callable[..., Path], tmp_path: Path
) -> None:
    cache = CacheReader.open(finished())
    with filler(toy, tmp_path / "ring"), open_ring(tmp_path / "ring", toy.IDENTITY, print) as ring:
        assert ring.rows("train") == cache.rows("train")
        order = ring.order("train", 5, 4)
        per_window = ring.windows.size * ring.plan.shard_rows
        epoch = np.concatenate([order.rows(at, 64) for at in range(0, 2 * cache.rows("train"), 64)])
        for start in range(0, cache.rows("train"), per_window):
            stop = min(start + per_window, cache.rows("train"))
            assert np.array_equal(np.sort(epoch[start:stop]), np.arange(start, stop))
        got = batches(ring, 0, len(epoch) // 64)
        for number, batch in enumerate(got):
            rows = epoch[number * 64 : (number + 1) * 64]
            for name in SITES:
                assert torch.equal(batch[name], cache.gather("train", name, rows)), (number, name)
        with pytest.raises(UserError, match="ring of a rolling training"):
            faults(tmp_path / "ring")
        held_out = np.arange(0, ring.rows("test"), 3)
        assert torch.equal(ring.gather("test", SITES[0], held_out), cache.gather("test", SITES[0], held_out))
        sample = ring.sample("train", 50)
        assert len(sample) == 50
        assert sample.max() < per_window


def test_either_side_may_be_killed_and_started_again(toy: ModuleType, tmp_path: Path) -> None:
    with filler(toy, tmp_path / "whole"), open_ring(tmp_path / "whole", toy.IDENTITY, print) as ring:
        whole, total = batches(ring, 0, 60), ring.rows("train")
    path, out = tmp_path / "ring", []
    assert total < 60 * 64  # more than an epoch
    for start in range(0, 60, 20):  # harvest stops and goes on between these, training resumes
        made: list[tuple[str, int]] = []
        with filler(toy, path, made), open_ring(path, toy.IDENTITY, print) as ring:
            out += batches(ring, start * 64, 20)
    with filler(toy, path), open_ring(path, toy.IDENTITY, print) as ring:
        again = batches(ring, 64, 3)  # from a checkpoint of long ago: what was evicted is made again
    assert all(torch.equal(a[name], b[name]) for a, b in zip(out, whole, strict=True) for name in SITES)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(again, whole[1:4], strict=True) for name in SITES)


def test_harvest_stops_when_training_is_over_and_an_unfilled_ring_says_so(toy: ModuleType, tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "ring"
    with filler(toy, path) as thread, open_ring(path, toy.IDENTITY, said.append) as ring:
        batches(ring, 0, 1)
        ring.finish()
        thread.join(10)
        assert not thread.is_alive()
        assert read_cursor(path).done
    with open_ring(path, toy.IDENTITY, said.append) as ring:
        stop = threading.Event()
        threading.Timer(2.5, stop.set).start()
        last = ring.rows("train") // ring.chunk_rows - 1
        with pytest.raises(Interrupted):
            ring.chunk("train", SITES[0], last, stop)
    assert any("no harvest is running" in line for line in said)


def test_leaving_the_batches_of_a_ring_that_nobody_fills_does_not_wait(toy: ModuleType, tmp_path: Path) -> None:
    with filler(toy, tmp_path / "ring"), open_ring(tmp_path / "ring", toy.IDENTITY, print) as ring:
        batches(ring, 0, 1)
    with open_ring(tmp_path / "ring", toy.IDENTITY, print) as ring:
        stream = Batches(ring, sites=SITES, batch_rows=64, seed=5, start=ring.rows("train") - 64, group_chunks=4)
        asked = iter(stream)
        asker = threading.Thread(target=lambda: list(asked), daemon=True)
        asker.start()
        asker.join(0.5)
        assert asker.is_alive(), "the last window is not there"
        stream.close()
        asker.join(10)
        assert not asker.is_alive()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("thresher-load")]


def test_an_end_that_harvest_has_seen_before_is_no_end(toy: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "ring"
    for _ in range(2):  # the second time, harvest starts with the cursor of a training that is over
        with filler(toy, path) as thread, open_ring(path, toy.IDENTITY, print) as ring:
            batches(ring, 0, 20)
            assert thread.is_alive()
            ring.finish()
            thread.join(10)
            assert not thread.is_alive()


def test_every_flipped_bit_of_the_cursor_is_found(tmp_path: Path) -> None:
    write_cursor(tmp_path, Cursor(3, True, "me"))
    assert read_cursor(tmp_path) == Cursor(3, True, "me")
    data = (tmp_path / CURSOR).read_bytes()
    for at in range(len(data)):
        (tmp_path / CURSOR).write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        with pytest.raises(UserError, match=r"cursor\.json is damaged.*Delete it"):
            read_cursor(tmp_path)


def test_a_damaged_shard_of_a_ring_is_named_and_one_that_was_made_anew_is_read(toy: ModuleType, tmp_path: Path) -> None:
    with filler(toy, tmp_path / "ring"), open_ring(tmp_path / "ring", toy.IDENTITY, print) as ring:
        batches(ring, 0, 1)
    file = tmp_path / "ring" / "train" / SITES[0] / "c.0.0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with open_ring(tmp_path / "ring", toy.IDENTITY, print) as ring, pytest.raises(UserError, match="damaged: chunk 0"):
        ring.chunk("train", SITES[0], 0)


def test_a_ring_follows_one_training(toy: ModuleType, tmp_path: Path) -> None:
    with filler(toy, tmp_path / "ring"), open_ring(tmp_path / "ring", toy.IDENTITY, print):
        with pytest.raises(UserError, match="another training reads the ring"):
            open_ring(tmp_path / "ring", toy.IDENTITY, print)
        with pytest.raises(UserError, match="is the ring of a rolling training"):
            CacheReader.open(tmp_path / "ring")


def test_something_else_is_no_ring(toy: ModuleType, finished: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"made of something else: seed: expected 4, got 3"):
        open_ring(finished(), toy.IDENTITY | {"seed": 4}, print)


def test_a_window_that_cannot_hold_a_shard_is_refused(toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"harvest\.window_gb is .* expected at least"):
        toy.open_writer(tmp_path / "ring", window_bytes=1000)


def test_live_rows_are_those_of_the_ring(toy: ModuleType, tmp_path: Path) -> None:
    with filler(toy, tmp_path / "ring"), open_ring(tmp_path / "ring", toy.IDENTITY, print) as ring:
        stored = batches(ring, 32, 50)
        sites = list(ring.sites)
        statistics, calibrations = [ring.statistics(s) for s in sites], [ring.calibration(s) for s in sites]
    with live(toy, tmp_path) as source:
        made = batches(source, 32, 50)
        assert source.fingerprint == ring.fingerprint
        for name, a, b in zip(sites, statistics, calibrations, strict=True):
            mine, other = source.statistics(name), source.calibration(name)
            assert mine.count == a.count
            assert np.array_equal(mine.variance, a.variance)
            assert mine.mean_norm == a.mean_norm
            assert b is not None
            assert other is not None
            assert torch.equal(other.std, b.std)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(made, stored, strict=True) for name in SITES)


def test_what_goes_wrong_in_making_a_shard_reaches_the_trainer(toy: ModuleType) -> None:
    plan = make_plan(toy.IDENTITY, toy.SITES, toy.CONTEXTS, "int8z", 3, "kept", window_bytes=WINDOW_BYTES)

    def fail(split: str, index: int) -> ShardData:
        raise UserError("the model overflows")

    shards = MemoryShards(plan, fail)
    with pytest.raises(UserError, match="overflows"):
        shards.shard("train", 3)
    shards.close()


def test_whoever_waits_for_a_shard_in_memory_gets_it_however_far_apart_they_ask(toy: ModuleType) -> None:
    plan = make_plan(toy.IDENTITY, toy.SITES, toy.CONTEXTS, "int8z", 3, "kept", window_bytes=WINDOW_BYTES)
    made = ShardData({}, np.empty(0), {})
    shards, got = MemoryShards(plan, lambda split, index: made), []
    askers = [
        threading.Thread(target=lambda i=index: [got.append(shards.shard("train", i)) for _ in range(200)])
        for index in (0, 3, 5, 1)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(30)
    assert len(got) == 800
    shards.close()
