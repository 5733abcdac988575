"""The parts of a cache joined: segments of rows, each a part and those that add sites to it.

Parts of kind `tokens` are segments of their own, at all sites of the cache; parts of kind `sites` belong to the segment
that they extend. A part that is in the making does not count; one that was finished and is lost is refused (`index`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from thresher.cache.codec import Calibration
from thresher.cache.commit import PARTS, harvest_again
from thresher.cache.errors import UserError
from thresher.cache.index import INDEX, loss, read_index
from thresher.cache.part import Part
from thresher.cache.place import Place


class Segment:
    """Rows of one harvest of text: the part that holds them, and the parts that add sites to them."""

    def __init__(self, base: Part) -> None:
        self.base = base
        self.parts = [base]

    @property
    def sites(self) -> dict[str, Part]:
        """The part that holds each site."""
        return {name: part for part in self.parts for name in part.sites}

    def holding(self, split: str) -> dict[str, Part]:
        """The part that holds each array with one entry a row."""
        return {name: part for part in self.parts for name in part.specs.get(split, {})}


class Joined(NamedTuple):
    """What a cache consists of."""

    segments: list[Segment]
    """The base's first."""
    incomplete: list[str]
    """Names of the parts in the making."""


def joined(path: Place) -> Joined:
    """The segments of the cache at `path`. Raises UserError when a part that was finished is not there as it was."""
    segments, folder = [Segment(Part.open(path))], path / PARTS
    listed = read_index(path)
    for name, entry in sorted(listed.items()):
        lost = loss(path, name, entry)
        if lost is not None:
            raise UserError(
                f"the cache {path} is damaged: {PARTS}/{INDEX} lists {PARTS}/{name} as finished, but {lost}. Restore "
                f"it from a copy, or run `{harvest_again(path, extend=True)}` with the recipe that added it: it writes "
                f"what is missing, and nothing else."
            )
    complete = [Part.open(folder / name) for name in sorted(listed)]
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    incomplete = [f"{PARTS}/{each.name}" for each in there if each.is_dir() and each.name not in listed]
    for kind in ("tokens", "sites"):
        for part in complete:
            if part.plan.extends is not None and part.plan.extends.kind == kind:
                owner = _extended(part, segments[:1] if kind == "tokens" else segments)
                if kind == "tokens":
                    segments.append(Segment(part))
                else:
                    owner.parts.append(part)
    return Joined(segments, incomplete)


def shared_calibration(segments: Sequence[Segment], site: str) -> Calibration | None:
    """μ and σ of an int8z site, by which the rows of all segments are decoded; None for the other codecs.

    Raises UserError when a segment was stored with others, as after a base was harvested anew under old extensions.
    """
    base, *others = (segment.sites[site] for segment in segments)
    found = base.calibration(site)
    for part in others:
        other = part.calibration(site)
        if found is not None and other is not None and (found.as_array() != other.as_array()).any():
            raise UserError(
                f"{part.path} stores {site!r} with another calibration than {base.path}, so the two were not made "
                f"for one another and their rows cannot be read as one. Restore both from one copy, or remove "
                f"{part.path} and add its text again: `{harvest_again(segments[0].base.path, extend=True)}`."
            )
    return found


def _extended(part: Part, segments: Sequence[Segment]) -> Segment:
    """The segment that a part extends. Raises UserError when it is not among those given."""
    assert part.plan.extends is not None
    wanted = part.plan.extends.base
    for segment in segments:
        if segment.base.fingerprint == wanted:
            return segment
    raise UserError(
        f"{part.path} extends another cache: expected one with fingerprint {wanted[:12]}…, and "
        f"this one has {segments[0].base.fingerprint[:12]}…. Move it back to where it belongs."
    )
