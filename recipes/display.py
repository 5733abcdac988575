"""Recipes on screen, and as a page."""

import json
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thresher.cache.records import to_dict
from thresher.recipes.checking import Checked
from thresher.recipes.reading import Recipe

OWN = "Thresher"
PAGE_HEAD = "recipe", "what", "as", "sets", "dictionaries", "parameters", "steps", "dense FLOP"


def by_source(recipes: Iterable[Recipe]) -> dict[str, list[Recipe]]:
    """Recipes by the system they come from, Thresher's own first, then alphabetically."""
    groups: dict[str, list[Recipe]] = {}
    for recipe in sorted(recipes, key=lambda each: (_source(each) != OWN, _source(each).lower(), each.name)):
        groups.setdefault(_source(recipe), []).append(recipe)
    return groups


def print_list(recipes: Iterable[Recipe], console: Console) -> None:
    """A table per source: name, points of the sweep, what it is."""
    for source, group in by_source(recipes).items():
        table = Table(title=source, title_justify="left", title_style="bold", box=None, header_style="dim", expand=True)
        table.add_column("recipe", no_wrap=True, min_width=30)
        table.add_column("sets", justify="right")
        table.add_column("about", ratio=1)
        for recipe in group:
            table.add_row(recipe.name, str(len(recipe.variants) or "target"), escape(recipe.about))
        console.print(table, "")


def print_reference(recipe: Recipe, console: Console) -> None:
    """What is known of a recipe beside its settings."""
    reference = recipe.tables["reference"]
    grid = Table.grid(padding=(0, 2))
    rows = {"source": f"{reference.source} ({reference.variant})"}
    rows |= {name: getattr(reference, name) for name in ("compute", "result", "differs")}
    for name, text in rows.items():
        if text:
            grid.add_row(name, escape(text))
    console.print(grid)


def resolved_json(recipe: Recipe) -> str:
    """A recipe with every default written out: an object by dictionary of the sweep, or of the target it makes."""
    tables = ("target", "data", "pretrain")
    made = {recipe.name: {table: to_dict(recipe.tables[table]) for table in tables}} if not recipe.variants else {}
    return json.dumps({variant.label: variant.resolved for variant in recipe.variants} | made, indent=1) + "\n"


def print_checked(checked: Sequence[Checked], failed: Sequence[str], console: Console) -> None:
    """A line per recipe that holds together, what could not be seen of some, and last the verdict."""
    table = Table(box=None, header_style="bold")
    table.add_column("recipe", no_wrap=True)
    for name in ("sets", "dicts", "params", "steps", "FLOP"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for each in checked:
        table.add_row(each.name, *_numbers(each), "[green]OK[/]")
    console.print(table)
    for each in checked:
        if each.note:
            console.print(f"{each.name}: {each.note}.", markup=False, highlight=False)
    if failed:
        console.print(f"[bold red]FAILED[/] {len(failed)}: {', '.join(failed)}", highlight=False, soft_wrap=True)
    else:
        held = f"{checked[0].name} holds" if len(checked) == 1 else f"{len(checked)} recipes hold"
        console.print(f"[bold green]OK[/] {held} together.", highlight=False, soft_wrap=True)


def page(recipes: Iterable[Recipe], checked: Iterable[Checked]) -> str:
    """All of it as Markdown: a table by source, then what each recipe's [reference] says."""
    sizes = {each.name: each for each in checked}
    lines = []
    for source, group in by_source(recipes).items():
        lines += [f"## {source}", "", _row(PAGE_HEAD), _row(["---"] * len(PAGE_HEAD))]
        for recipe in group:
            variant = recipe.tables["reference"].variant
            lines.append(_row((f"`{recipe.name}`", recipe.about, variant, *_numbers(sizes[recipe.name]))))
        lines.append("")
        for recipe in group:
            told = recipe.tables["reference"]
            parts = {"Trains": told.compute, "Result": told.result, "Differs": told.differs}
            if told.variant != "own" and any(parts.values()):
                said = " ".join(f"{label}: {_sentence(text)}" for label, text in parts.items() if text)
                lines.append(f"- `{recipe.name}`. {said}")
        if lines[-1]:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _source(recipe: Recipe) -> str:
    return str(recipe.tables["reference"].source)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."


def _numbers(each: Checked) -> tuple[str, str, str, str, str]:
    if not each.planned:
        return str(each.sets or "–"), "–", "–", "–", "–"
    steps = "by text" if not each.steps else f"{each.steps[-1]:,}"
    if len(each.steps) > 1:
        steps = f"{each.steps[0]:,}–{steps}"
    flop = "–" if each.flop is None else f"{each.flop:.1e}"
    return str(each.sets), str(len(each.planned)), _short(each.parameters), steps, flop


def _short(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
