"""What reading from an object store is made of: runs of neighbours, things made once, chunks that stay."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from thresher.cache.errors import UserError
from thresher.cache.remote.bucket import ShortError, explain, patience
from thresher.cache.remote.fetch import Once, block_chunks, runs
from thresher.cache.remote.keep import DiskKeep, MemoryKeep, kept
from thresher.cache.remote.settings import Reading


def test_runs_are_neighbours_up_to_a_size() -> None:
    lengths = dict.fromkeys(range(20), 10)
    assert runs([0, 1, 2, 5, 6, 9], lengths, 100) == [[0, 1, 2], [5, 6], [9]]
    assert runs([0, 1, 2, 3, 4], lengths, 25) == [[0, 1], [2, 3], [4]]
    assert runs([0, 1], lengths, 5) == [[0], [1]], "one that is too large comes alone"
    assert runs([], lengths, 5) == []
    assert [block_chunks(size) for size in (2048, 1 << 16, 1 << 20)] == [32, 1, 1]


def test_what_many_threads_ask_for_is_made_once() -> None:
    made: list[int] = []

    def make(key: int) -> int:
        made.append(key)
        time.sleep(0.05)
        if len(made) == 1:
            raise OSError("the first try fails")
        return -key

    once, got = Once(make, 2), list[object]()

    def ask() -> None:
        try:
            got.append(once(7))
        except OSError as error:
            got.append(str(error))

    for _ in range(2):
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert made == [7, 7]
    assert got == ["the first try fails"] * 8 + [-7] * 8
    assert [once(8), once(9), once(7)] == [-8, -9, -7]
    assert made == [7, 7, 8, 9, 7], "of two that are held the oldest went"


def test_memory_keeps_what_came_first() -> None:
    keep = MemoryKeep(25)
    for key in "abc":
        keep.put(key, key.encode() * 10)
    assert [keep.get(key) for key in "abc"] == [b"a" * 10, b"b" * 10, None]
    keep.discard("a")
    keep.put("c", b"c" * 10)
    assert keep.get("c") == b"c" * 10


def held(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*/*"))


def test_a_directory_gives_up_what_other_caches_left_and_keeps_to_its_bound(tmp_path: Path) -> None:
    old = DiskKeep(tmp_path, "old", 100)
    for key in "abcdefgh":
        old.put(key, bytes(12))
    assert held(tmp_path) == 96
    for age, file in enumerate(sorted(tmp_path.glob("*/*"))):
        os.utime(file, (1000 + age, 1000 + age))
    new = DiskKeep(tmp_path, "new", 100)
    assert new.get("a") is None, "it is another cache's"
    for key in "abcdefghij":
        new.put(key, bytes(12))
        assert held(tmp_path) <= 100
    assert all(new.get(key) is not None for key in "abcdefgh")
    assert new.get("j") is None, "no room, and nothing that is used is given up"
    assert DiskKeep(tmp_path, "new", 100).get("a") is not None, "another process finds it"


def test_a_directory_that_lies_or_breaks_costs_nothing_but_time(tmp_path: Path) -> None:
    keep = DiskKeep(tmp_path, "one", 100)
    keep.put("a", bytes(12))
    (tmp_path / "bytes").write_text("nonsense")
    keep.put("b", bytes(12))
    assert (tmp_path / "bytes").read_text() == "24", "it was counted anew"
    keep.discard("a")
    assert keep.get("a") is None
    nowhere = DiskKeep(tmp_path / "bytes" / "below", "one", 100)
    nowhere.put("a", b"x")
    assert nowhere.get("a") is None


def test_processes_share_a_directory_within_one_bound(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from thresher.cache.remote.keep import DiskKeep\n"
        "keep = DiskKeep(Path(sys.argv[1]), 'one', 1000)\n"
        "for i in range(200): keep.put(f'{i * 7 % 97}', bytes([i * 7 % 97]) * 20)\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert 0 < held(tmp_path) <= 1000
    keep = DiskKeep(tmp_path, "one", 1000)
    found = [(i, data) for i in range(97) if (data := keep.get(str(i))) is not None]
    assert found
    assert all(data == bytes([i]) * 20 for i, data in found)


def test_settings_are_the_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Reading.from_environment() == Reading()
    monkeypatch.setenv("THRESHER_READ_AHEAD_MB", "8")
    monkeypatch.setenv("THRESHER_KEEP_GB", "0.5")
    monkeypatch.setenv("THRESHER_KEEP_IN", str(tmp_path))
    reading = Reading.from_environment()
    assert (reading.read_ahead_bytes, reading.keep_bytes) == (8_000_000, 500_000_000)
    assert isinstance(kept(reading, "one"), DiskKeep)
    monkeypatch.delenv("THRESHER_KEEP_IN")
    assert kept(Reading.from_environment(), "one").__class__ is MemoryKeep
    for name, text in (("THRESHER_KEEP_GB", "much"), ("THRESHER_KEEP_GB", "-1"), ("THRESHER_READ_AHEAD_MB", "nan")):
        monkeypatch.setenv(name, text)
        with pytest.raises(UserError, match=name):
            Reading.from_environment()
        monkeypatch.delenv(name)
    monkeypatch.setenv("THRESHER_STORE_PATIENCE", "5")
    assert patience()[:3] == (5, 5, 5)
    monkeypatch.setenv("THRESHER_STORE_PATIENCE", "0")
    with pytest.raises(UserError, match="THRESHER_STORE_PATIENCE is '0'; expected seconds"):
        patience()


def test_failures_are_told_apart_without_their_text() -> None:
    secret = "https://store/x?sig=verysecret"
    for error, passing, said in [
        (OSError(f"{secret} - status code: 503 Slow <Code>SlowDown</Code>"), True, "503 (SlowDown)"),
        (OSError(f"{secret} - status code: 404 Not Found list request"), False, "there is no bucket 'b'"),
        (OSError(f"{secret} PUT http://169.254.169.254/latest/api/token"), False, "no credentials"),
        (OSError(f"{secret} source: TimedOut"), True, "no answer in time"),
        (OSError(f"{secret} - status code: 418 teapot"), False, "the store answered 418"),
        (ShortError("3 of 4 bytes came"), True, "cut short: 3 of 4"),
    ]:
        cause = explain("s3", "b", error)
        assert cause.passing == passing
        assert said in cause.text
        assert "verysecret" not in cause.text + cause.remedy
