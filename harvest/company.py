"""One target in several processes: each holds its part of every matrix, as transformers' tensor parallelism divides it.

All processes have to make the same passes. One of them leads: it alone reads the text, takes shards and writes, and it
tells the others the tokens of every pass and what is recorded; they follow until they are dismissed. What is recorded
of the residual stream, and of what modules take and return as a whole, is the same in all; of what lies between two
divided matrices each has a part, so such tensors are refused.
"""

import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from thresher.cache.roster import Roster

_PATIENCE = timedelta(days=7)  # whoever leads may read text for as long; a rank that dies is the roster's matter
_LOOKED_AT = 64

Key = TypeVar("Key", bound=Hashable)


class Pass(NamedTuple):
    """What those who follow have to do."""

    tokens: Tensor
    """[B, T] int64."""
    sites: Sequence[str]
    """What is recorded: it decides where the pass ends."""


class Company:
    """The processes that hold one target together."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.leads = roster.world.speaks

    def tell(self, what: Pass | None) -> None:
        """From the one who leads; None: there is nothing more to do."""
        _broadcast(what)

    def hear(self) -> Pass | None:
        """What the one who leads tells next."""
        told = _broadcast(None)
        assert told is None or isinstance(told, Pass)
        return told

    def divided(self, taken: Mapping[Key, Tensor]) -> set[Key]:
        """Which tensors are not the same in all processes, as far as their shapes and first numbers tell."""
        own = [(tuple(x.shape), x.flatten()[:_LOOKED_AT].double().cpu()) for x in taken.values()]
        every: list[Any] = [None] * self.roster.world.size
        torch.distributed.all_gather_object(every, own)
        return {
            key
            for key, (shape, numbers), others in zip(taken, own, zip(*every, strict=True), strict=True)
            if not all(shape == s and torch.allclose(numbers, n, rtol=1e-3, atol=1e-6) for s, n in others)
        }


@contextmanager
def gathered(roster: Roster, wanted: bool, device: torch.device) -> Iterator[Company | None]:
    """The processes of a job as holders of one target, if that is `wanted` and there are several; collective."""
    if not wanted or roster.world.alone:
        yield None
        return
    from torch import distributed

    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=roster.meeting_place("company"),
        rank=roster.world.rank,
        world_size=roster.world.size,
        timeout=_PATIENCE,
    )
    try:
        yield Company(roster)
    finally:
        distributed.destroy_process_group()


def settings() -> dict[str, Any]:
    """What `from_pretrained` is told, so that it divides the model among the processes of the default group."""
    from transformers.distributed import DistributedConfig

    if "tp_plan" in {field.name for field in dataclasses.fields(DistributedConfig)}:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    return {"tp_plan": "auto"}


def _broadcast(what: object) -> object:
    box = [what]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]
