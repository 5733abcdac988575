import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thresher.cache.batches import Batches
from thresher.cache.errors import UserError
from thresher.cache.layout import KEPT, ArraySpec
from thresher.cache.loading import Tier
from thresher.cache.reader import CacheReader


class Exact(CacheReader):
    """A source of float32 rows: what bf16 stores, plus something that bf16 would round away."""

    def arrays(self, split: str) -> dict[str, ArraySpec]:
        return {n: s._replace(dtype=s.dtype.replace("bfloat16", "float32")) for n, s in super().arrays(split).items()}

    def chunk(self, split: str, name: str, index: int, stop: threading.Event | None = None) -> np.ndarray:
        stored = super().chunk(split, name, index)
        if name not in self.sites:
            return stored
        wide = (stored.astype(np.uint32) << 16 | 1).view(np.float32)
        wide.flags.writeable = False
        return wide


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SITES = ["L00.mlp_out", "blocks.1.x"]


def take(reader: CacheReader, n: int, **settings: object) -> list[dict[str, torch.Tensor]]:
    """The first n batches."""
    settings = {"sites": SITES, "batch_rows": 200, "seed": 1, "group_chunks": 5} | settings
    batches = Batches(reader, **settings)  # type: ignore[arg-type]
    out = [batch.acts for batch in islice(batches, n)]
    batches.close()
    return out


@pytest.mark.parametrize("codec", ["int8z", "bf16"])
@pytest.mark.parametrize("batch_rows", [60, 64, 1000])
def test_batches_are_the_rows_of_the_read_order(codec: str, batch_rows: int, finished: Callable[..., Path]) -> None:
    reader = CacheReader.open(finished(codec=codec))
    batches = Batches(reader, sites=SITES, batch_rows=batch_rows, seed=1, group_chunks=5)
    assert reader.rows("train") < 3000
    for number, batch in enumerate(islice(batches, 6300 // batch_rows)):  # into the third epoch
        assert (batch.start, batch.rows) == (number * batch_rows, batch_rows)
        rows = batches.order.rows(batch.start, batch_rows)
        for site in SITES:
            assert torch.equal(batch.acts[site], reader.gather("train", site, rows))
    batches.close()


def test_any_start_goes_on_identically(finished: Callable[..., Path]) -> None:
    reader = CacheReader.open(finished())
    whole = take(reader, 40)
    for skipped in (1, 13, 16, 31):
        for got, expected in zip(take(reader, 8, start=200 * skipped), whole[skipped:], strict=False):
            assert all(torch.equal(got[site], expected[site]) for site in SITES)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_gets_the_same_batches(device: str, finished: Callable[..., Path]) -> None:
    for settings in ({"codec": "int8z", "store": "all"}, {"codec": "bf16"}):
        reader = CacheReader.open(finished(**settings))
        for got, expected in zip(take(reader, 30, device=device), take(reader, 30), strict=True):
            for site in SITES:
                assert got[site].device.type == device
                torch.testing.assert_close(got[site].cpu(), expected[site], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("world", [1, 2, 4, 5, 8, 64])
def test_ranks_interleave_to_the_whole(world: int, finished: Callable[..., Path]) -> None:
    reader = CacheReader.open(finished())
    whole = take(reader, 12, batch_rows=320)
    parts = [take(reader, 12, batch_rows=320, rank=rank, world=world) for rank in range(world)]
    for number, expected in enumerate(whole):
        for site in SITES:
            merged = torch.stack([parts[rank][number][site] for rank in range(world)], dim=1).flatten(0, 1)
            assert torch.equal(merged, expected[site])


@pytest.mark.parametrize("tier", ["mapped", "device"])
@pytest.mark.parametrize("store", ["kept", "all"])
def test_ranks_know_where_their_rows_stand_in_the_whole(store: str, tier: Tier, finished: Callable[..., Path]) -> None:
    reader = CacheReader.open(finished(store=store))
    settings: dict[str, Any] = {"sites": SITES[:1], "batch_rows": 250, "seed": 1, "group_chunks": 5, "end": 2500}
    whole = list(Batches(reader, **settings))
    ranks = [list(Batches(reader, **settings, rank=rank, world=3, tier=tier)) for rank in range(3)]
    for expected, *parts in zip(whole, *ranks, strict=True):
        rows = expected.acts[SITES[0]]
        assert {part.whole for part in parts} == {expected.whole} == {len(rows)}
        assert np.array_equal(expected.places, np.arange(len(rows)))
        merged = torch.full_like(rows, torch.nan)
        for part in parts:
            merged[torch.from_numpy(part.places)] = part.acts[SITES[0]]
        assert torch.equal(merged, rows)


def test_special_rows_hold_their_place_but_are_left_out(finished: Callable[..., Path]) -> None:
    reader = CacheReader.open(finished(store="all"))
    keep = reader.provenance("train").keep
    order = Batches(reader, sites=SITES, batch_rows=200, seed=1, group_chunks=5).order
    ordinary, everything = take(reader, 20), take(reader, 20, special=True)
    for number, (kept, both) in enumerate(zip(ordinary, everything, strict=True)):
        mask = torch.from_numpy(keep[order.rows(200 * number, 200)] == 1)
        assert 150 < mask.sum() < 200
        for site in SITES:
            assert torch.equal(kept[site], both[site][mask])


def test_seeds_and_epochs_give_other_orders(finished: Callable[..., Path]) -> None:
    reader = CacheReader.open(finished())
    n = reader.rows("train")
    a = Batches(reader, sites=SITES, batch_rows=10, seed=1).order
    b = Batches(reader, sites=SITES, batch_rows=10, seed=2).order
    assert not np.array_equal(a.rows(0, n), b.rows(0, n))
    assert not np.array_equal(a.rows(0, n), a.rows(n, n))


def test_dtype_is_the_one_asked_for(finished: Callable[..., Path]) -> None:
    reader = CacheReader.open(finished(codec="bf16"))
    (low,) = take(reader, 1, dtype=torch.bfloat16)
    (high,) = take(reader, 1)
    assert low[SITES[0]].dtype == torch.bfloat16
    assert torch.equal(low[SITES[0]].float(), high[SITES[0]])


def test_float32_rows_come_as_they_are(finished: Callable[..., Path]) -> None:
    reader = Exact.open(finished(codec="bf16", store="all"))
    order = Batches(reader, sites=SITES, batch_rows=200, seed=1, group_chunks=5).order
    keep = reader.provenance("train").keep == KEPT
    for tier in ("mapped", "device"):
        for number, acts in enumerate(take(reader, 20, tier=tier)):
            rows = order.rows(200 * number, 200)
            for site in SITES:
                assert torch.equal(acts[site], reader.gather("train", site, rows[keep[rows]]))
                assert bool((acts[site].view(torch.int32) & 1).all())


def test_a_damaged_chunk_raises_where_it_is_touched(copied: Path) -> None:
    file = next((copied / "train" / SITES[0]).glob("c.2*"))
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"chunk 0 of shard 2 of train/{SITES[0]}"):
        take(CacheReader.open(copied), 20)
    take(CacheReader.open(copied), 20, sites=["blocks.1.x"])


def test_an_impossible_batch_is_refused(finished: Callable[..., Path]) -> None:
    reader = CacheReader.open(finished())
    with pytest.raises(UserError, match="batch_rows is 100000"):
        take(reader, 1, batch_rows=100000)
    with pytest.raises(UserError, match="a row per rank"):
        take(reader, 1, batch_rows=200, world=201)
    with pytest.raises(UserError, match=r"blocks\.1\.y"):
        take(reader, 1, sites=["blocks.1.y"])


def test_closing_ends_the_iterator(finished: Callable[..., Path]) -> None:
    batches = Batches(CacheReader.open(finished()), sites=SITES, batch_rows=50, seed=1)
    for count, _ in enumerate(batches):
        if count == 3:
            batches.close()
        assert count < 10
