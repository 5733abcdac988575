"""Which extensions of a cache are finished: `parts/INDEX.json`, a sealed record in the cache that they extend.

Begun, empty, before the first of them is planned; each is entered right after its manifest is published, under the
cache's `create.lock`. A part that is not listed is in the making and does not count. One that is listed and not there,
or not with the manifest it was listed with, is a loss: the cache is refused then, never read short.
"""

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

from thresher.cache.commit import MANIFEST, PARTS, ROOT, file_digest, harvest_again
from thresher.cache.errors import UserError
from thresher.cache.layout import FORMAT, VERSION
from thresher.cache.place import Place
from thresher.cache.plan import Plan
from thresher.cache.publish import read_sealed, sealed, write_json

INDEX = "INDEX.json"


class Entry(NamedTuple):
    """A finished extension, by its name below `parts/`."""

    kind: str
    """sites or tokens."""
    fingerprint: str
    sha256: str
    """Of its MANIFEST.json."""


def index_path(root: Place) -> Place:
    return root / PARTS / INDEX


def begin_index(root: Place) -> None:
    """Publish an empty index where there is none: from now on its absence is a loss."""
    if not index_path(root).exists():
        with contextlib.suppress(FileExistsError):
            write_json(index_path(root), _record({}), exclusive=True)


def read_index(root: Place, *, lost_is_empty: bool = False) -> dict[str, Entry]:
    """The finished extensions of the cache at `root`, by name. Raises UserError when the index is damaged or lost.

    Who fills parts may take a lost one for empty: it lists them anew.
    """
    file = index_path(root)
    advice = (
        f"Restore it from a copy, or run the harvests that extended the cache again, each with its recipe: "
        f"`{harvest_again(root, extend=True)}`; they check what is there and list it anew."
    )
    if not file.exists():
        if not lost_is_empty and any((root / PARTS).glob(f"*-*/{ROOT}")):
            raise UserError(f"{file} is missing, so nobody can tell which parts of the cache were finished. {advice}")
        return {}
    try:
        record = read_sealed(file)
        return {name: Entry(**entry) for name, entry in record["parts"].items()}
    except (UserError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged: its checksum does not match its content. Delete it. {advice}") from None


def enter(root: Place, name: str, plan: Plan) -> None:
    """List a part whose manifest was published; `create.lock` of the cache is held."""
    assert plan.extends is not None
    entry = Entry(plan.extends.kind, plan.fingerprint, file_digest(root / PARTS / name / MANIFEST))
    _rewrite(root, read_index(root, lost_is_empty=True) | {name: entry})


def strike(root: Place, names: Iterable[str]) -> None:
    """Take parts off the list, before they are removed; `create.lock` of the cache is held."""
    gone, listed = set(names), read_index(root, lost_is_empty=True)
    if gone & listed.keys():
        _rewrite(root, {name: entry for name, entry in listed.items() if name not in gone})


def is_listed(part: Place) -> bool:
    """Whether an extension is listed, with the manifest that it has."""
    entry = read_index(part.parent.parent, lost_is_empty=True).get(part.name)
    return entry is not None and loss(part.parent.parent, part.name, entry) is None


def loss(root: Place, name: str, entry: Entry) -> str | None:
    """What is lost of a part that is listed, or None."""
    part = root / PARTS / name
    if not part.is_dir():
        return f"{part} is missing"
    for file in (ROOT, MANIFEST):
        if not (part / file).exists():
            return f"{part / file} is missing"
    if file_digest(part / MANIFEST) != entry.sha256:
        return f"{part / MANIFEST} is not the one with which it was finished (its SHA-256 differs)"
    return None


def _rewrite(root: Place, listed: dict[str, Entry]) -> None:
    write_json(index_path(root), _record(listed))


def _record(listed: dict[str, Entry]) -> dict[str, object]:
    parts = {name: entry._asdict() for name, entry in sorted(listed.items())}
    return sealed({"format": f"{FORMAT}-parts", "version": VERSION, "parts": parts})
