"""How files get their names: past the page cache or not, exclusively, and with the reason when they cannot."""

import ctypes
import errno
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from thresher.cache import publish as publishing
from thresher.cache.buffers import Buffers
from thresher.cache.errors import UserError
from thresher.cache.publish import PAGE, publish


@pytest.fixture
def rows() -> np.ndarray:
    """Two megabytes and a bit, beginning on a page and ending within one."""
    array = Buffers().take((2 * (1 << 20) + 333,), np.dtype(np.uint8))
    array[:] = np.random.default_rng(0).integers(0, 256, len(array))
    return array


@pytest.mark.parametrize("cut", [0, 1, PAGE])
def test_writing_past_the_page_cache_gives_the_same_bytes(cut: int, rows: np.ndarray, tmp_path: Path) -> None:
    for direct in (False, True):
        publish(tmp_path / f"{direct}", [rows[cut:], b"index", rows], direct=direct)
    assert (tmp_path / "True").read_bytes() == rows[cut:].tobytes() + b"index" + rows.tobytes()
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()


def test_whole_pages_go_past_the_page_cache_and_nothing_else(
    rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    write = os.write

    def spied(descriptor: int, view: memoryview) -> int:
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        seen.append((direct, len(view)))
        return write(descriptor, view)

    monkeypatch.setattr(os, "write", spied)
    publish(tmp_path / "f", [rows, b"index", rows], direct=True)
    if not seen[0][0]:
        pytest.skip("this file system has no O_DIRECT")
    assert seen == [(True, 2 << 20), (False, 333), (False, 5), (False, len(rows))]


def test_a_file_system_without_direct_writing_is_written_all_the_same(
    rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def refusing(descriptor: int, view: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(descriptor, view)

    monkeypatch.setattr(os, "write", refusing)
    publish(tmp_path / "f", [rows], direct=True)
    assert (tmp_path / "f").read_bytes() == rows.tobytes()


@pytest.mark.parametrize("direct", [False, True])
def test_a_full_disk_says_what_is_missing_and_leaves_no_file(
    direct: bool, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, view: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(publishing, "free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match=f"needs {len(rows):,} bytes and 1,000 are free.* {len(rows) - 1000:,} bytes"):
        publish(tmp_path / "f", [rows], direct=direct)
    assert list(tmp_path.iterdir()) == []


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)


@pytest.mark.parametrize("links", [True, False])
def test_an_exclusive_file_is_written_once(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        without_links(monkeypatch)
    publish(tmp_path / "f", [b"first"], exclusive=True)
    with pytest.raises(FileExistsError):
        publish(tmp_path / "f", [b"second"], exclusive=True)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("f", b"first")]


def test_without_links_and_exclusive_renames_the_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_links(monkeypatch)
    monkeypatch.setattr(ctypes, "CDLL", lambda *a, **k: SimpleNamespace())
    with pytest.raises(UserError, match="neither hard links"):
        publish(tmp_path / "f", [b"x"], exclusive=True)
    assert list(tmp_path.iterdir()) == []
