"""Patterns for sites: what a recipe may write where it means one or several tensors of the target.

A pattern is a tap (`mlp_in`), in all layers or in chosen ones; a full name (`L05.mlp_in`); a hook name of
transformer-lens (`blocks.5.attn.hook_out`, `blocks.5.hook_attn_out`); a module, by which its output is meant
(`blocks.5.attn`, or as Hugging Face calls it, `transformer.h.5.attn` or `h.5.attn`); or a glob over any of them, in
which `*` stays within one dotted part, so that `blocks.*.hook_out` means the blocks' own outputs and not those of
everything inside them.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from thresher.cache.contracts import Site
from thresher.cache.records import nearest

_MOST_LAYERS = 1000
_GLOB = set("*?[")


def is_glob(pattern: str) -> bool:
    """Whether a pattern may mean several names."""
    return bool(_GLOB & set(pattern))


def fits(name: str, pattern: str) -> bool:
    """Whether a dotted name fits a pattern part by part."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def matches(pattern: str, site: Site, layers: Sequence[int] | None = None) -> bool:
    """Whether a pattern means a site, by its tap or by one of its names; `layers` restricts taps."""
    if fits(site.tap, pattern):
        return layers is None or site.layer in layers
    return any(fits(name, pattern) for name in (site.name, *site.aliases))


def near_misses(pattern: str, names: Iterable[str]) -> str:
    """` Did you mean …?` for a pattern without a match; a glob is compared with globs over all layers."""
    known = {re.sub(r"(?<=\.)\d+(?=\.|$)|(?<=^L)\d+", "*", name) for name in names} if is_glob(pattern) else names
    return nearest(pattern, sorted(known))


def unmet(
    patterns: Sequence[str],
    layers: Sequence[int] | None,
    sites: Iterable[Site],
    made: Sequence[Mapping[str, Any]],
) -> list[str]:
    """A line for each pattern of which a cache may lack a site, [] when it holds all that a harvest would have taken.

    `sites` are stored, `made` the [harvest] tables by which they were. Only the target knows what a glob means in the
    end, so what no table asked for in the same words has to follow from names: every name that it could mean is stored.
    """
    stored = tuple(sites)
    return [
        f"harvest.sites: {pattern!r}{_at(layers)} is not among what is stored "
        f"({', '.join(site.name for site in stored[:8])}{', …' if len(stored) > 8 else ''})"
        for pattern in patterns
        if not _held(pattern, layers, stored, made)
    ]


def _held(pattern: str, layers: Sequence[int] | None, sites: Sequence[Site], made: Sequence[Mapping[str, Any]]) -> bool:
    taps = {site.tap for site in sites}
    names = {name for site in sites for name in (site.name, *site.aliases)}
    for table in made:
        covered = table["layers"] is None or (layers is not None and set(layers) <= set(table["layers"]))
        if pattern in table["sites"] and (covered or pattern not in taps):
            return True
    if pattern in names:
        return True
    if pattern in taps:
        return layers is not None and all(f"L{layer:02d}.{pattern}" in names for layer in layers)
    if not any(matches(pattern, site) for site in sites):
        return False
    everywhere = {tap for tap in taps if any(tap in t["sites"] and t["layers"] is None for t in made)}
    meant = (f"L{layer:02d}.{tap}" for tap in taps - everywhere for layer in range(_MOST_LAYERS))
    return pattern.startswith("L") and all(name in names for name in meant if fits(name, pattern))


def _at(layers: Sequence[int] | None) -> str:
    return "" if layers is None else f" at layers {list(layers)}"
