"""`thresher train`: from a cache, or from the target as it runs, to run directories."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cache.place import Place
from thresher.commands import completion
from thresher.commands.document import Json, write
from thresher.commands.options import (
    Assignments,
    CachePath,
    RecipeName,
    RunsPath,
    Wandb,
    WandbMode,
    complain,
    examples,
    out,
    refuse_several,
)
from thresher.commands.wiring import open_source, plans_of, read_recipe, target_on

if TYPE_CHECKING:
    from thresher.recipes.reading import Recipe
    from thresher.train.run import RunResult

EXAMPLES = examples(
    "thresher train books-demo",
    "thresher train mine.toml --resume --device cuda:1",
    "thresher train mine.toml --set train.lr=3e-4 --runs runs/slower",
)


def train(
    name: RecipeName,
    assignments: Assignments = None,
    cache: CachePath = None,
    runs: RunsPath = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoints.")] = False,
    finetune: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Begin from finished runs of the same sites and sizes (train.init_from).",
            autocompletion=completion.runs,
        ),
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="No cache: the target runs beside the training.")] = False,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    wandb: Wandb = "disabled",
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace some steps for Chrome and TensorBoard, into the run directory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train every dictionary of a sweep from one pass over the cache."""
    if finetune is not None:
        assignments = [*(assignments or []), f"train.init_from={json.dumps(str(finetune), ensure_ascii=False)}"]
    recipe = read_recipe(name, assignments)
    results = train_recipe(recipe, cache, runs, resume=resume, live=live, device=device, wandb=wandb, profile=profile)
    if as_json:
        write({"runs": results})
    if any(result.status == "failed" for result in results):
        raise typer.Exit(1)


def train_recipe(
    recipe: "Recipe",
    cache: Place | None,
    runs: Path | None,
    *,
    resume: bool,
    live: bool = False,
    device: str,
    wandb: WandbMode,
    profile: bool = False,
) -> "list[RunResult]":
    """Train all dictionaries of the recipe: from its cache, from a ring that harvest refills, or live.

    Several processes train a share each from the cache; the first one returns all results, the others raise Exit.
    """
    from thresher.cache.roster import meet
    from thresher.train.endtoend.setting import needs_target
    from thresher.train.run import train as run_train
    from thresher.train.tracking import trial

    folder = (runs or Path("runs") / recipe.name) / (trial() or "")
    if live or recipe.tables["harvest"].window_gb is not None:
        refuse_several(
            "thresher train --live" if live else "Training from a ring (harvest.window_gb)",
            "every process would run the target over the whole text for itself"
            if live
            else "a ring has one reader, which says what may be evicted",
            "Harvest a cache (without harvest.window_gb) to train from several processes, or run one.",
        )
    with (
        meet("train", "Run the same command with --resume to go on from there.", say=complain) as roster,
        open_source(recipe, cache, live) as source,
    ):
        plans = plans_of(recipe, source.sites)
        target = target_on(recipe, device) if needs_target(plans) else None
        results = run_train(
            plans,
            source,
            out=folder,
            device=device,
            resume=resume or roster.world.restarts > 0,
            wandb=wandb,
            profile=profile,
            console=out,
            target=target,
            roster=roster,
            parallel=recipe.tables["parallel"],
        )
        source.finish()
    if not roster.world.speaks:
        raise typer.Exit
    failed = [result.name for result in results if result.status == "failed"]
    out.print(
        f"{len(results) - len(failed)} dictionaries in {folder}" + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return results
