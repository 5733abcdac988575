"""`thresher harvest`: text through the target into a cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cache.errors import UserError
from thresher.commands.options import Assignments, CachePath, RecipeName, out
from thresher.commands.wiring import default_cache, read_recipe

if TYPE_CHECKING:
    from thresher.harvest.run import HarvestResult
    from thresher.recipes.reading import Recipe


def harvest(
    name: RecipeName,
    assignments: Assignments = None,
    cache: CachePath = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Add the recipe's further sites, or its further text, to the --cache.")
    ] = False,
) -> None:
    """Run the target once and write its activations to a cache (resumes; a matching cache is reused)."""
    if extend and cache is None:
        raise UserError("--extend needs --cache PATH: the cache to be extended, since this recipe names another one.")
    harvest_recipe(read_recipe(name, assignments), cache, extend=extend)


def harvest_recipe(recipe: "Recipe", cache: Path | None, *, extend: bool = False) -> "HarvestResult":
    """Fill the recipe's cache, or find it full; or extend the one at `cache`."""
    from thresher.harvest.run import harvest as run_harvest

    target, data, settings = (recipe.tables[table] for table in ("target", "data", "harvest"))
    return run_harvest(target, data, settings, path=cache or default_cache(recipe), console=out, extend=extend)
