"""What was written comes back: rows, tokens, statistics; through our reader and through others."""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from thresher.cache import bfloat16
from thresher.cache import reader as reader_module
from thresher.cache.errors import UserError
from thresher.cache.layout import estimate_bytes, row_sizes
from thresher.cache.locks import is_held
from thresher.cache.reader import CacheReader, find_complete
from thresher.cache.summary import summary

SETTINGS = [{"codec": c, "store": s} for c in ("int8z", "bf16") for s in ("kept", "all")]


def original(toy: ModuleType, reader: CacheReader, split: str, site: str) -> torch.Tensor:
    """[N, d] activations that the stored rows were made from, by their provenance."""
    p = reader.provenance(split)
    return toy.activations(split, p.context)[site][torch.arange(len(p.context)), torch.from_numpy(p.position).long()]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_row_returns_within_the_codec_error(
    settings: dict[str, Any], toy: ModuleType, finished: Callable[..., Path]
) -> None:
    reader = CacheReader.open(finished(**settings), identity=toy.IDENTITY)
    for split in ("train", "test", "validation"):
        kept = reader.provenance(split).keep == 1
        assert settings["store"] == "all" or kept.all()
        for site in toy.SITES:
            x = original(toy, reader, split, site.name)
            back = reader.gather(split, site.name, np.arange(reader.rows(split)))
            assert back.shape == x.shape
            if settings["codec"] == "bf16":
                assert torch.equal(back, x.to(torch.bfloat16).float())
            elif reader.rows(split):
                error = (back - x)[kept].double().square().sum(0)
                assert (error / (x[kept].double().var(0, unbiased=False) * kept.sum())).max() < 1e-3


@pytest.mark.parametrize("settings", SETTINGS)
def test_statistics_are_those_of_the_kept_rows_before_encoding(
    settings: dict[str, Any], toy: ModuleType, finished: Callable[..., Path]
) -> None:
    reader = CacheReader.open(finished(**settings))
    kept = reader.provenance("train").keep == 1
    for site in toy.SITES:
        x = original(toy, reader, "train", site.name)[kept].double()
        got = reader.statistics(site.name)
        assert got.count == len(x)
        np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got.variance, x.var(0, unbiased=False), rtol=1e-5)
        np.testing.assert_allclose(got.mean_norm, x.norm(dim=1).mean(), rtol=1e-6)
        np.testing.assert_allclose(got.mean_sq_norm, x.square().sum(1).mean(), rtol=1e-6)
        np.testing.assert_allclose(got.total_variance, got.variance.sum(), rtol=1e-12)


def test_each_stored_position_is_stored_at_most_once_and_almost_all_are(
    toy: ModuleType, finished: Callable[..., Path]
) -> None:
    reader = CacheReader.open(finished(store="all"))
    for split, packed in toy.CONTEXTS.items():
        p = reader.provenance(split)
        places = p.context.astype(np.int64) * 32 + p.position
        assert len(set(places.tolist())) == len(places)
        assert 0 <= (packed.keep > 0).sum() - len(places) < reader.plan.chunk_rows
        assert np.array_equal(p.token_id, packed.token_id[p.context, p.position])
        assert np.array_equal(p.document_id, packed.document_id[p.context, p.position])
        assert np.array_equal(p.keep, packed.keep[p.context, p.position])
        back = reader.contexts(split)
        assert all(np.array_equal(a, b) for a, b in zip(back, packed, strict=True))


@pytest.mark.parametrize("settings", SETTINGS)
def test_stock_zarr_reads_the_same_bits(
    settings: dict[str, Any], toy: ModuleType, finished: Callable[..., Path]
) -> None:
    bfloat16.register()
    reader = CacheReader.open(finished(**settings))
    root: Any = zarr.open_group(str(reader.path), mode="r")
    for split in ("train", "test", "validation"):
        rows = np.arange(reader.rows(split))
        for site in toy.SITES:
            raw = root[f"{split}/{site.name}"][:]
            if settings["codec"] == "int8z":
                mean, std = root[f"calibration/{site.name}"][:]
                scale = root[f"{split}/{site.name}.scale"][:].astype(np.float32)
                raw = (mean.astype(np.float64) + std.astype(np.float64) * scale[:, None] * raw).astype(np.float32)
                np.testing.assert_allclose(reader.gather(split, site.name, rows).numpy(), raw, rtol=1e-5, atol=1e-5)
            else:
                assert np.array_equal(reader.gather(split, site.name, rows).numpy(), raw.astype(np.float32))
            chunks = [reader.chunk(split, site.name, c) for c in range(len(rows) // reader.plan.chunk_rows)]
            stored = root[f"{split}/{site.name}"][:].tobytes()
            assert b"".join(chunk.tobytes() for chunk in chunks) == stored
        p, source = reader.provenance(split), root[f"{split}/source"][:]
        assert np.array_equal(source, np.stack([p.context, p.position], 1))
        for name in ("token_id", "document_id", "keep"):
            assert np.array_equal(root[f"{split}/{name}"][:], getattr(p, name))
            assert np.array_equal(root[f"{split}/contexts/{name}"][:], getattr(toy.CONTEXTS[split], name))
    for site in toy.SITES:
        stats = reader.statistics(site.name)
        array = root[f"stats/{site.name}"]
        assert np.array_equal(array[0], np.stack([stats.mean, stats.variance]))
        assert array.attrs["count"][0] == stats.count
    assert root["train/moments"][:, 0, 0].sum() == reader.statistics(toy.SITES[0].name).count


@pytest.mark.parametrize("codec", ["int8z", "bf16"])
def test_tensorstore_reads_the_same_bits(codec: str, toy: ModuleType, finished: Callable[..., Path]) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    reader = CacheReader.open(finished(codec=codec))
    for name in [toy.SITES[0].name, "token_id", "keep", "source"]:
        path = str(reader.path / "train" / name)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        array = tensorstore.open(spec, read=True).result().read().result()
        chunks = [reader.chunk("train", name, c) for c in range(reader.rows("train") // reader.plan.chunk_rows)]
        assert b"".join(chunk.tobytes() for chunk in chunks) == array.tobytes()


def test_a_lost_shard_is_no_plausible_data_to_stock_zarr(copied: Path, toy: ModuleType) -> None:
    for name in (toy.SITES[0].name, f"{toy.SITES[0].name}.scale", "token_id"):
        next((copied / "train" / name).glob("c.1*")).unlink()
    root: Any = zarr.open_group(str(copied), mode="r")
    rows = slice(512, 1024)  # shard 1
    assert (root[f"train/{toy.SITES[0].name}"][rows] == -128).all()
    assert np.isnan(root[f"train/{toy.SITES[0].name}.scale"][rows]).all()
    assert (root["train/token_id"][rows] == -1).all()
    with pytest.raises(UserError, match="wrong size"):
        CacheReader.open(copied)


def test_zarr_writes_and_reads_bfloat16_once_registered(tmp_path: Path) -> None:
    import ml_dtypes

    bfloat16.register()
    bfloat16.register()
    values = np.array([1.0, -0.0, np.inf, np.nan, 3.14], ml_dtypes.bfloat16)
    written = zarr.create_array(str(tmp_path / "a.zarr"), data=values)
    assert json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["data_type"] == "bfloat16"
    assert np.asarray(written[:]).tobytes() == values.tobytes()
    kind = bfloat16.BFloat16()
    for fill in (0.5, "NaN", "Infinity", "-Infinity"):
        assert kind.to_json_scalar(kind.from_json_scalar(fill, zarr_format=3), zarr_format=3) == fill
    assert float(kind.from_json_scalar("0x3f80", zarr_format=3)) == 1.0


def test_sizes_follow_the_rule() -> None:
    assert row_sizes([768], 10**9) == (1024, 262144)
    assert row_sizes([4096], 10**9) == (256, 262144)
    assert row_sizes([128], 10**9) == (1024, 262144)
    assert row_sizes([128], 300_000) == (1024, 32768)  # 10 shards
    assert row_sizes([128], 120_000) == (1024, 16384)  # 8 shards, 16 chunks each
    assert row_sizes([128], 3000) == (32, 512)  # 93 chunks
    assert row_sizes([128], 10) == (16, 256)


def test_the_estimate_matches_the_disk(toy: ModuleType, finished: Callable[..., Path]) -> None:
    for codec, per_row in (("int8z", 24 + 24 + 7 + 6 + 17), ("bf16", 48 + 48 + 14 + 17)):
        reader = CacheReader.open(finished(codec=codec))
        splits = reader.plan.splits.values()
        rows, shards = sum(s.rows for s in splits), sum(s.shards for s in splits)
        tokens = sum(s.contexts * s.tokens for s in splits)
        width = 1 + 2 * (24 + 24 + 7) + 6
        assert (
            estimate_bytes(toy.SITES, codec, rows, tokens, shards) == rows * per_row + 9 * tokens + 16 * width * shards
        )
        assert summary(reader)["bytes"] > estimate_bytes(toy.SITES, codec, rows, tokens, shards)


def test_the_summary_says_what_is_in_it(toy: ModuleType, finished: Callable[..., Path]) -> None:
    facts = summary(CacheReader.open(finished()))
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts["sites"]) == {site.name for site in toy.SITES}
    for site in facts["sites"].values():
        assert 0 < site["fvu"] <= site["fvu_worst_shard"] <= site["fvu_worst_dimension"] < 1e-3


def test_the_measured_error_is_the_error(toy: ModuleType, finished: Callable[..., Path]) -> None:
    reader = CacheReader.open(finished())
    for site in toy.SITES:
        error, spread = 0.0, 0.0
        for shard in range(reader.plan.splits["train"].shards):
            rows = shard * reader.plan.shard_rows + np.arange(reader.plan.shard_rows_of("train", shard))
            x = original(toy, reader, "train", site.name)[rows].double()
            error = (reader.gather("train", site.name, rows).double() - x).square().sum()
            spread = (x - x.mean(0)).square().sum()
            recorded = json.loads((reader.path / "commits" / f"train.{shard}.json").read_text())["quality"][site.name]
            assert recorded["fvu"] == pytest.approx(float(error / spread), rel=1e-3)


def test_only_a_finished_cache_of_the_same_identity_is_found(
    toy: ModuleType, finished: Callable[..., Path], tmp_path: Path
) -> None:
    found = find_complete(finished(), toy.IDENTITY)
    assert found is not None
    assert found.fingerprint == CacheReader.open(finished()).fingerprint
    assert find_complete(finished(), toy.IDENTITY | {"seed": 4}) is None
    assert find_complete(tmp_path, toy.IDENTITY) is None


def test_a_cache_is_locked_before_it_is_looked_at_and_free_again_when_it_cannot_be_opened(
    copied: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, joined, seen = copied / "read.lock", reader_module.joined, []
    lock.touch()

    def looking(path: Path) -> Any:
        seen.append(is_held(lock))
        return joined(path)

    monkeypatch.setattr(reader_module, "joined", looking)
    with CacheReader.open(copied):
        assert is_held(lock)
    assert not is_held(lock)
    with pytest.raises(UserError, match="made of something else"):
        CacheReader.open(copied, identity=toy.IDENTITY | {"seed": 4})
    (copied / "zarr.json").unlink()
    with pytest.raises(UserError, match="no cache"):
        CacheReader.open(copied)
    assert not is_held(lock)
    assert seen == [True] * 3


def test_a_cache_that_is_being_pruned_is_refused(copied: Path) -> None:
    with (copied / "read.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being pruned"):
            CacheReader.open(copied)
    CacheReader.open(copied).close()


def test_unknown_names_list_the_known_ones(finished: Callable[..., Path]) -> None:
    reader = CacheReader.open(finished())
    with pytest.raises(UserError, match=r"L00\.mlp_on.*L00\.mlp_in"):
        reader.gather("train", "L00.mlp_on", np.arange(2))
    with pytest.raises(UserError, match="dev"):
        reader.rows("dev")
    with pytest.raises(UserError, match="rows of"):
        reader.gather("train", "L00.mlp_in", np.array([10**6]))
