"""Options that commands share, and the two consoles they print to."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a bundled recipe.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override one value; may be repeated.")
]
CachePath = Annotated[
    Path | None, typer.Option("--cache", help="The cache; by default named by its fingerprint in $THRESHER_CACHE.")
]
RunsPath = Annotated[Path | None, typer.Option("--runs", help="Where run directories go; by default runs/RECIPE.")]
WandbMode = Literal["disabled", "online", "offline"]
Wandb = Annotated[WandbMode, typer.Option("--wandb", help="Log to Weights & Biases.")]
