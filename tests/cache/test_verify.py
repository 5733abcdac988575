"""What cannot be read is said; it does not end the process."""

import os
from pathlib import Path

from thresher.cache.verify import _fetch, _mapped


def test_pages_that_cannot_be_read_are_an_error_before_they_are_touched(tmp_path: Path) -> None:
    file = tmp_path / "c.0.0"
    file.write_bytes(bytes(3 << 12))
    data = _mapped(file)
    assert _fetch(data) is None
    os.truncate(file, 1 << 12)
    known = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (5, 14)
    assert _fetch(data) == ("Input/output error" if known else None)
    assert data[:4096].sum() == 0
