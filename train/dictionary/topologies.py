"""The topologies by name: which class a recipe's `kind` stands for, built in or registered by a user.

    from thresher.train.dictionary.coder import Coder
    from thresher.train.dictionary.topologies import register

    @register("mine")
    class Mine(Coder):
        ...

A class says how matched sites become sources and destinations, which settings make sense for it, how its weights start
and fold, and whether it can run along in a forward pass (`Coder`'s class attributes and methods).
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from thresher.cache.errors import UserError
from thresher.cache.records import nearest

if TYPE_CHECKING:
    from thresher.train.dictionary.coder import Coder
    from thresher.train.dictionary.holding import Holding
    from thresher.train.dictionary.spec import DictionarySpec

_BUILT_IN = ("single", "crosslayer", "crosscoder", "molt", "decomposition")
_TOPOLOGIES: dict[str, type["Coder"]] = {}

C = TypeVar("C", bound="type[Coder]")


def register(kind: str) -> Callable[[C], C]:
    """Class decorator: `dictionary.kind = kind` now stands for the class. Raises UserError for a name that is taken."""

    def add(cls: C) -> C:
        known = _TOPOLOGIES.setdefault(kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserError(
                f"The topology {kind!r} is already registered, by {known.__module__}.{known.__qualname__}. Register "
                f"{cls.__qualname__} under another name."
            )
        _TOPOLOGIES[kind] = cls
        return cls

    return add


def known_topologies() -> dict[str, type["Coder"]]:
    """All of them by name; importing the built-in ones, which cannot come first, since they need the spec."""
    for module in _BUILT_IN:
        importlib.import_module(f"thresher.train.dictionary.{module}")
    return _TOPOLOGIES


def topology(kind: str) -> type["Coder"]:
    """The class of a kind. Raises UserError for an unknown one."""
    known = known_topologies()
    if kind not in known:
        raise UserError(
            f"dictionary.kind is {kind!r}; expected one of {', '.join(sorted(known))}.{nearest(kind, known)} One of "
            "your own has to be registered by a file that is given with --plugin."
        )
    return known[kind]


def build(spec: "DictionarySpec", name: str = "", deployed: bool = False, holding: "Holding | None" = None) -> "Coder":
    """The module that a spec describes, with zero weights; `holding`: the part of it that one rank holds."""
    cls = topology(spec.kind)
    return cls(spec, name, deployed) if holding is None else cls(spec, name, deployed, holding)
