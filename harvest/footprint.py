"""What a pass needs at its peak: every tensor that it makes is followed from its making to its end.

A context is run once for it, and a pass needs as many times more as it has contexts. So attention that makes a matrix
for every head, gated MLPs and whatever else a model does are counted, not guessed from its widths. Left out: what
libraries take inside an operator, which is small beside its operands, and what recorded activations take, which are
kept elsewhere (results.py).
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thresher.cache.contracts import Site
from thresher.harvest.target import TransformerTarget


class Running(NamedTuple):
    """Bytes of host memory that all passes of a harvest take together, beside their results."""

    kept: int
    """That stay while no pass runs."""
    passing: int
    """On top of that, while passes run."""


class Footprint(TorchDispatchMode):
    """Within the block, counts the bytes of tensors that operators make; nothing that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak_bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(x).data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _storage(x).data_ptr() not in given:
                size = _storage(x).nbytes()
                self.bytes += size
                self.peak_bytes = max(self.peak_bytes, self.bytes)
                given.add(_storage(x).data_ptr())
                weakref.finalize(_storage(x), self._gone, size)
        return out

    def _gone(self, size: int) -> None:
        self.bytes -= size


def context_bytes(model: TransformerTarget, sites: Sequence[Site], context: int) -> int:
    """Bytes that a pass over one context of so many tokens takes at its peak, beside its results."""
    tokens_BT = (torch.arange(context) * 7 + 1).remainder(model.n_vocab)[None]
    with Footprint() as footprint:
        model.record(tokens_BT, sites, keep=lambda point, x: x.new_empty(0))
    return footprint.peak_bytes


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()
