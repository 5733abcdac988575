"""`thresher recipes`: list, show and check recipes, and print what keys there are."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from thresher.cache.errors import UserError
from thresher.commands import completion
from thresher.commands.document import Json, write
from thresher.commands.options import Assignments, RecipeName, err, examples, out
from thresher.commands.tables import known_tables
from thresher.commands.wiring import plans_of, read_recipe

if TYPE_CHECKING:
    from thresher.cache.contracts import Site
    from thresher.recipes.checking import Checked, Planned
    from thresher.recipes.reading import Recipe

app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)


@app.command("list", epilog=examples("thresher recipes list"))
def recipes_list(as_json: Json = False) -> None:
    """The bundled recipes."""
    from thresher.recipes.display import print_list
    from thresher.recipes.reading import bundled_names

    recipes = [read_recipe(name, None) for name in bundled_names()]
    print_list(recipes, out)
    if as_json:
        told = [(recipe, recipe.tables["reference"].source, len(recipe.variants)) for recipe in recipes]
        write(
            {
                "recipes": [
                    {"name": r.name, "source": source, "sets": sets, "about": r.about} for r, source, sets in told
                ]
            }
        )


@app.command("show", epilog=examples("thresher recipes show gpt2-small > mine.toml"))
def recipes_show(name: RecipeName) -> None:
    """Print a recipe file, to copy and change."""
    from thresher.recipes.reading import find

    sys.stdout.write(find(name).read_text(encoding="utf-8"))


@app.command(
    "check", epilog=examples("thresher recipes check", "thresher recipes check books-demo --set dictionary.expansion=4")
)
def recipes_check(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file or a bundled one's name; none: all bundled.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    assignments: Assignments = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Also the recipe as JSON, every default written out, by dictionary.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="All recipes as the tables of docs/recipes.md.")] = False,
    as_json: Json = False,
) -> None:
    """Say whether a recipe holds together, or all bundled ones, without network or model."""
    from thresher.recipes.display import page, print_checked, print_reference, resolved_json
    from thresher.recipes.reading import bundled_names

    if resolved and name is None:
        raise UserError("--resolved needs a RECIPE, the one to write out: thresher recipes check RECIPE --resolved.")
    if markdown + as_json + resolved > 1:
        raise UserError("--markdown, --json and --resolved are forms of the same output. Give one of them.")
    recipes, checked = [], []
    failed: dict[str, str] = {}
    for each in bundled_names() if name is None else [name]:
        try:
            recipe = read_recipe(each, assignments)
            checked.append(check_recipe(recipe))
            recipes.append(recipe)
        except UserError as error:
            if name is not None:
                raise
            failed[each] = str(error)
            err.print(f"[bold red]error:[/] recipe {each}: {escape(str(error))}", highlight=False, soft_wrap=True)
    if markdown:
        sys.stdout.write(page(recipes, checked))
        raise typer.Exit(int(bool(failed)))
    console = err if resolved else out  # so that standard output is JSON and nothing else
    for recipe in recipes if name is not None else ():
        if resolved:
            sys.stdout.write(resolved_json(recipe))
            sys.stdout.flush()
        print_reference(recipe, console)
    print_checked(checked, list(failed), console)
    if as_json:
        write({"recipes": [_checked(*pair) for pair in zip(recipes, checked, strict=True)], "failed": failed})
    raise typer.Exit(int(bool(failed)))


def _checked(recipe: "Recipe", checked: "Checked") -> dict[str, Any]:
    """What a recipe comes to, and its points of the sweep with every default written out."""
    numbers = {"dictionaries": len(checked.planned), "parameters": checked.parameters, "steps": checked.steps}
    variants = {variant.label: variant.resolved for variant in recipe.variants}
    return {"name": recipe.name, **numbers, "flop": checked.flop, "note": checked.note, "variants": variants}


@app.command("keys", epilog=examples("thresher recipes keys", "thresher recipes keys train"))
def recipes_keys(
    table: Annotated[
        str | None,
        typer.Argument(metavar="TABLE", help="One table only, for example train.", autocompletion=completion.tables),
    ] = None,
    as_json: Json = False,
) -> None:
    """Every key a recipe may have: type, default, meaning."""
    from thresher.cache.records import described, nearest

    tables = known_tables()
    if table is not None and table not in tables:
        raise UserError(f"A recipe has no table [{table}].{nearest(table, tables)} Known: {', '.join(tables)}.")
    for name, kind in tables.items():
        if table in (None, name):
            grid = Table("key", "type", "default", "meaning", title=f"\\[{name}]", title_justify="left", box=None)
            for row in described(kind):
                grid.add_row(*(cell.replace("[", "\\[") for cell in row))
            out.print(grid, "")
    if as_json:
        write({"tables": {name: _keys(kind) for name, kind in tables.items() if table in (None, name)}})


def _keys(kind: type) -> dict[str, Any]:
    """Type, default and meaning of every key of a table, as texts."""
    from thresher.cache.records import described

    return {key: {"type": spelled, "default": default, "help": text} for key, spelled, default, text in described(kind)}


def check_recipe(recipe: "Recipe") -> "Checked":
    """Resolve a recipe's dictionaries against sites made from its [reference]; see recipes/checking.py."""
    from thresher.harvest.sites import TAPS
    from thresher.recipes.checking import Planned, check
    from thresher.train.endtoend.setting import together
    from thresher.train.outlook import outlook

    data = recipe.tables["data"]
    share = 1 - data.test_fraction - data.validation_fraction
    rows = None if data.max_tokens is None else round(data.max_tokens * share)

    def plan(recipe: "Recipe", sites: "Mapping[str, Site]") -> "list[Planned]":
        plans = plans_of(recipe, sites)
        together(plans)  # raises for what training would refuse
        return [Planned(*outlook(each, rows)) for each in plans]

    return check(recipe, TAPS, plan)
