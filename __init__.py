"""Harvest a transformer's activations once, train every sparse dictionary from them, judge all under one protocol.

    import thresher
    sae = thresher.load("runs/mine/sae-topk-k32-L08")      # encode, decode, forward, hooks

What is named here is imported when it is first used, so that the command line starts quickly.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.harvest.checkpoint import bundled_model as bundled_model
    from thresher.interop.notebook import Loaded as Loaded
    from thresher.interop.notebook import load as load
    from thresher.interop.saebench import to_saebench as to_saebench
    from thresher.interop.saelens_object import to_saelens as to_saelens

_PLACES = {
    "bundled_model": "harvest.checkpoint",
    "load": "interop.notebook",
    "Loaded": "interop.notebook",
    "to_saebench": "interop.saebench",
    "to_saelens": "interop.saelens_object",
}
__all__ = ["Loaded", "bundled_model", "load", "to_saebench", "to_saelens"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'thresher' has no attribute {name!r}")
    return getattr(importlib.import_module(f"thresher.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_PLACES)
