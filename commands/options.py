"""Options that commands share, the examples below their help, and the two consoles they print to."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from thresher.cache.errors import UserError
from thresher.cache.place import Place, place_at
from thresher.cache.world import World, from_environment
from thresher.commands import completion, document

out = Console()
"""Writes to whatever is standard output at the moment: under `--json` that is standard error (document.py)."""
err = Console(stderr=True)

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a bundled recipe.",
        autocompletion=completion.recipes,
        show_default=False,
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one value of the recipe, as train.lr=3e-4; may be repeated.",
        autocompletion=completion.keys,
    ),
]


def parse_place(text: str | Path) -> Place:
    """A path, or the URI of a place in an object store. What is wrong with it is a mistake in the command line."""
    try:
        return place_at(str(text))
    except UserError as error:
        raise typer.BadParameter(str(error)) from None  # a ValueError would be shown with the text, secrets included


CachePath = Annotated[
    Place | None,
    typer.Option(
        "--cache",
        parser=parse_place,
        metavar="PATH",
        help="The cache, a path or URI; by default named by its fingerprint in $THRESHER_CACHE.",
        autocompletion=completion.caches,
    ),
]
OneCache = Annotated[
    Place,
    typer.Argument(
        parser=parse_place,
        metavar="PATH",
        help="A cache: its directory or URI.",
        autocompletion=completion.caches,
        show_default=False,
    ),
]
RunsPath = Annotated[
    Path | None, typer.Option("--runs", metavar="DIR", help="Where run directories go; by default runs/RECIPE.")
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N, in place of target.device."),
]
WandbMode = Literal["disabled", "online", "offline"]
Wandb = Annotated[
    WandbMode, typer.Option("--wandb", metavar="MODE", help="Log to Weights & Biases: disabled, online or offline.")
]


def examples(*lines: str) -> str:
    """Command lines as the epilog of a command; tests parse every one, and run those that take no time."""
    shown = (f"[dim]$[/] [bold]{escape(line)}[/]" for line in lines)
    return "\n".join(("[dim]Examples[/]", *shown))


def on_device(assignments: list[str] | None, device: str | None) -> list[str] | None:
    """`assignments`, and `--device` as the one for target.device."""
    return assignments if device is None else [*(assignments or []), f"target.device={device}"]


def complain(text: str, word: str = "error") -> None:
    """Tell the user what has gone wrong, for scripts too where this is the process that speaks."""
    err.print(f"[bold red]{word}:[/] ", end="")
    err.print(text, markup=False, highlight=False)
    if document.FLAG in sys.argv and place().speaks:
        document.write_error(text)


def place() -> World:
    """This process among those of its job; alone where the environment is wrong, which others complain of."""
    with suppress(UserError):
        return from_environment()
    return World()


def refuse_several(what: str, why: str, remedy: str) -> None:
    """Raise UserError where torchrun has started several processes of what only one can do."""
    world = from_environment()
    if not world.alone:
        raise UserError(f"{what} is for one process, and this job has {world.size}: {why}. {remedy}")
