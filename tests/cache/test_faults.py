"""Kills, full disks, flipped bits, strangers: refused or resumed, never taken for whole."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from thresher.cache import locks
from thresher.cache import writer as writer_module
from thresher.cache.codec import Calibration
from thresher.cache.commit import MANIFEST
from thresher.cache.errors import UserError
from thresher.cache.layout import VERSION
from thresher.cache.locks import try_hold
from thresher.cache.publish import publish
from thresher.cache.reader import CacheReader

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


def strata(total: int, count: int, seed: int) -> list[int]:
    """So many random moments of 1 … total, one from each of equal stretches."""
    generator = random.Random(seed)
    return [1 + int((i + generator.random()) * total / count) for i in range(count)]


def kill_at(moments: list[int], codec: str, victim: Any, path: Path, whole: dict[str, bytes], tree: Tree) -> int:
    """Kill a harvest at each moment: it is refused, and resumed to identical bytes. Returns how many died."""
    killed = 0
    for moment in moments:
        said = victim(path / f"{moment}", die_at=moment, codec=codec)
        killed += said == "killed"
        if not (path / f"{moment}" / MANIFEST).exists():
            with pytest.raises(UserError, match=r"incomplete|no cache"):
                CacheReader.open(path / f"{moment}")
            assert victim(path / f"{moment}", codec=codec) == "done"
        assert differing(tree(path / f"{moment}"), whole) == [], f"killed at call {moment}"
        assert CacheReader.open(path / f"{moment}").verify() == []
    return killed


def kill_one_of_two(
    moments: list[int], codec: str, victim: Any, path: Path, whole: dict[str, bytes], tree: Tree
) -> int:
    """Kill one of two writers at each moment: the other ends in identical bytes. Returns how many died."""
    killed = 0
    for moment in moments:
        commands = {"die_at": moment, "codec": codec}, {"outlive": True, "codec": codec}
        first, second = victim.together(path / f"{moment}", *commands)
        killed += first == "killed"
        assert second == "done"
        assert differing(tree(path / f"{moment}"), whole) == [], f"killed at call {moment}"
        assert CacheReader.open(path / f"{moment}").verify() == []
    return killed


@pytest.mark.parametrize(
    ("codec", "alone", "beside"),
    [
        ("int8z", 8, 2),
        ("bf16", 4, 2),
        ("bf16-lz4", 4, 0),
        pytest.param("int8z", 60, 30, marks=pytest.mark.long),
        pytest.param("bf16", 40, 20, marks=pytest.mark.long),
        pytest.param("bf16-lz4", 40, 10, marks=pytest.mark.long),
    ],
)
def test_killed_at_any_moment_a_harvest_is_refused_or_resumed_to_identical_bytes(
    codec: str, alone: int, beside: int, finished: Callable[..., Path], tmp_path: Path, victim: Any, tree: Tree
) -> None:
    """Moments are calls that make data durable, over plan, calibration, shards, commits, statistics and manifest."""
    whole = tree(finished(codec=codec))
    total = int(victim(tmp_path / "counted", codec=codec, count=True))
    assert total > 500
    killed = kill_at(strata(total, alone, 1), codec, victim, tmp_path / "alone", whole, tree)
    assert killed == alone
    if beside:
        killed = kill_one_of_two(strata(total // 10, beside, 2), codec, victim, tmp_path / "beside", whole, tree)
        assert killed == beside


def test_a_harvest_killed_again_and_again_ends_in_identical_bytes(
    finished: Callable[..., Path], tmp_path: Path, victim: Victim, tree: Tree
) -> None:
    kills = 0
    while victim(tmp_path / "c", die_at=260) == "killed":
        kills += 1
        assert kills < 30, "no progress"
    assert kills >= 3
    assert differing(tree(tmp_path / "c"), tree(finished())) == []


@pytest.mark.parametrize("codec", ["int8z", "bf16"])
def test_three_racing_writers_end_in_identical_bytes(
    codec: str, finished: Callable[..., Path], tmp_path: Path, victim: Any, tree: Tree
) -> None:
    said = victim.together(tmp_path / "c", *[{"codec": codec}] * 3)
    assert said == ["done"] * 3
    assert differing(tree(tmp_path / "c"), tree(finished(codec=codec))) == []


def test_a_writer_with_other_bytes_is_told_and_changes_nothing(
    toy: ModuleType, finished: Callable[..., Path], tmp_path: Path, tree: Tree
) -> None:
    path = tmp_path / "c"
    toy.fill(path, codec="bf16")
    for factor in (1.0, 1.5):
        with toy.open_writer(path, codec="bf16") as late:
            shard = late.shard("train", 1)
            acts = toy.activations("train", shard.contexts)
            shard.add({name: factor * x_BTD for name, x_BTD in acts.items()})
            shard.commit()
            if factor == 1.0:
                late.settle()
                continue
            with pytest.raises(UserError, match=r"shard 1 of 'train' was already committed with different bytes"):
                late.settle()
    assert differing(tree(path), tree(finished(codec="bf16"))) == []


def test_another_calibration_is_refused(toy: ModuleType, tmp_path: Path) -> None:
    with toy.open_writer(tmp_path / "c") as first, toy.open_writer(tmp_path / "c") as second:
        made = {site.name: Calibration(torch.zeros(site.width), torch.ones(site.width)) for site in toy.SITES}
        first.calibrated(made)
        second.calibrated(made)
        made["L00.mlp_in"].mean[3] += 1
        with pytest.raises(UserError, match=r"calibration of 'L00.mlp_in'.* differs"):
            second.calibrated(made)


def test_where_locks_do_not_exclude_one_writer_is_allowed(
    toy: ModuleType, finished: Callable[..., Path], tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.fcntl, "flock", lambda descriptor, operation: None)
    told: list[str] = []
    with toy.open_writer(tmp_path / "c", notify=told.append):
        assert "writes alone" in told[0]
        with pytest.raises(
            UserError, match=rf"another process is writing.*process {os.getpid()} on .*remove .*writer.lock"
        ):
            toy.open_writer(tmp_path / "c")
    toy.fill(tmp_path / "c")
    assert differing(tree(tmp_path / "c"), tree(finished())) == []


def test_a_full_disk_stops_with_what_is_missing_and_goes_on_once_there_is_room(
    small_disk: Callable[[Path, int], Any], tmp_path: Path, toy: ModuleType, finished: Callable[..., Path]
) -> None:
    disk = small_disk(tmp_path, 4 << 20)
    said = disk(tmp_path / "c", hog_after=3)
    assert said.startswith("UserError:")
    needed, free, shard, total = missing(said)
    assert 0 <= free < 100_000, "the hog took the rest"
    assert 0 < shard < total == needed - free
    assert disk(tmp_path / "c", digest=True) != toy.digest(finished())
    assert disk(tmp_path / "c", unhog=True) == "done"
    assert disk(tmp_path / "c", digest=True) == toy.digest(finished())


def missing(said: str) -> tuple[int, int, int, int]:
    """Bytes needed in all, free, missing for the next shard and missing in all, as an error tells them."""
    numbers = re.search(
        r"needs ([\d,]+) bytes more and ([\d,]+) are free; ([\d,]+) are missing for the next shard, "
        r"([\d,]+) are missing for all that is to come\..*stays valid",
        said,
    )
    assert numbers, said
    needed, free, shard, total = (int(number.replace(",", "")) for number in numbers.groups())
    return needed, free, shard, total


@pytest.mark.parametrize("begun", [True, False])
def test_a_full_disk_tells_what_the_next_shard_and_all_to_come_lack(
    begun: bool, toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with toy.open_writer(tmp_path / "c", codec="bf16") as writer:
        real, in_all = os.write, writer.bytes_needed()

        def write(descriptor: int, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        shard = writer.shard(*(writer.claim() or ("", 0)))
        monkeypatch.setattr(writer_module, "free_bytes", lambda path: 1000)
        if begun:  # the kernel says so, in the middle of the shard
            shard.add(toy.activations("train", shard.contexts))
            monkeypatch.setattr(os, "write", write)
            shard.commit()
        with pytest.raises(UserError, match="No space left" if begun else "not enough disk space") as caught:
            writer.settle() if begun else writer.take()
        monkeypatch.setattr(os, "write", real)
        needed, free, of_shard, total = missing(str(caught.value))
        assert needed == int(1.02 * in_all)
        assert (free, total) == (1000, needed - 1000)
        row_bytes = sum(spec.row_bytes for spec in writer.plan.sharded_arrays("train").values())
        shards = 1 if begun else 2  # the one in hand is still to be written
        assert of_shard + 1000 == pytest.approx(1.02 * shards * writer.plan.shard_rows * row_bytes, rel=0.2)


def test_a_failing_device_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(UserError, match=r"Input/output error. The device failed, it is not full"):
        publish(tmp_path / "file", [b"1"])


READ_ONLY = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
import fill, torch
from thresher.cache.batches import Batches
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
whole, begun = Path(sys.argv[2]), Path(sys.argv[3])
reader = CacheReader.open(whole)
assert reader.verify() == []
batches = Batches(reader, sites=["L00.mlp_in"], batch_rows=64, seed=0)
x = next(iter(batches)).acts["L00.mlp_in"]
batches.close()
w = torch.zeros(x.shape[1], requires_grad=True)
(x @ w - 1).square().mean().backward()
assert w.grad.abs().sum() > 0
fill.activations = lambda *arguments: sys.exit("a forward pass was run")
try:
    fill.fill(begun)
except UserError as error:
    print(error)
"""


def test_a_read_only_cache_opens_trains_and_verifies_and_is_not_harvested_into(
    finished: Callable[..., Path], copied: Path
) -> None:
    (copied / "commits/train.1.json").unlink()
    (copied / MANIFEST).unlink()
    folders = [str(finished()), str(copied)]
    mounts = " && ".join(f"mount --bind {p} {p} && mount -o remount,ro,bind {p}" for p in folders)
    shell = ("unshare", "-Urm", "sh", "-c")
    if not shutil.which("unshare") or subprocess.run([*shell, mounts], check=False).returncode:
        pytest.skip("no read-only file system can be mounted here (unshare -Urm)")
    program = [sys.executable, "-c", READ_ONLY, str(Path(__file__).with_name("fill.py")), *folders]
    command = [*shell, f'{mounts} && exec "$@"', "sh", *program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Read-only file system" in done.stdout
    assert "a forward pass" not in done.stderr


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
        with pytest.raises(UserError, match=r"No space left.*needs [\d,]+ bytes more and [\d,]+ are free.*stays valid"):
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
    pattern = r"model\.dtype: expected 'bfloat16', got 'float32'; seed: expected 4, got 3"
    with pytest.raises(UserError, match=pattern):
        toy.open_writer(finished(), identity=other)
    with pytest.raises(UserError, match=pattern):
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
