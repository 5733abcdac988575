"""Which of several processes this one is, as a value, and how work is divided among them.

torchrun tells every process its place in environment variables. `from_environment` reads them, and nothing else does;
importing reads nothing. Whoever divides work or speaks to the user is given a `World`, so a test can be any rank.

What ranks say to one another goes through a store of torch.distributed (roster.py). Reductions of tensors, for stages
whose ranks share one dictionary, will stand there too, over the same store; nothing here has to change for them.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thresher.cache.errors import UserError


@dataclass(frozen=True, kw_only=True)
class World:
    """A process among those of one job; by default the only one."""

    rank: int = 0
    """Its number, from 0."""
    size: int = 1
    """How many there are, over all hosts."""
    local_rank: int = 0
    """Its number among those of its host: which GPU is its own."""
    restarts: int = 0
    """How often torchrun has started the job anew after a process died."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise UserError(
                f"RANK is {self.rank} and WORLD_SIZE is {self.size}; expected a rank from 0 to WORLD_SIZE - 1. "
                "torchrun sets both: unset them to run one process."
            )

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    @property
    def speaks(self) -> bool:
        """Whether it is the one that tells the user what the job does."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"


def from_environment(environment: Mapping[str, str] = os.environ) -> World:
    """This process's place as torchrun states it; alone where it does not.

    Raises UserError for a variable that is no whole number, and for a rank outside of the world.
    """
    if not environment.get("RANK") or not environment.get("WORLD_SIZE"):
        return World(local_rank=_number(environment, "LOCAL_RANK"))
    return World(
        rank=_number(environment, "RANK"),
        size=_number(environment, "WORLD_SIZE"),
        local_rank=_number(environment, "LOCAL_RANK"),
        restarts=_number(environment, "TORCHELASTIC_RESTART_COUNT"),
    )


def divide(costs: Sequence[float], size: int) -> list[int]:
    """The rank that does each piece of work: the costliest piece first, each to the rank that has least so far.

    Equal costs go in the order given and ties to the lowest rank, so every process that divides the same work comes to
    the same answer. The largest share is at most 4/3 of the least possible one (Graham 1969).
    """
    loads, owners = [0.0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = min(range(size), key=lambda rank: loads[rank])
        loads[owners[index]] += costs[index]
    return owners


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name) or "0"
    try:
        return int(text)
    except ValueError as error:
        raise UserError(
            f"The environment variable {name} is {text!r}; expected a whole number, as torchrun sets it. Unset it to "
            "run one process."
        ) from error
