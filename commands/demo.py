"""`thresher demo`: the three stages in a row on the bundled model."""

from pathlib import Path
from typing import Annotated

import typer

from thresher.commands import completion
from thresher.commands.document import Json, write
from thresher.commands.evaluate import evaluate_recipe, verdict
from thresher.commands.harvest import harvest_recipe
from thresher.commands.options import Assignments, examples, out, refuse_several
from thresher.commands.train import train_recipe
from thresher.commands.wiring import read_recipe

EXAMPLES = examples("thresher demo", "thresher demo books-sweep --out sweep")


def demo(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="The recipe to run from end to end.",
            autocompletion=completion.recipes,
        ),
    ] = "books-demo",
    assignments: Assignments = None,
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where cache, runs and report go.")] = Path(
        "demo"
    ),
    as_json: Json = False,
) -> None:
    """All three stages on the bundled model, on a CPU, in minutes."""
    refuse_several(
        "thresher demo",
        "it runs the stages in a row without waiting for others in between",
        "Run it without torchrun, or start harvest, train and evaluate under torchrun one after the other.",
    )
    recipe = read_recipe(name, assignments)
    cache, runs = folder / "cache.zarr", folder / "runs"
    live = recipe.tables["harvest"].window_gb is not None  # nobody could refill a ring meanwhile
    out.rule("1/3 harvest", align="left")
    harvested = None
    if live:
        out.print("harvest.window_gb is set: the target runs beside the training.")
    else:
        harvested = harvest_recipe(recipe, cache)
    out.rule("2/3 train", align="left")
    trained = train_recipe(recipe, cache, runs, resume=True, live=live, device="auto", wandb="disabled")
    out.rule("3/3 evaluate", align="left")
    results = evaluate_recipe(recipe, cache, runs, folder / "report")
    if as_json:
        write({"harvest": harvested, "train": {"runs": trained}, "evaluate": verdict(results, folder / "report")})
