"""The formats by name, and what each of them is to export.py and importing.py.

A module per tool defines `FORMAT`. What a tool cannot hold is refused by its `refuse`, with the reason and the nearest
route; what a file may mean beside what it says is given by `read` as further readings, which importing.py tries on real
activations.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from thresher.cache.contracts import Dictionary, Target
from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.records import nearest
from thresher.interop.canonical import Canonical

_MODULES = {
    "saelens": "saelens",
    "circuit-tracer": "circuit_tracer",
    "dictionary-learning": "dictionary_learning",
    "sparsify": "sparsify",
    "npz": "npz",
    "openmoss": "openmoss",
    "delphi-cache": "delphi",
}
"""Module of this package by the name on the command line."""

Forward = Callable[[Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""Codes [N, F] by source and reconstructions [N, E] by destination from raw activations [N, D] by source, float64: a
format's own equation on the tensors as they are stored."""


class Exported(NamedTuple):
    """A dictionary on its way out."""

    dictionary: Canonical
    facts: Mapping[str, Any]
    """Provenance, JSON values (provenance.py)."""


class Reading(NamedTuple):
    """One way to understand a file."""

    label: str
    """In words: `as its config says`, `b_dec not subtracted`."""
    dictionary: Canonical
    """Sites are named as the file names them, until importing.py finds them in the cache."""
    forward: Forward
    """The tool's own equation under that reading, which the canonical form is measured against."""


class Foreign(NamedTuple):
    """A dictionary of another tool, as its files have it."""

    readings: tuple[Reading, ...]
    """The first is what the files say; the others are what they might mean."""
    firing: str
    """The tool's name for what it fires by."""
    k: float | None
    """Active latents per token that it was trained for, where the files say it."""
    facts: Mapping[str, Any]
    """Of its origin, JSON values: tool, version, architecture, model, hook names."""
    scale_unknown: bool = False
    """Whether activations may have been scaled in training by a factor that the files do not hold."""
    sites_guessed: bool = False
    """Whether the files name no sites: what looks like an SAE is then a transcoder if --writes says so."""


class Coded(NamedTuple):
    """A dictionary on its way into a file of codes."""

    dictionary: Dictionary
    """On the target's device."""
    facts: Mapping[str, Any]
    """Provenance, JSON values (provenance.py)."""


class Text(NamedTuple):
    """What codes are made of."""

    target: Target
    contexts: Contexts
    source: str = ""
    """Where the contexts come from, in words."""
    batch_contexts: int = 32
    """Contexts per forward pass."""
    advance: Callable[[int], None] = lambda contexts: None
    """Called after each pass with the number of contexts in it."""


class Format(NamedTuple):
    """What a tool's module offers."""

    name: str
    summary: str
    """One line for --help."""
    whole: bool = False
    """Whether the dictionaries of a set go into one directory together."""
    refuse: Callable[[Sequence[Canonical]], str | None] | None = None
    """Why these cannot be written, and the nearest route; None: they can."""
    write: Callable[[Path, Sequence[Exported]], None] | None = None
    """Write into an empty directory; one dictionary unless `whole`. None: import only."""
    write_codes: Callable[[Path, Sequence[Coded], Text], None] | None = None
    """In the place of `write`, where files hold codes over a text and no dictionary."""
    read: Callable[[Path], list[Foreign]] | None = None
    """The dictionaries of a directory or file. Raises UserError for what it is not. None: export only."""


def names(*, writing: bool | None = None) -> list[str]:
    """Names of all formats, or of those that can be written (True) or read (False)."""
    if writing is None:
        return list(_MODULES)
    forms = [load(name) for name in _MODULES]
    return [form.name for form in forms if (form.write or form.write_codes if writing else form.read) is not None]


def load(name: str) -> Format:
    """A format by name. Raises UserError with near misses."""
    if name not in _MODULES:
        raise UserError(f"There is no format {name!r}; expected one of {', '.join(_MODULES)}.{nearest(name, _MODULES)}")
    found: Format = importlib.import_module(f"thresher.interop.{_MODULES[name]}").FORMAT
    return found
