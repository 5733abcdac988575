"""The ranks of a job as a mesh: sweep × data × latents.

    sweep      cells, each of which trains its share of the dictionaries; nothing is exchanged between cells
    data       ranks of a cell that take different rows of every batch of a dictionary
    latents    ranks of a cell that see the same rows and hold different latents

Ranks are numbered with the latents fastest, then data, so that those who exchange most are neighbours. How a job is
divided changes no equation and is no part of a run: a run directory may be gone on with under any other mesh.

What ranks say to one another while they train goes through the two `Group`s of a rank and through nothing else. Each
collective is counted, so that tests can hold how many a step takes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.roster import Roster
from thresher.cache.world import World

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

COLLECTIVE_SECONDS = 300.0
"""A collective that takes longer has lost a rank."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes of one job share the training; changes nothing in what is trained."""

    data: int = 1
    """Processes that share the rows of every batch of one dictionary. Each holds the whole dictionary."""
    latents: int = 1
    """Processes that share the latents of one dictionary: each holds its part of encoder, decoder and optimiser state,
    and sees every row. For dictionaries that do not fit one device."""

    def __post_init__(self) -> None:
        for name in ("data", "latents"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"parallel.{name} is {value!r}; expected a whole number of processes, 1 or more.")


@dataclass
class Group:
    """Some ranks that exchange tensors; by default this one alone, whose exchanges change nothing."""

    index: int = 0
    """This rank's number in it."""
    size: int = 1
    backend: "ProcessGroup | None" = None
    collectives: int = field(default=0, init=False)
    """How many there have been."""

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all ranks in the place of each tensor; one collective per dtype."""
        if self.alone:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for several in by_dtype.values():
            if len(several) == 1 and several[0].is_contiguous():
                self._add_up(several[0])
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in several])
            self._add_up(flat)
            pieces = flat.split([tensor.numel() for tensor in several])
            for tensor, piece in zip(several, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))

    def gather(self, tensor: Tensor) -> Tensor:
        """[size, …] the tensor of every rank, which all have the same shape; one collective."""
        if self.alone:
            return tensor[None]
        self.collectives += 1
        return self._gather(tensor.contiguous())

    def wait(self) -> None:
        """Until every rank has come here; one collective."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether it is set on some rank; one collective, which all wait for."""
        if self.alone:
            return flag
        told = torch.tensor([float(flag)])
        self.add_up([told])
        return bool(told > 0)

    def _add_up(self, tensor: Tensor) -> None:
        self.collectives += 1
        self._sum(tensor)

    # What another way to exchange has to do; a test's ranks are threads.

    def _sum(self, tensor: Tensor) -> None:
        from torch import distributed

        distributed.all_reduce(tensor, group=self.backend)

    def _gather(self, tensor: Tensor) -> Tensor:
        from torch import distributed

        out = tensor.new_empty((self.size, *tensor.shape))
        distributed.all_gather(list(out.unbind()), tensor, group=self.backend)
        return out


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """One rank's place; by default a job of one process."""

    cell: int = 0
    """Which share of the sweep is its own."""
    cells: int = 1
    data: Group = field(default_factory=Group)
    latents: Group = field(default_factory=Group)
    everyone: Group = field(default_factory=Group)
    """All ranks of the cell."""

    @property
    def alone(self) -> bool:
        """Whether no dictionary is shared with another rank."""
        return self.everyone.alone

    @property
    def leads(self) -> bool:
        """Whether it is the one of its cell that writes what is written once."""
        return self.everyone.index == 0


def cells_of(world: World, wanted: ParallelConfig) -> int:
    """How many cells the ranks of a job make; a job of one process is one, whatever is wanted.

    Raises UserError when the ranks do not fill the mesh.
    """
    shared = wanted.data * wanted.latents
    if world.alone:
        return 1
    if world.size % shared:
        raise UserError(
            f"parallel.data × parallel.latents is {wanted.data} × {wanted.latents} = {shared}, but {world.size} "
            f"processes were started. Start a multiple of {shared}, or set them to fit with --set parallel.data=…"
        )
    return world.size // shared


def cell_of(world: World, wanted: ParallelConfig) -> int:
    """The cell of a rank."""
    return 0 if world.alone else world.rank // (wanted.data * wanted.latents)


@contextmanager
def formed(roster: Roster, wanted: ParallelConfig, device: torch.device) -> Iterator[Mesh]:
    """The mesh of a job's ranks, until the end of the block; collective where dictionaries are shared."""
    cells, world = cells_of(roster.world, wanted), roster.world
    if cells == world.size:
        yield Mesh(cell=world.rank, cells=world.size)
        return
    from torch import distributed

    threads = torch.get_num_threads()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=roster.meeting_place("mesh"),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    try:
        shape = (cells, wanted.data, wanted.latents)
        mesh = distributed.init_device_mesh(device.type, shape, mesh_dim_names=("sweep", "data", "latents"))
        cell = mesh["data", "latents"]._flatten("cell")
        groups = {name: mesh.get_group(name) for name in ("data", "latents")} | {"everyone": cell.get_group()}
        made = Mesh(
            cell=mesh.get_local_rank("sweep"),
            cells=cells,
            **{name: Group(group.rank(), group.size(), group) for name, group in groups.items()},
        )
        _share_threads(made.everyone)
        yield made
    finally:
        distributed.destroy_process_group()
        torch.set_num_threads(threads)


def _share_threads(everyone: Group) -> None:
    """Let ranks that share dictionaries take equally many threads: sums of other orders would drive them apart."""
    torch.set_num_threads(int(everyone.gather(torch.tensor(torch.get_num_threads())).min()))
