"""Where a cache lives: a directory, or a prefix of an object store.

`Place` is all that the cache asks of either. `pathlib.Path` has it by itself, so a directory costs nothing more than
before; `remote.place.ObjectPlace` has it for object stores. What they do not share goes by type in one place each:
publishing (`publish`), locks (`locks`), reading chunks (`part`), sizes of many files (`sizes`).

Credentials are no part of a place. They come from the environment when a store is first asked for something.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import unquote, urlsplit

from thresher.cache.errors import UserError
from thresher.cache.remote.place import ObjectPlace

SCHEMES = {"s3": "Amazon S3 and what speaks its protocol", "gs": "Google Cloud Storage", "az": "Azure Blob Storage"}
"""Object stores by the scheme of their URIs; `memory` is one more, which ends with the process."""


class Place(Protocol):
    """A file or a folder of a cache, wherever it is."""

    @property
    def name(self) -> str: ...

    @property
    def parent(self) -> Self: ...

    def __truediv__(self, key: str, /) -> Self: ...

    def __lt__(self, other: Any, /) -> bool: ...

    def with_suffix(self, suffix: str) -> Self: ...

    def exists(self) -> bool:
        """Whether a file is there; of a path, also a directory."""
        ...

    def is_dir(self) -> bool:
        """Whether something is below it; of a path, also nothing."""
        ...

    def read_bytes(self) -> bytes:
        """The whole content. Raises FileNotFoundError."""
        ...

    def iterdir(self) -> Iterator[Self]:
        """What is directly below it."""
        ...

    def glob(self, pattern: str) -> Iterator[Self]:
        """What is below it, by a pattern without `**`."""
        ...

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        ...


def place_at(text: str) -> Place:
    """The place that a path or URI names; `file://` is the path in it.

    Raises UserError for an unknown scheme, and for a URI that carries anything but bucket and prefix.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme == "file":
        return _file(text)
    if scheme not in (*SCHEMES, "memory"):
        raise UserError(
            f"the cache's URI begins with {scheme}://; expected {', '.join(f'{known}://' for known in SCHEMES)}, "
            f"memory://, file:// or a path."
        )
    bucket, _, key = rest.partition("/")
    if "@" in bucket or "?" in rest or "#" in rest:  # not repeated in the message: it may be a secret
        raise UserError(
            f"the cache's URI has more than a bucket and a prefix; expected {scheme}://BUCKET/PREFIX. Credentials "
            f"belong into the environment (docs/cache.md), tokens and options too."
        )
    parts = [part for part in key.split("/") if part]
    if not bucket or not parts or {".", ".."} & set(parts):
        raise UserError(
            f"the cache's URI is {text}; expected {scheme}://BUCKET/PREFIX, a cache's own prefix in a bucket, "
            f"without `.` and `..`."
        )
    return ObjectPlace(scheme, bucket, "/".join(parts))


def local(where: Place, what: str, remedy: str = "Give a path with --cache PATH.") -> Path:
    """The path of a place on a file system. Raises UserError for any other: `what` is what needs a directory."""
    if isinstance(where, Path):
        return where
    raise UserError(f"{what} needs a directory, and {where} is in an object store. {remedy}")


def below(root: Place, where: Place) -> str:
    """The path of a place relative to another that it lies in, with slashes; empty for the same."""
    return str(where)[len(str(root)) :].lstrip("/")


def walk(root: Place, skip: str = "") -> Iterator[Place]:
    """Every file below a place, but for the folder `skip` directly below it."""
    if not isinstance(root, Path):
        assert isinstance(root, ObjectPlace)
        yield from (root / name for name in root.listing() if not (skip and name.startswith(f"{skip}/")))
        return
    for folder, inside, names in os.walk(root):
        if Path(folder) == root and skip in inside:
            inside.remove(skip)
        yield from (Path(folder) / name for name in names)


def sizes(root: Place) -> Callable[[str], int | None]:
    """Tells the size of any file below a place, None where it is not there; an object store is listed once, now."""
    if isinstance(root, Path):

        def size(name: str) -> int | None:
            try:
                return (root / name).stat().st_size
            except FileNotFoundError:
                return None

        return size
    assert isinstance(root, ObjectPlace)
    return root.listing().get


def size_of(where: Place) -> int | None:
    """Bytes of a file; None for one that is not there, or no longer."""
    if isinstance(where, ObjectPlace):
        return where.size()
    return sizes(where.parent)(where.name)


def _file(text: str) -> Path:
    """The path in a file:// URI."""
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise UserError(f"the cache's URI is {text}; expected file:///an/absolute/path.")
    return Path(unquote(parts.path))
