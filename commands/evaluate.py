"""`thresher evaluate`: trained dictionaries patched back into the target, table and report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cache.errors import UserError
from thresher.cache.place import Place
from thresher.commands import completion
from thresher.commands.document import Json, write
from thresher.commands.options import (
    Assignments,
    CachePath,
    Device,
    RunsPath,
    Wandb,
    WandbMode,
    complain,
    examples,
    on_device,
    out,
)
from thresher.commands.tables import known_tables
from thresher.commands.wiring import plans_of, read_recipe, texts_for

if TYPE_CHECKING:
    from thresher.cache.roster import Roster
    from thresher.evaluate.results import Results
    from thresher.evaluate.run import EvaluateConfig
    from thresher.harvest.corpus import DataConfig
    from thresher.harvest.target import TransformerTarget
    from thresher.recipes.reading import Recipe

EXAMPLES = examples(
    "thresher evaluate books-demo",
    "thresher evaluate runs/books-demo/sae-topk-L01 --text my.txt --out reports/mine",
    "thresher evaluate runs/books-demo --set evaluate.tokens=5000 --json",
)


def evaluate(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN… | RECIPE",
            help="Run directories, or one recipe.",
            autocompletion=completion.runs_or_recipes,
            show_default=False,
        ),
    ],
    assignments: Assignments = None,
    cache: CachePath = None,
    runs: RunsPath = None,
    report: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the report goes; by default reports/NAME.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="SOURCE",
            help="Judge on all of this text, not on held-out documents: a .txt, .jsonl or .parquet file, a directory "
            "of them, or a dataset on the hub.",
        ),
    ] = None,
    wandb: Wandb = "disabled",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Patch dictionaries back into the target; write table and report."""
    assignments = on_device(assignments, device)
    if len(names) == 1 and not Path(names[0]).is_dir():
        recipe = read_recipe(names[0], assignments)
        folder = report or usual_report(recipe.name)
        results = evaluate_recipe(recipe, cache, runs, folder, text, wandb)
    else:
        paths = [Path(name) for name in names]
        folder = report or usual_report(paths[0].name)
        results = evaluate_runs(paths, assignments or [], cache, folder, text, wandb)
    if as_json:
        write(verdict(results, folder))


def usual_report(name: str) -> Path:
    """Where the report of a recipe, or of a run and those named behind it, goes unless --out says otherwise."""
    return Path("reports") / name


def verdict(results: "Results | dict[str, Any]", report: Path) -> dict[str, Any]:
    """What `--json` tells of an evaluation; all of it is in the report's results.json. Of a toy model it is told."""
    from thresher.evaluate.results import to_json

    if isinstance(results, dict):
        return results
    told = ("name", "kind", "family", "protocol", "sites", "metrics", "intervals", "front")
    rows = [{key: row[key] for key in told} for row in to_json(results)["rows"]]
    return {"report": report, "rows": rows, "checks": results.checks, "notes": results.notes}


def evaluate_recipe(
    recipe: "Recipe",
    cache: Place | None,
    runs: Path | None,
    report: Path | None,
    text: str | None = None,
    wandb: WandbMode = "disabled",
) -> "Results | dict[str, Any]":
    """Evaluate the runs that the recipe trained: all of them, and none that was trained under another recipe."""
    from thresher.evaluate.origin import check_recipe
    from thresher.harvest.target import load_target
    from thresher.harvest.texts import own_config
    from thresher.train.files import read_config

    folder = runs or Path("runs") / recipe.name
    target, wanted = load_target(recipe.tables["target"]), recipe.tables["harvest"]
    plans = plans_of(recipe, {site.name: site for site in target.sites(wanted.sites, wanted.layers)})
    missing = [plan.name for plan in plans if not (folder / plan.name / "config.json").is_file()]
    if missing:
        raise UserError(
            f"{folder} has no run {', '.join(missing)}. Train them first: thresher train {recipe.name} (with the same "
            "--runs and --set)."
        )
    for plan in plans:
        check_recipe(folder / plan.name, plan.recipe, read_config(folder / plan.name)["recipe"])
    paths = [folder / plan.name for plan in plans]
    out_folder = report or usual_report(recipe.name)
    own = None if text is None else own_config(recipe.tables["data"], text, {})
    return judge(paths, recipe.tables, target, cache, out_folder, own, wandb)


def evaluate_runs(
    folders: Sequence[Path],
    assignments: Sequence[str],
    cache: Place | None,
    report: Path | None,
    text: str | None = None,
    wandb: WandbMode = "disabled",
) -> "Results | dict[str, Any]":
    """Evaluate run directories, under the settings of the first one's recipe; [data] says how `text` is read."""
    from thresher.cache.records import from_dict, override
    from thresher.harvest.target import load_target
    from thresher.harvest.texts import own_config
    from thresher.recipes.reading import parsed
    from thresher.train.files import read_config
    from thresher.train.found import run_directories

    tables = known_tables()
    paths = run_directories(folders)
    fixed = parsed(assignments, tables)
    reading = {} if text is None else {key: fixed.pop(key) for key in list(fixed) if key.startswith("data.")}
    for key in fixed:
        if key.split(".")[0] not in ("evaluate", "target"):
            raise UserError(
                f"--set {key}: a trained run can only be evaluated under other [evaluate] or [target] settings. Change "
                "the recipe and train anew for the rest."
            )
    stored = override(read_config(paths[0])["recipe"], fixed)
    built: dict[str, Any] = {
        table: from_dict(tables[table], stored[table], table) for table in ("target", "data", "evaluate")
    }
    changed = {key.removeprefix("data."): value for key, value in reading.items()}
    own = None if text is None else own_config(built["data"], text, changed)
    target = load_target(built["target"])
    return judge(paths, built, target, cache, report or usual_report(folders[0].name), own, wandb)


def judge(
    paths: Sequence[Path],
    tables: Mapping[str, Any],
    target: "TransformerTarget",
    cache: Place | None,
    report: Path,
    own: "DataConfig | None",
    wandb: WandbMode = "disabled",
) -> "Results | dict[str, Any]":
    """Judge runs on held-out text or on the user's `own`; `tables` are a recipe's [target], [data] and [evaluate].

    Of a toy model, whose solution is known, what `--json` prints comes back (toy_verdict.py). Of several processes the
    first one judges; the others measure their share and raise Exit.
    """
    from thresher.cache.roster import meet
    from thresher.commands.toy_verdict import is_known, judge_known
    from thresher.evaluate.report import print_table, write_report

    if is_known(target):
        return judge_known(paths, tables, target, cache, report, own, wandb)

    with meet("evaluate", "The same command goes on from there.", say=complain) as roster:
        results = measure(paths, tables, target, cache, report, own, roster)
    if results is None:
        raise typer.Exit
    print_table(results, out)
    written = write_report(results, report)
    for label, path in written._asdict().items():
        for item in path if isinstance(path, (list, tuple)) else [path]:
            out.print(f"{label:<8} {item}", highlight=False, soft_wrap=True)
    if wandb != "disabled":
        from thresher.sharing.tracked import track_evaluation

        track_evaluation(report, paths, wandb)
    return results


def measure(
    paths: Sequence[Path],
    tables: Mapping[str, Any],
    target: "TransformerTarget",
    cache: Place | None,
    report: Path,
    own: "DataConfig | None",
    roster: "Roster",
) -> "Results | None":
    """Results of the runs without their report; on a rank other than 0 its share of the sums, and None."""
    from thresher.evaluate.origin import Run, check_origin, replacements
    from thresher.evaluate.run import contribute
    from thresher.evaluate.run import evaluate as run_evaluate
    from thresher.evaluate.store import Store
    from thresher.train.files import load_run, weights_hash
    from thresher.train.metrics import curves

    loaded = [load_run(path, device=target.device) for path in paths]
    check_origin([run.config for run in loaded], target.identity)
    settings: EvaluateConfig = tables["evaluate"]
    texts = texts_for(loaded[0].config, tables, cache, target, own)
    judged = [
        Run(path, run.dictionary, run.dictionary.spec.sparsity_label, run.config, weights_hash(path), curves(path))
        for path, run in zip(paths, loaded, strict=True)
    ]
    sets, store = replacements(judged, together=settings.together), Store(report / "sums")
    if not roster.world.speaks:
        contribute(sets, target, texts.contexts, settings, roster=roster, store=store, training=texts.training)
        return None
    results = run_evaluate(
        sets,
        target,
        texts.contexts,
        settings,
        console=out,
        provenance={"contexts": texts.source, "runs": [str(path) for path in paths], **texts.facts},
        training=texts.training,
        store=store,
        roster=roster,
    )
    return results._replace(notes=(*texts.notes, *results.notes))
