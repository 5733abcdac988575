"""A place in an object store: what `cache.place.Place` asks, by requests.

There are no directories: what has something below it is one. Objects appear whole or not at all, so there are no
temporary files, nothing is flushed, and writing once is the store's own conditional create.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from thresher.cache.errors import UserError
from thresher.cache.remote.bucket import Bucket, bucket


@dataclass(frozen=True, order=True)
class ObjectPlace:
    """A key of a bucket, or the prefix of keys."""

    scheme: str
    bucket_name: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket_name}/{self.key}"

    @property
    def bucket(self) -> Bucket:
        """Where the requests go."""
        return bucket(self.scheme, self.bucket_name)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "ObjectPlace":
        return ObjectPlace(self.scheme, self.bucket_name, self.key.rpartition("/")[0])

    def __truediv__(self, key: str, /) -> "ObjectPlace":
        return ObjectPlace(self.scheme, self.bucket_name, f"{self.key}/{key}" if self.key else key)

    def with_suffix(self, suffix: str) -> "ObjectPlace":
        stem, dot, _ = self.name.rpartition(".")
        return self.parent / f"{stem if dot else self.name}{suffix}"

    def exists(self) -> bool:
        """Whether an object is there."""
        return self.bucket.head(self.key) is not None

    def size(self) -> int | None:
        """Bytes of the object; None when it is not there."""
        meta = self.bucket.head(self.key)
        return None if meta is None else int(meta["size"])

    def is_dir(self) -> bool:
        """Whether any object is below."""
        return bool(self.bucket.folder(self.key))

    def read_bytes(self) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        found = self.bucket.get(self.key)
        if found is None:
            raise FileNotFoundError(str(self))
        return found[0]

    def read_range(self, start: int, length: int) -> memoryview:
        """Some bytes of the object. Raises FileNotFoundError, UserError when it is shorter."""
        data = self.bucket.get_range(self.key, start, length)
        if data is None:
            raise FileNotFoundError(str(self))
        return data

    def iterdir(self) -> Iterator["ObjectPlace"]:
        """Objects and prefixes directly below, sorted."""
        for key in sorted(self.bucket.folder(self.key)):
            yield ObjectPlace(self.scheme, self.bucket_name, key)

    def glob(self, pattern: str) -> Iterator["ObjectPlace"]:
        """What is below by a pattern without `**`."""
        first, _, rest = pattern.partition("/")
        if not any(sign in first for sign in "*?["):
            found = [self / first] if rest or (self / first).exists() else []
        else:
            found = [each for each in self.iterdir() if fnmatch.fnmatchcase(each.name, first)]
        for each in found:
            yield from each.glob(rest) if rest else [each]

    def listing(self) -> dict[str, int]:
        """Size of every object below, by its path from here."""
        return {key[len(self.key) + 1 :]: size for key, size in self.bucket.listing(self.key).items()}

    def put(self, pieces: list[memoryview], *, exclusive: bool = False) -> None:
        """Write the object. Raises FileExistsError if `exclusive` and it is there."""
        if not exclusive:
            self.bucket.put(self.key, pieces)
        elif self.bucket.create(self.key, b"".join(pieces)) is None:
            raise FileExistsError(str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object; one that is not there is no error in an object store."""
        self.bucket.delete(self.key)

    def tagged(self) -> tuple[bytes, dict[str, Any]] | None:
        """Content and tag of the object; None when it is not there."""
        return self.bucket.get(self.key)


def refuse_unconditional(where: ObjectPlace) -> None:
    """Raise UserError for a store that overwrites what a conditional create must spare; the object is there."""
    if where.bucket.create(where.key, b"this must not be written") is not None:
        raise UserError(
            f"{where.scheme}://{where.bucket_name} overwrites objects that a conditional create (If-None-Match: *) "
            f"must spare, so a record cannot be kept from being written twice. Use a store that has conditional "
            f"writes, or harvest into a directory and copy the finished cache there."
        )
