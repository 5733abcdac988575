"""What the writer refuses, and what it does with other dtypes and odd contents."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import zarr
from numcodecs import blosc

from thresher.cache import bfloat16, shard, stats
from thresher.cache.blocks import BlockEncoder
from thresher.cache.codec import calibrate
from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.layout import ArraySpec, Contexts, crc32c
from thresher.cache.pieces import shard_file
from thresher.cache.reader import CacheReader
from thresher.cache.summary import summary


def run_shard(toy: ModuleType, path: Path, spoil: Callable[[dict[str, torch.Tensor], np.ndarray], None], **k: object):  # type: ignore[no-untyped-def]
    """Write train shard 0 with activations changed by `spoil`, and wait for it."""
    with toy.open_writer(path, **k) as writer:
        shard = writer.shard("train", 0)
        acts = toy.activations("train", shard.contexts)
        spoil(acts, shard.contexts)
        shard.add(acts)
        shard.commit()
        writer.shard("train", 0) if writer.pending() else None
        writer.settle()


@pytest.mark.parametrize("codec", ["int8z", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_stops_and_is_located(
    codec: str, value: float, toy: ModuleType, tmp_path: Path
) -> None:
    where: list[int] = []

    def spoil(acts: dict[str, torch.Tensor], contexts: np.ndarray) -> None:
        acts["L00.mlp_out"][3, 11, 5] = value
        where.append(int(contexts[3]))

    with pytest.raises(UserError) as caught:
        run_shard(toy, tmp_path / "c", spoil, codec=codec)
    for part in ("'L00.mlp_out'", f"context {where[0]} of 'train'", "position 11"):
        assert part in str(caught.value)
    assert not list((tmp_path / "c").glob("commits/*.json"))


def test_a_value_that_is_not_stored_may_be_anything(toy: ModuleType, finished: Callable[..., Path]) -> None:
    reader = CacheReader.open(finished(store="kept"))
    assert (reader.provenance("train").position > 0).all()


def test_a_shard_above_the_gate_stops_with_advice_and_is_not_committed(toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'fvu_gate = 1e-07.*codec = "bf16"'):
        run_shard(toy, tmp_path / "c", lambda acts, contexts: None, fvu_gate=1e-7)
    assert not list((tmp_path / "c").glob("commits/*.json"))


def test_a_failed_commit_surfaces_at_the_next_call(toy: ModuleType, tmp_path: Path) -> None:
    with toy.open_writer(tmp_path / "c", fvu_gate=1e-7) as writer:
        shard = writer.shard("train", 0)
        shard.add(toy.activations("train", shard.contexts))
        shard.commit()
        with pytest.raises(UserError, match="loses too much"):
            writer.finalize()
        with pytest.raises(UserError, match="loses too much"):
            writer.shard("train", 1)


def test_an_abandoned_shard_leaves_nothing(toy: ModuleType, tmp_path: Path) -> None:
    with toy.open_writer(tmp_path / "c") as writer:
        before = len(writer.pending())
        shard = writer.shard("train", 0)
        shard.add(toy.activations("train", shard.contexts[:5]))
        shard.abandon()
        assert len(writer.pending()) == before
        assert writer.pending()[0] == ("train", 0)


@pytest.mark.parametrize("codec", ["int8z", "bf16"])
def test_bfloat16_activations_are_taken_as_they_are(codec: str, toy: ModuleType, tmp_path: Path) -> None:
    toy.fill(tmp_path / "low", codec=codec, dtype=torch.bfloat16)
    reader = CacheReader.open(tmp_path / "low")
    p = reader.provenance("train")
    for site in toy.SITES:
        acts = toy.activations("train", p.context, torch.bfloat16)[site.name]
        x = acts[torch.arange(len(p.context)), torch.from_numpy(p.position).long()]
        back = reader.gather("train", site.name, np.arange(len(p.context)))
        if codec == "bf16":
            assert torch.equal(back, x.float())
            assert summary(reader)["sites"][site.name]["fvu_worst_shard"] == 0.0
        else:
            assert (back - x.float()).square().sum() < 1e-3 * x.float().var(0).sum() * len(x)


def test_empty_test_split_is_allowed_and_empty_train_is_not(toy: ModuleType, tmp_path: Path) -> None:
    none = Contexts(np.zeros((0, 32), np.int32), np.zeros((0, 32), np.int32), np.zeros((0, 32), np.uint8))
    toy.fill(tmp_path / "c", contexts={"train": toy.CONTEXTS["train"], "test": none})
    reader = CacheReader.open(tmp_path / "c")
    assert reader.rows("test") == 0
    assert reader.provenance("test").token_id.shape == (0,)
    assert reader.contexts("test").token_id.shape == (0, 32)
    assert reader.gather("test", "L00.mlp_in", np.array([], np.int64)).shape == (0, 24)
    assert reader.verify() == []
    with pytest.raises(UserError, match="train split has 0 rows"):
        toy.open_writer(tmp_path / "d", contexts={"train": none})


def test_sites_that_cannot_be_folders_are_refused(toy: ModuleType, tmp_path: Path) -> None:
    for name in ("a/b", "keep", "contexts", "", ".hidden"):
        with pytest.raises(UserError, match="cannot name an array"):
            toy.open_writer(tmp_path / "c", sites=[Site(name, 0, "x", 4)])
    with pytest.raises(UserError, match="is empty"):
        toy.open_writer(tmp_path / "c", sites=[])
    with pytest.raises(UserError, match=r"codec is 'fp8'"):
        toy.open_writer(tmp_path / "c", codec="fp8")


def test_inference_tensors_are_taken(toy: ModuleType, finished: Callable[..., Path], tmp_path: Path) -> None:
    with torch.inference_mode(), toy.open_writer(tmp_path / "c") as writer:
        shard = writer.shard("train", 0)
        for at in range(0, len(shard.contexts), 4):
            shard.add(toy.activations("train", shard.contexts[at : at + 4]))
        shard.commit()
        writer.settle()
    name = "train/L00.mlp_in/c.0.0"
    assert (tmp_path / "c" / name).read_bytes() == (finished() / name).read_bytes()


def stored(path: Path) -> dict[str, bytes]:
    """Every shard file of activations."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.glob("t*/[Lb]*/c.*")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", ["int8z", "bf16"])
def test_blocks_of_a_device_are_stored_as_rows_of_a_cpu_are(
    codec: str, dtype: torch.dtype, toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.fill(tmp_path / "rows", codec=codec, dtype=dtype, store="all")
    for elements, batch in ((24 * 64, 7), (1 << 20, 3), (24 * 64, 3)):
        blocks = tmp_path / f"blocks-{elements}-{batch}"
        monkeypatch.setitem(shard.ENCODERS, "cpu", lambda shelf, elements=elements: BlockEncoder(shelf, elements))
        toy.fill(blocks, codec=codec, dtype=dtype, store="all", batch=batch)
        assert stored(blocks) == stored(tmp_path / "rows")
    mine, theirs = (CacheReader.open(path) for path in (tmp_path / "rows", blocks))
    for site in toy.SITES:
        for a, b in zip(mine.statistics(site.name), theirs.statistics(site.name), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        ours, other = (summary(reader)["sites"][site.name] for reader in (mine, theirs))
        for key in (key for key in ours if key.startswith("fvu")):
            np.testing.assert_allclose(ours[key], other[key], rtol=1e-3)
    bytes_of = [(path / "train/moments/c.0.0.0").read_bytes() for path in tmp_path.glob("blocks-1536-*")]
    assert bytes_of[0] == bytes_of[1], "moments of blocks depend on how the shard was fed"


def test_calibration_takes_the_first_kept_rows_and_no_more(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "CALIBRATION_ROWS", 100)
    made = []
    for batch in (1, 7, 100):
        toy.fill(tmp_path / f"{batch}", batch=batch)
        made.append(CacheReader.open(tmp_path / f"{batch}"))
        assert stored(tmp_path / f"{batch}") == stored(tmp_path / "1")
    with toy.open_writer(tmp_path / "other") as writer:
        first = writer.contexts_of("train", 0)[:5]
    keep = toy.CONTEXTS["train"].keep[first] == 1
    for site in toy.SITES:
        x = toy.activations("train", first)[site.name].numpy()[keep][:100]
        moments = stats.of_rows(x)
        expected = calibrate(moments.mean, moments.m2 / 100)
        for reader in made:
            got = reader.calibration(site.name)
            assert got is not None
            assert np.array_equal(got.as_array(), expected.as_array())


def test_memory_of_a_shard_is_used_again(toy: ModuleType, tmp_path: Path) -> None:
    with toy.open_writer(tmp_path / "c") as writer:
        places: list[set[int]] = []
        for split, index in writer.pending():
            part = writer.shard(split, index)
            places.append({array.ctypes.data for array in part._buffers.values()})
            part.add(toy.activations(split, part.contexts))
            part.commit()
            writer.settle()
        assert len(places) > 3
        assert places[0].isdisjoint(places[1]), "two shards have memory, though one was on the disk before the next"
        assert all(each <= places[turn % 2] for turn, each in enumerate(places))


@pytest.mark.parametrize("noise", [False, True])
def test_compressed_chunks_are_packed_in_place(noise: bool) -> None:
    spec = ArraySpec((96, 40), "bfloat16", (16, 40), (128, 40), "NaN", compressed=True)
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 1 << 16 if noise else 2, (96, 40)).astype(np.uint16)
    original = rows.copy()
    file = shard_file(spec, rows)
    data, lengths = b"".join(bytes(piece) for piece in file.pieces), file.entry["lengths"]
    assert len(data) == file.entry["bytes"]
    assert (sum(lengths) > original.nbytes) == noise
    ends = np.cumsum(lengths)
    assert np.array_equal(np.frombuffer(data[ends[-1] : ends[-1] + 96], "<u8").reshape(6, 2)[:, 1], lengths)
    for i, (start, end) in enumerate(zip(ends - lengths, ends, strict=True)):
        assert f"{crc32c(data[start:end]):08x}" == file.entry["crc32c"][i]
        assert blosc.decompress(data[start:end]) == original[16 * i : 16 * i + 16].tobytes()


def test_stock_readers_decompress_to_the_bits_of_plain_rows(toy: ModuleType, finished: Callable[..., Path]) -> None:
    bfloat16.register()
    plain, packed = finished(codec="bf16"), finished(codec="bf16-lz4")
    assert sum(map(len, stored(packed).values())) < sum(map(len, stored(plain).values()))
    stores = ["zarr"] + (["tensorstore"] if importlib.util.find_spec("tensorstore") else [])
    for site in toy.SITES:
        rows = np.asarray(zarr.open_array(str(plain / "train" / site.name), mode="r")[:]).view(np.uint16)
        for store in stores:
            assert np.array_equal(stock(store, packed / "train" / site.name), rows), store


def stock(store: str, path: Path) -> np.ndarray:
    """An array of bfloat16 as another program reads it, as bit patterns."""
    if store == "zarr":
        return np.asarray(zarr.open_array(str(path), mode="r")[:]).view(np.uint16)
    tensorstore = importlib.import_module("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result()).view(np.uint16)


def test_a_disk_that_filled_up_since_is_noticed_before_a_shard_is_begun(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with toy.open_writer(tmp_path / "c", codec="bf16") as writer:
        assert writer.claim() == ("train", 0)
        monkeypatch.setattr("thresher.cache.writer.free_bytes", lambda path: 12_345)
        with pytest.raises(UserError, match=r"[\d,]+ bytes more and 12,345 are free; [\d,]+ are missing"):
            writer.claim()
