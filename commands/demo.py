"""`thresher demo`: the three stages in a row on the bundled model."""

from pathlib import Path
from typing import Annotated

import typer

from thresher.commands.evaluate import evaluate_recipe
from thresher.commands.harvest import harvest_recipe
from thresher.commands.options import Assignments, out
from thresher.commands.train import train_recipe
from thresher.commands.wiring import read_recipe


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where cache, runs and report go.")] = Path("demo"),
    name: Annotated[str, typer.Option("--recipe", help="Another recipe to run from end to end.")] = "books-demo",
    assignments: Assignments = None,
) -> None:
    """Harvest, train and evaluate on the bundled model, on a CPU, in minutes."""
    recipe = read_recipe(name, assignments)
    cache, runs = folder / "cache.zarr", folder / "runs"
    live = recipe.tables["harvest"].window_gb is not None  # nobody could refill a ring meanwhile
    out.rule("1/3 harvest", align="left")
    if live:
        out.print("harvest.window_gb is set: the target runs beside the training.")
    else:
        harvest_recipe(recipe, cache)
    out.rule("2/3 train", align="left")
    train_recipe(recipe, cache, runs, resume=True, live=live, device="auto", wandb="disabled")
    out.rule("3/3 evaluate", align="left")
    evaluate_recipe(recipe, cache, runs, folder / "report")
