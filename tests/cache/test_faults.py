"""Kills, full disks, flipped bits, strangers: refused or resumed, never taken for whole."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from thresher.cache import writer as writer_module
from thresher.cache.commit import MANIFEST
from thresher.cache.contracts import UserError
from thresher.cache.layout import VERSION
from thresher.cache.locks import try_hold
from thresher.cache.publish import publish
from thresher.cache.reader import CacheReader, find_complete

Tree = Callable[[Path], dict[str, bytes]]
Victim = Callable[..., str]


def differing(left: dict[str, bytes], right: dict[str, bytes]) -> list[str]:
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def test_bytes_do_not_depend_on_the_batches_fed(
    toy: ModuleType, finished: Callable[..., Path], tmp_path: Path, tree: Tree
) -> None:
    for batch in (1, 100):
        toy.fill(tmp_path / f"{batch}", batch=batch)
        assert differing(tree(tmp_path / f"{batch}"), tree(finished())) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("codec", ["int8z", "bf16"])
def test_bytes_do_not_depend_on_the_batches_fed_from_any_device(
    device: str, codec: str, toy: ModuleType, tmp_path: Path, tree: Tree
) -> None:
    for batch in (2, 31):
        toy.fill(tmp_path / f"{batch}", batch=batch, codec=codec, store="all", device=device)
    assert differing(tree(tmp_path / "2"), tree(tmp_path / "31")) == []
    assert CacheReader.open(tmp_path / "2").verify() == []


def test_bytes_do_not_depend_on_the_number_of_threads(
    toy: ModuleType, finished: Callable[..., Path], tmp_path: Path, tree: Tree
) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            toy.fill(tmp_path / f"{threads}")
            assert differing(tree(tmp_path / f"{threads}"), tree(finished())) == []
    finally:
        torch.set_num_threads(before)


def test_a_killed_harvest_is_refused_and_resumes_to_identical_bytes(
    toy: ModuleType, finished: Callable[..., Path], tmp_path: Path, victim: Victim, tree: Tree
) -> None:
    """Killed at random calls that make data durable, over plan, calibration, shards, statistics and manifest."""
    whole = tree(finished())
    generator, killed = random.Random(0), 0
    moments = [1, 4, *generator.sample(range(10, 860), 5), 885, 904]  # 324 of 905 calls are the plan, 34 the end
    for moment in moments:
        path = tmp_path / f"{moment}"
        said = victim(path, die_at=moment)
        if said == "killed":
            killed += 1
            assert find_complete(path, toy.IDENTITY) is None
            with pytest.raises(UserError, match=r"incomplete|no cache"):
                CacheReader.open(path)
            assert victim(path) == "done"
        assert differing(tree(path), whole) == [], f"killed at call {moment}"
        assert CacheReader.open(path).verify() == []
    assert killed >= 8


def test_a_harvest_killed_again_and_again_ends_in_identical_bytes(
    finished: Callable[..., Path], tmp_path: Path, victim: Victim, tree: Tree
) -> None:
    kills = 0
    while victim(tmp_path / "c", die_at=260) == "killed":
        kills += 1
        assert kills < 30, "no progress"
    assert kills >= 3
    assert differing(tree(tmp_path / "c"), tree(finished())) == []


def test_bytes_limit_stops_with_advice_and_leaves_no_temporary_file(
    finished: Callable[..., Path], tmp_path: Path, victim: Victim, tree: Tree
) -> None:
    said = victim(tmp_path / "c", file_bytes=6000)
    assert said.startswith("UserError: cannot write")
    assert "bytes" in said
    assert "free" in said
    assert "run the same command again" in said
    assert not list((tmp_path / "c").rglob("*.tmp"))
    assert victim(tmp_path / "c") == "done"
    assert differing(tree(tmp_path / "c"), tree(finished())) == []


def test_a_disk_that_fills_up_keeps_what_was_committed(
    toy: ModuleType, finished: Callable[..., Path], tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.write, [350_000]

    def write(descriptor: int, data: memoryview) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(UserError, match=r"No space left.*needs .* bytes and .* are free.*stays valid"):
            toy.fill(tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*.tmp"))
    with toy.open_writer(tmp_path / "c") as writer:
        assert 0 < len(writer.pending()) < 8
    toy.fill(tmp_path / "c")
    assert differing(tree(tmp_path / "c"), tree(finished())) == []


def test_a_small_disk_is_refused_before_anything_is_computed(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "free_bytes", lambda path: 12_345)
    with pytest.raises(UserError, match=r"needs [\d,]{7} bytes more and 12,345 are free"):
        toy.open_writer(tmp_path / "c")
    assert not (tmp_path / "c" / "zarr.json").exists()


@pytest.mark.parametrize(
    "pattern",
    [
        "train/L00.mlp_in/c.1.0",
        "train/L00.mlp_in.scale/c.0",
        "test/token_id/c.0",
        "train/source/c.2.0",
        "train/moments/c.3.0.0",
        "train/L00.mlp_in/zarr.json",
        "train/contexts/token_id/c.0.0",
        "calibration/L00.mlp_in/c.0.0",
        "stats/L00.mlp_in/c.0.0.0",
        "commits/train.1.json",
    ],
)
def test_every_flipped_bit_is_found_and_named(pattern: str, copied: Path) -> None:
    file = copied / pattern
    whole = file.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        data = bytearray(whole)
        data[place] ^= 4
        file.write_bytes(data)
        lines = CacheReader.open(copied).verify()
        assert lines, f"bit of byte {place} not found"
        assert all(pattern in line for line in lines)
        file.write_bytes(whole)
    assert CacheReader.open(copied).verify() == []


def test_a_flipped_bit_names_its_chunk(copied: Path) -> None:
    file = copied / "train/L00.mlp_out/c.2.0"
    data = bytearray(file.read_bytes())
    data[3 * 32 * 24 + 7] ^= 16
    file.write_bytes(data)
    assert CacheReader.open(copied).verify() == ["train/L00.mlp_out/c.2.0: chunk 3 does not match its checksum"]


@pytest.mark.parametrize("name", ["zarr.json", MANIFEST])
def test_a_flipped_bit_in_root_or_manifest_refuses_the_cache(name: str, copied: Path) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        CacheReader.open(copied)


def test_touching_a_damaged_side_file_raises(copied: Path) -> None:
    reader = CacheReader.open(copied)
    touches = {
        "calibration/L00.mlp_in/c.0.0": lambda: reader.calibration("L00.mlp_in"),
        "stats/L00.mlp_in/c.0.0.0": lambda: reader.statistics("L00.mlp_in"),
        "test/contexts/token_id/c.0.0": lambda: reader.contexts("test"),
        "commits/test.0.json": lambda: reader.provenance("test"),
    }
    for name, touch in touches.items():
        data = bytearray((copied / name).read_bytes())
        data[30] ^= 2
        (copied / name).write_bytes(data)
        with pytest.raises(UserError, match="damaged"):
            touch()


@pytest.mark.parametrize("change", ["delete", "truncate", "extend"])
@pytest.mark.parametrize("name", ["train/L00.mlp_in/c.0.0", "test/keep/c.0", "train/moments/c.0.0.0"])
def test_a_shard_file_of_another_size_refuses_the_cache(change: str, name: str, copied: Path) -> None:
    file = copied / name
    data = file.read_bytes()
    file.unlink()
    if change != "delete":
        file.write_bytes(data[:-1] if change == "truncate" else data + b"\0")
    with pytest.raises(UserError, match=rf"{name}.*wrong size: expected {len(data):,}"):
        CacheReader.open(copied)


def test_swapped_shards_are_found(copied: Path) -> None:
    a, b = copied / "train/L00.mlp_in/c.1.0", copied / "train/L00.mlp_in/c.2.0"
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)
    first, second = CacheReader.open(copied).verify()
    assert "c.1.0: holds the rows of shard 2, not of shard 1" in first
    assert "c.2.0: holds the rows of shard 1, not of shard 2" in second


def test_a_repaired_shard_is_the_same_again(
    toy: ModuleType, copied: Path, finished: Callable[..., Path], tree: Tree
) -> None:
    (copied / "train/L00.mlp_in/c.1.0").write_bytes(b"rubbish")
    (copied / "commits/train.1.json").unlink()
    (copied / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"incomplete: \d of \d shards"):
        CacheReader.open(copied)
    with toy.open_writer(copied) as writer:
        assert writer.pending() == [("train", 1)]
    toy.fill(copied)
    assert differing(tree(copied), tree(finished())) == []


def test_another_identity_is_refused_with_keys_and_values(toy: ModuleType, finished: Callable[..., Path]) -> None:
    other = {"model": {"name": "toy", "dtype": "bfloat16"}, "seed": 4, "sites": ["a", "b"]}
    pattern = r"model\.dtype: expected 'float32', got 'bfloat16'; seed: expected 3, got 4"
    with pytest.raises(UserError, match=pattern):
        toy.open_writer(finished(), identity=other)
    with pytest.raises(UserError, match=r"model\.dtype: expected 'bfloat16', got 'float32'; seed: expected 4, got 3"):
        CacheReader.open(finished(), identity=other)


def test_the_same_identity_with_other_tokens_is_refused(toy: ModuleType, finished: Callable[..., Path]) -> None:
    contexts = toy.CONTEXTS | {"train": toy.toy_contexts(100, 9)}
    with pytest.raises(UserError, match=r"splits\.train\.sha256\.token_id"):
        toy.open_writer(finished(), contexts=contexts)


def test_strangers_are_refused(toy: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("do not overwrite")
    with pytest.raises(UserError, match="not empty and not a cache"):
        toy.open_writer(tmp_path / "notes")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        toy.open_writer(tmp_path / "file")
    (tmp_path / "zarr").mkdir()
    (tmp_path / "zarr" / "zarr.json").write_text('{"zarr_format":3,"node_type":"group","attributes":{}}')
    for action in (toy.open_writer, CacheReader.open):
        with pytest.raises(UserError, match=r"not the root of a Thresher cache"):
            action(tmp_path / "zarr")
    with pytest.raises(UserError, match="there is no cache"):
        CacheReader.open(tmp_path / "nowhere")


def test_a_newer_format_is_refused(copied: Path) -> None:
    root = json.loads((copied / "zarr.json").read_text())
    root["attributes"]["thresher"]["version"] = VERSION + 1
    (copied / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(UserError, match="Update thresher"):
        CacheReader.open(copied)


def test_a_shard_in_anothers_hands_is_passed_over_and_freed_by_its_death(toy: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "c"
    with toy.open_writer(path, codec="bf16") as first, toy.open_writer(path, codec="bf16") as second:
        assert first.claim() == ("train", 0)
        assert second.claim() == ("train", 1)
        with pytest.raises(UserError, match="being written by another process"):
            second.shard("train", 0)
        leftover = path / "train" / "keep" / "c.0.abc123.tmp"
        leftover.write_bytes(b"left over")
        first.close()
        assert second.claim() == ("train", 0)
        assert not leftover.exists()
    lock = try_hold(path / "commits" / "train.0.lock")
    assert lock is not None
    lock.release()


def test_a_second_int8z_writer_waits_for_the_calibration(toy: ModuleType, tmp_path: Path) -> None:
    with toy.open_writer(tmp_path / "c") as first, toy.open_writer(tmp_path / "c") as second:
        assert first.take() == ("train", 0)
        assert second.take() is None
        assert not second.exhausted()
        shard = first.shard("train", 0)
        shard.add(toy.activations("train", shard.contexts))
        shard.commit()
        assert second.take() == ("train", 1)


def test_publishing_exclusively_keeps_the_first(tmp_path: Path) -> None:
    publish(tmp_path / "a", [b"first"], exclusive=True)
    with pytest.raises(FileExistsError):
        publish(tmp_path / "a", [b"second"], exclusive=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"first"
    publish(tmp_path / "a", [b"third"])
    assert (tmp_path / "a").read_bytes() == b"third"
