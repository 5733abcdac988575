"""What was wrong before a cache was declared complete, or got lost after it: refused, mended or found, never sealed."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from thresher.cache import claims, sealing
from thresher.cache import publish as publish_module
from thresher.cache import writer as writer_module
from thresher.cache.arrays import read_plain, write_plain
from thresher.cache.commit import MANIFEST, commit_path, publish_manifest
from thresher.cache.errors import UserError
from thresher.cache.layout import calibration_array
from thresher.cache.locks import try_hold
from thresher.cache.plan import Plan
from thresher.cache.publish import publish, write_json
from thresher.cache.reader import CacheReader, find_complete
from thresher.cache.stored import read_root
from thresher.cache.writer import CacheWriter

Tree = Callable[[Path], dict[str, bytes]]
RING_BYTES = 130_000


def write_shard(toy: ModuleType, writer: CacheWriter, shard: tuple[str, int]) -> None:
    begun = writer.shard(*shard)
    begun.add(toy.activations(shard[0], begun.contexts))
    begun.commit()
    writer.settle()


@pytest.fixture
def begun(toy: ModuleType, tmp_path: Path) -> Path:
    """An int8z cache with two shards, by a process that ended then."""
    with toy.open_writer(tmp_path / "begun") as writer:
        for _ in range(2):
            shard = writer.claim()
            assert shard is not None
            write_shard(toy, writer, shard)
    return tmp_path / "begun"


def other_calibration(toy: ModuleType, path: Path) -> None:
    """Put another calibration there, in a file that is sound by itself."""
    spec, folder = calibration_array(toy.SITES[0]), path / "calibration" / toy.SITES[0].name
    values = read_plain(folder, spec).copy()
    values[1] *= 2
    write_plain(folder, spec, values)


def test_another_calibration_is_refused_on_resuming_and_on_finishing(toy: ModuleType, begun: Path) -> None:
    copy = begun.with_name("copy")
    shutil.copytree(begun, copy)
    other_calibration(toy, begun)
    with pytest.raises(UserError, match=r"calibration is not the one that shard 0 of 'train' was stored with.*Restore"):
        toy.fill(begun)
    with toy.open_writer(copy) as writer:
        while (shard := writer.claim()) is not None:
            write_shard(toy, writer, shard)
        other_calibration(toy, copy)
        with pytest.raises(UserError, match="calibration is not the one that shard 0"):
            writer.finalize()
    assert not (copy / MANIFEST).exists()


def test_another_calibration_under_the_manifest_is_found_by_verify_and_at_the_first_touch(
    toy: ModuleType, copied: Path
) -> None:
    other_calibration(toy, copied)
    publish_manifest(copied, read_root(copied).plan)
    with CacheReader.open(copied) as reader:
        (line,) = reader.verify()
        assert line.startswith("calibration: not the one that 9 shards were stored with (commits/")
        with pytest.raises(UserError, match="calibration is not the one that shard 0"):
            reader.chunk("train", "L00.mlp_in", 0)


@pytest.mark.parametrize("codec", ["int8z", "bf16", "bf16-lz4"])
def test_a_lost_commit_record_refuses_the_cache_until_harvest_writes_the_shard_anew(
    codec: str, toy: ModuleType, finished: Callable[..., Path], tmp_path: Path, tree: Tree
) -> None:
    path = tmp_path / "c"
    shutil.copytree(finished(codec=codec), path)
    (path / "commits/train.1.json").unlink()
    with pytest.raises(UserError, match=r"commits/train\.1\.json is missing.*thresher harvest .*MANIFEST\.json anew"):
        CacheReader.open(path)
    assert find_complete(path, toy.IDENTITY) is None
    toy.fill(path, codec=codec)
    assert tree(path) == tree(finished(codec=codec))


@pytest.mark.parametrize("name", ["train/L00.mlp_in/zarr.json", "train/contexts/token_id/c.0.0", "train/zarr.json"])
@pytest.mark.parametrize("place", [5, -1])
def test_what_the_plan_decides_is_written_anew_before_the_manifest_vouches_for_it(
    name: str, place: int, toy: ModuleType, begun: Path, finished: Callable[..., Path], tree: Tree
) -> None:
    data = bytearray((begun / name).read_bytes())
    data[place] ^= 1
    (begun / name).write_bytes(data)
    told: list[str] = []
    toy.fill(begun, notify=told.append)
    assert told == [f"{begun / name} was damaged or changed; it was written anew"]
    assert tree(begun) == tree(finished())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("train/L00.mlp_in/zarr.json", lambda data: data.replace(b":-128", b":-127"), "is not what the plan"),
        ("train/contexts/token_id/c.0.0", lambda data: bytes([data[0] ^ 1]) + data[1:], "digest of its tokens"),
        ("train/contexts/keep/c.0.0", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "index at its end"),
    ],
)
def test_verify_does_not_take_the_manifests_word_for_what_the_plan_decides(
    name: str, change: Callable[[bytes], bytes], said: str, copied: Path
) -> None:
    (copied / name).write_bytes(change((copied / name).read_bytes()))
    publish_manifest(copied, read_root(copied).plan)
    (line,) = CacheReader.open(copied).verify()
    assert str(Path(name).parent) in line
    assert said in line


def test_statistics_are_not_made_of_another_shards_moments(toy: ModuleType, begun: Path) -> None:
    shutil.copy(begun / "train/moments/c.1.0.0", begun / "train/moments/c.0.0.0")
    with pytest.raises(UserError, match=r"moments/c\.0\.0\.0 is damaged.*Delete .*commits/train\.0\.json"):
        toy.fill(begun)
    (begun / "commits/train.0.json").unlink()
    toy.fill(begun)
    assert CacheReader.open(begun).verify() == []


@pytest.fixture
def ring(toy: ModuleType, tmp_path: Path) -> Iterator[CacheWriter]:
    """A writer of a ring with its first two shards."""
    with toy.open_writer(tmp_path / "ring", window_bytes=RING_BYTES) as writer:
        for index in range(2):
            assert writer.take([("train", index)]) is not None
            write_shard(toy, writer, ("train", index))
        yield writer


def test_two_that_evict_one_shard_do_so_once_and_leave_no_lock(
    toy: ModuleType, ring: CacheWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(path: Path) -> object:
        monkeypatch.setattr(claims, "try_hold", try_hold)
        ring.claims.evict(("train", 1))
        return try_hold(path)

    with toy.open_writer(ring.path, window_bytes=RING_BYTES) as second:
        monkeypatch.setattr(claims, "try_hold", late)
        second.claims.evict(("train", 1))
        assert ("train", 1) in second.pending()
    record = commit_path(ring.path, "train", 0)
    record.write_bytes(b"rubbish")
    with pytest.raises(UserError, match="damaged"):
        ring.claims.evict(("train", 0))
    for index in range(2):
        lock = try_hold(commit_path(ring.path, "train", index).with_suffix(".lock"))
        assert lock is not None
        lock.release()


def test_a_ring_is_joined_while_another_evicts_from_it(
    toy: ModuleType, ring: CacheWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = sealing.check_shard

    def late(path: Path, plan: Plan, split: str, index: int, *more: Any) -> None:
        if (split, index) == ("train", 1):
            ring.claims.evict(("train", 1))
        check(path, plan, split, index, *more)

    monkeypatch.setattr(writer_module, "check_shard", late)
    with toy.open_writer(ring.path, window_bytes=RING_BYTES) as joined:
        assert ("train", 1) in joined.pending()
        assert ("train", 0) not in joined.pending()


def test_a_shard_is_held_until_every_file_of_it_was_written_or_failed(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, held = threading.Event(), list[bool]()

    def publishing(path: Path, *arguments: object, **named: object) -> None:
        if path.parent.name == "L00.mlp_in":
            failed.set()
            raise UserError("the disk is full")
        if path.parent.name == "L00.mlp_out":
            assert failed.wait(10)
            threading.Event().wait(0.2)
            held.append(("train", 0) in writer.claims.held)
        publish(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(writer_module, "publish", publishing)
    with toy.open_writer(tmp_path / "c", codec="bf16") as writer:
        with pytest.raises(UserError, match="the disk is full"):
            write_shard(toy, writer, ("train", 0))
        assert held == [True]


def test_a_repair_of_the_base_leaves_an_extension_alone_that_is_being_written(toy: ModuleType, copied: Path) -> None:
    own, others = copied / "train/keep/c.0.abc.tmp", copied / "parts/01-sites/train/L01.new/c.0.0.abc.tmp"
    for file in (own, others):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half a shard")
    (copied / "commits/train.1.json").unlink()
    toy.fill(copied)
    assert not own.exists()
    assert others.exists()


def test_who_finds_a_record_there_waits_until_its_name_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "a.json", {}, exclusive=True)
    flushed: list[Path] = []
    monkeypatch.setattr(publish_module, "flush_directory", flushed.append)
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "a.json", {}, exclusive=True)
    assert flushed == [tmp_path]


def test_a_system_without_direct_writing_writes_buffered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(publish_module.os, "O_DIRECT", raising=False)
    rows = np.arange(1 << 20, dtype=np.uint32)
    publish(tmp_path / "a", [rows], direct=True)
    assert (tmp_path / "a").read_bytes() == rows.tobytes()
