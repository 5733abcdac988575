"""`thresher harvest`: text through the target into a cache."""

import math
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cache.errors import UserError
from thresher.cache.place import Place
from thresher.cache.world import from_environment
from thresher.commands.document import Json, write
from thresher.commands.options import Assignments, CachePath, Device, RecipeName, examples, on_device, out
from thresher.commands.wiring import default_cache, read_recipe

if TYPE_CHECKING:
    from thresher.harvest.run import HarvestResult
    from thresher.recipes.reading import Recipe

EXAMPLES = examples(
    "thresher harvest books-demo",
    "thresher harvest gpt2-small --set data.max_tokens=1_000_000",
    "thresher harvest mine.toml --extend --cache caches/mine.zarr",
)


def harvest(
    name: RecipeName,
    assignments: Assignments = None,
    cache: CachePath = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Add the recipe's further sites, or its further text, to the --cache.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run the target once and write its activations to a cache.

    A harvest that was stopped goes on where it was; a cache made with the same settings is reused.
    """
    if extend and cache is None:
        raise UserError("--extend needs --cache PATH: the cache to be extended, since this recipe names another one.")
    result = harvest_recipe(read_recipe(name, on_device(assignments, device)), cache, extend=extend)
    if as_json and from_environment().speaks:
        write(result)


def harvest_recipe(recipe: "Recipe", cache: Place | None, *, extend: bool = False) -> "HarvestResult":
    """Fill the recipe's cache, or find it full; or extend the one at `cache`. Several processes fill a share each."""
    from thresher.cache.roster import meet
    from thresher.harvest.run import harvest as run_harvest

    target, data, settings = (recipe.tables[table] for table in ("target", "data", "harvest"))
    path = cache or default_cache(recipe)
    with meet("harvest", "Run the same harvest again to go on.", phase_s=math.inf) as roster:  # text may be long
        result = run_harvest(target, data, settings, path=path, console=out, extend=extend, roster=roster)
        if roster.world.speaks:
            roster.wait()
    return result
