"""`thresher target`: the making of a language model to be explained."""

from pathlib import Path
from typing import Annotated

import typer

from thresher.cache.errors import UserError
from thresher.commands.document import Json, write
from thresher.commands.options import Assignments, RecipeName, examples, out, refuse_several
from thresher.commands.wiring import read_recipe

app = typer.Typer(help="Make a target: train a small language model from text.", no_args_is_help=True)


@app.command(
    "train",
    epilog=examples("thresher target train target-books-lsm", "thresher target train mine.toml --out targets/mine"),
)
def target_train(
    name: RecipeName,
    assignments: Assignments = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The model's directory; by default the recipe's target.model."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train the recipe's language model (\\[pretrain]) on its text.

    A training that was stopped goes on where it was; a finished model is reused.
    """
    from thresher.harvest.pretraining.display import print_result
    from thresher.harvest.pretraining.run import target_folder, train_target

    refuse_several("thresher target train", "a target is trained by one process", "Run it without torchrun.")
    recipe = read_recipe(name, assignments)
    if "pretrain" not in recipe.given:
        raise UserError(
            f"The recipe {recipe.name} has no table [pretrain], which says what language model is trained. Add one "
            "(thresher recipes keys pretrain), or take target-books-lsm."
        )
    target, data, settings = (recipe.tables[table] for table in ("target", "data", "pretrain"))
    result = train_target(target, data, settings, path=folder or target_folder(target), console=out)
    print_result(result, out)
    if as_json:
        write(result)
