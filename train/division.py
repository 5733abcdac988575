"""The dictionaries of a sweep spread over the cells of a job's mesh (train/mesh.py), mostly ranks: who trains which.

Rank 0 alone looks at the run directories, divides what is left to do and tells the others, so that no two ranks ever
write one directory, however many there are this time. Dictionaries that are trained together through the language
model stay together. Nothing is exchanged while they train: what a dictionary comes to does not depend on its company,
so it has the bits that it would have in one process of as many threads.

Ranks of one cell train its dictionaries together.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console

from thresher.cache.errors import UserError
from thresher.cache.roster import Roster
from thresher.cache.world import World, divide
from thresher.train.display import TrainingDisplay
from thresher.train.mesh import ParallelConfig, cell_of, cells_of
from thresher.train.plan import RunPlan
from thresher.train.state import latest_position

if TYPE_CHECKING:
    from thresher.train.run import RunResult


class Work(NamedTuple):
    """What is left of a plan."""

    name: str
    unit: str
    """Shared by plans that one cell has to train."""
    cost: int
    """Rough multiply-adds of its largest products; passes of a language model are left out."""


def work(plans: Sequence[RunPlan], totals: Sequence[int], out: Path | None = None) -> list[Work]:
    """What every plan has before it: `totals` are its steps, less those of its newest checkpoint in `out`/<name>."""
    found = []
    for plan, total in zip(plans, totals, strict=True):
        done = 0 if out is None else latest_position(out / plan.name)[0]
        unit = f"run {plan.name}" if plan.train.objective == "local" else f"group {plan.group}"
        cost = (total - done) * plan.train.batch_rows * plan.spec.row_work * len(plan.spec.reads)
        found.append(Work(plan.name, unit, cost))
    return found


def division(pieces: Iterable[Work], size: int) -> dict[str, int]:
    """The cell of every plan, by name: whole units, the costliest first, each to the one that has least so far."""
    units: dict[str, list[Work]] = {}
    for piece in pieces:
        units.setdefault(piece.unit, []).append(piece)
    owners = divide([sum(piece.cost for piece in members) for members in units.values()], size)
    return {piece.name: rank for members, rank in zip(units.values(), owners, strict=True) for piece in members}


def agreed(
    owners: dict[str, int], roster: Roster, device: torch.device, console: Console, parallel: ParallelConfig
) -> dict[str, int]:
    """Rank 0's division among cells, known to all ranks. Each says what it has: the silent ones too, on a console of
    their own."""
    world = roster.world
    if world.alone:
        return owners
    if world.speaks:
        roster.tell("division", json.dumps(owners))
    else:
        owners = json.loads(roster.hear("division"))
        console = Console()
    cell, size = cell_of(world, parallel), parallel.data * parallel.latents
    share = sum(owner == cell for owner in owners.values())
    what = f"{share} of {len(owners)} dictionaries on {device}" if share else "no dictionary is left for it to train"
    if size > 1 and share:
        what += f", shared by ranks {cell * size} to {(cell + 1) * size - 1}"
    console.print(f"{str(world).capitalize()}: {what}.", highlight=False, soft_wrap=True)
    return owners


def cells_for(parallel: ParallelConfig, groups: Iterable[str], world: World, console: Console) -> int:
    """How many cells the ranks make. Raises UserError for what cannot be shared, and where ranks do not fill the mesh.

    `groups`: names of what is trained through the language model.
    """
    cells = cells_of(world, parallel)
    wanted = f"parallel.data = {parallel.data} and parallel.latents = {parallel.latents}"
    if parallel.data * parallel.latents == 1:
        return cells
    if world.alone:
        console.print(f"{wanted} are for several processes (torchrun); this one trains alone.", highlight=False)
    elif name := next(iter(groups), None):
        raise UserError(
            f"Group {name!r} is trained through the language model, with {wanted}: such dictionaries cannot be shared "
            "by several processes, only spread over them. Set parallel.data and parallel.latents to 1."
        )
    return cells


def spoken(world: World, console: Console) -> Console:
    """The console of the rank that speaks, a silent one for the others."""
    return console if world.speaks else Console(quiet=True)


def show_all(results: "Mapping[str, RunResult]", names: Sequence[str], console: Console) -> None:
    """One table of all runs, once every rank has ended."""
    with TrainingDisplay(console, f"All {len(names)} dictionaries", names) as display:
        for name in names:
            final = results[name].metrics.get("final")
            if results[name].status == "failed":
                display.fail(name, str(results[name].metrics.get("failed")))
            elif final and None not in final.values():
                display.update(name, final)
