"""The command line: parse, wire the stages together, print. The only module that knows all of them.

Heavy imports sit inside the commands, so `thresher --help` is quick.
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.process import prepare_process

if TYPE_CHECKING:
    from thresher.cache.contracts import Site
    from thresher.cache.estimate import Training
    from thresher.cache.reader import CacheReader
    from thresher.cache.windows import WindowedSource
    from thresher.evaluate.results import Results
    from thresher.evaluate.run import EvaluateConfig
    from thresher.harvest.corpus import Corpus, DataConfig
    from thresher.harvest.run import HarvestResult
    from thresher.harvest.target import TransformerTarget
    from thresher.harvest.texts import Texts
    from thresher.recipes.checking import Checked
    from thresher.recipes.reading import Recipe
    from thresher.train.plan import RunPlan
    from thresher.train.run import RunResult

app = typer.Typer(
    help="Harvest a transformer's activations once, train every sparse dictionary from them, judge all of them "
    "under one protocol. A RECIPE is a TOML file or the name of a bundled one (thresher recipes list).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="Look at a cache and check it.", no_args_is_help=True)
target_app = typer.Typer(help="Make a target: train a small language model from text.", no_args_is_help=True)
recipes_app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)
app.add_typer(target_app, name="target")
app.add_typer(cache_app, name="cache")
app.add_typer(recipes_app, name="recipes")

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


def main() -> None:
    """Entry point: UserError ends with its text and 2, an interrupt with 130, anything else with a hint and 1."""
    debug = "--debug" in sys.argv
    sys.argv = _plugins_first([argument for argument in sys.argv if argument != "--debug"])
    signal.signal(signal.SIGTERM, _terminate)
    prepare_process()
    try:
        app()
    except UserError as error:
        _fail("error", error, 2, debug)
    except Interrupted as error:
        _fail("stopped", error, 130, debug)
    except Exception as error:
        if debug:
            raise
        unexpected = f"{type(error).__name__}: {error} (unexpected; --debug shows the traceback)"
        _fail("error", Exception(unexpected), 1, False)


def _plugins_first(line: Sequence[str]) -> list[str]:
    """A command line with every `--plugin FILE.py` right behind the program's name."""
    front: list[str] = []
    rest: list[str] = []
    words = iter(line[1:])
    for word in words:
        if word == "--plugin":
            front += [word, *itertools.islice(words, 1)]
        else:
            (front if word.startswith("--plugin=") else rest).append(word)
    return [line[0], *front, *rest]


def _terminate(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(word: str, error: Exception, code: int, debug: bool) -> NoReturn:
    if debug:
        raise error
    err.print(f"[bold red]{word}:[/] ", end="")
    err.print(str(error), markup=False, highlight=False)
    sys.exit(code)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")] = False,
    plugins: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin",
            metavar="FILE.py",
            help="Import this module first, so that recipes can name the firing rules and topologies it registers; may "
            "be repeated and stand anywhere on the line.",
        ),
    ] = None,
) -> None:
    """Global options; `main` sees the whole line, reads `--debug` and brings `--plugin` to its front."""
    if plugins:
        from thresher.train.plugins import import_plugin

        for path in plugins:
            import_plugin(path)


@app.command()
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
    harvest_recipe(_read(name, assignments), cache, extend=extend)


@app.command()
def train(
    name: RecipeName,
    assignments: Assignments = None,
    cache: CachePath = None,
    runs: RunsPath = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoints.")] = False,
    finetune: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Begin from finished runs of the same sites and sizes (train.init_from)."),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="No cache: the target runs beside the training, activations stay in memory.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    wandb: Wandb = "disabled",
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace some steps for Chrome and TensorBoard, into the run directory.")
    ] = False,
) -> None:
    """Train every dictionary of the recipe's sweep from one pass over the cache."""
    if finetune is not None:
        assignments = [*(assignments or []), f"train.init_from={json.dumps(str(finetune), ensure_ascii=False)}"]
    recipe = _read(name, assignments)
    results = train_recipe(recipe, cache, runs, resume=resume, live=live, device=device, wandb=wandb, profile=profile)
    if any(result.status == "failed" for result in results):
        raise typer.Exit(1)


@app.command()
def evaluate(
    names: Annotated[list[str], typer.Argument(metavar="RUN… | RECIPE", help="Run directories, or one recipe.")],
    assignments: Assignments = None,
    cache: CachePath = None,
    runs: RunsPath = None,
    report: Annotated[
        Path | None, typer.Option("--out", help="Where the report goes; by default reports/NAME.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="PATH | HUB NAME",
            help="Judge on all of this text, not on held-out documents: a .txt, .jsonl or .parquet file, a directory "
            "of them, or a dataset on the hub.",
        ),
    ] = None,
) -> None:
    """Patch trained dictionaries back into the target; print the table and write the report."""
    if len(names) == 1 and not Path(names[0]).is_dir():
        recipe = _read(names[0], assignments)
        evaluate_recipe(recipe, cache, runs, report, text)
    else:
        evaluate_runs([Path(name) for name in names], assignments or [], cache, report, text)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where cache, runs and report go.")] = Path("demo"),
    name: Annotated[str, typer.Option("--recipe", help="Another recipe to run from end to end.")] = "books-demo",
    assignments: Assignments = None,
) -> None:
    """Harvest, train and evaluate on the bundled model, on a CPU, in minutes."""
    recipe = _read(name, assignments)
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


@target_app.command("train")
def target_train(
    name: RecipeName,
    assignments: Assignments = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="The model's directory; by default the recipe's target.model.")
    ] = None,
) -> None:
    """Train the recipe's language model (\\[pretrain]) on its text (resumes; a finished model is reused)."""
    from thresher.harvest.pretraining.display import print_result
    from thresher.harvest.pretraining.run import target_folder, train_target

    recipe = _read(name, assignments)
    if "pretrain" not in recipe.given:
        raise UserError(
            f"The recipe {recipe.name} has no table [pretrain], which says what language model is trained. Add one "
            "(thresher recipes keys pretrain), or take target-books-lsm."
        )
    target, data, settings = (recipe.tables[table] for table in ("target", "data", "pretrain"))
    print_result(train_target(target, data, settings, path=folder or target_folder(target), console=out), out)


@cache_app.command("info")
def cache_info(path: Annotated[Path, typer.Argument(help="A cache directory.")]) -> None:
    """What a cache holds, how large it is and how exact."""
    from thresher.cache.display import print_summary
    from thresher.cache.reader import CacheReader
    from thresher.cache.summary import summary

    with CacheReader.open(path) as reader:
        print_summary(summary(reader), out)


@cache_app.command("verify")
def cache_verify(path: Annotated[Path, typer.Argument(help="A cache directory.")]) -> None:
    """Read every byte, check every checksum, name every fault; exits with 1 if there is one."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from thresher.cache.verify import faults, in_the_making, total_bytes

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("", total=total_bytes(path))
        found = faults(path, lambda count: progress.advance(task, count))
    for fault in found:
        out.print(fault, markup=False, highlight=False, soft_wrap=True)
    for name in in_the_making(path):
        out.print(f"{name} is in the making: it was not read, and does not count.", highlight=False, soft_wrap=True)
    out.print(f"{len(found)} faults in {path}" if found else f"{path} is whole: every checksum holds.", soft_wrap=True)
    if found:
        raise typer.Exit(1)


@cache_app.command("estimate")
def cache_estimate(
    name: RecipeName,
    assignments: Assignments = None,
    cache: CachePath = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to reckon with, in place of reading the text.")
    ] = None,
) -> None:
    """Bytes and time of a recipe's cache, and whether it pays against running the model again (takes some seconds)."""
    from thresher.cache.display import counted, outlooks_table
    from thresher.cache.estimate import outlook, verdict
    from thresher.cache.layout import CODECS
    from thresher.harvest.estimate import measure

    recipe = _read(name, assignments)
    path = cache or default_cache(recipe)
    target, data, settings = (recipe.tables[table] for table in ("target", "data", "harvest"))
    found = measure(target, data, settings, folder=path, tokens=tokens, console=out)
    outlooks = {codec: outlook(found.work, found.rates, codec) for codec in CODECS}
    training = _training(_plans(recipe, {site.name: site for site in found.work.sites}), found.work.rows["train"])
    rows = " + ".join(f"{count:,} {split}" for split, count in found.work.rows.items())
    contexts = sum(found.work.contexts.values())
    out.print(
        f"{rows} rows from {contexts:,} contexts of {found.work.context} tokens ({found.basis}), at "
        f"{len(found.work.sites)} sites of {target.model} on {found.device}."
    )
    out.print(outlooks_table(list(outlooks.values()), found.work.sites, found.rates, found.memory, settings.codec))
    out.print(
        f"The recipe trains {counted(training.dictionaries, 'dictionary', 'dictionaries')} from "
        f"{counted(training.streams, 'stream', 'streams')} of batches: {training.passes:.2f} passes over the rows."
    )
    out.print(verdict(outlooks[settings.codec], list(outlooks.values()), found.rates, training))
    if settings.window_gb is not None:
        out.print(
            f"harvest.window_gb is set: a ring of {settings.window_gb:g} GB is kept in place of all train rows "
            "(rolling mode), and the model runs in every pass."
        )


def _training(plans: "Sequence[RunPlan]", rows: int) -> "Training":
    """What the plans read of a cache with so many training rows; those that share batch size and seed read together."""
    from thresher.cache.estimate import Training

    streams: dict[tuple[int, int], int] = {}
    for plan in plans:
        key = (plan.train.batch_rows, plan.seed)
        streams[key] = max(streams.get(key, 0), plan.train.total_steps(rows) * plan.train.batch_rows)
    return Training(len(plans), len(streams), sum(streams.values()) / rows)


@cache_app.command("prune")
def cache_prune(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH…", help="Caches, or directories of caches.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Also caches that were not used for so long.")
    ] = None,
    used: Annotated[bool, typer.Option("--used", help="Also caches that runs were trained from.")] = False,
    runs: Annotated[Path, typer.Option("--runs", help="Where to look for runs.")] = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it nothing is changed.")] = False,
) -> None:
    """Free space: leftovers of dead harvests; whole caches when named or --older-than. A dry run without --yes."""
    import time

    from thresher.cache.display import print_decision
    from thresher.cache.prune import Policy, decide, find, remove, survey
    from thresher.train.found import trained_from

    named = {path for path in paths or () if find(path) == [path]}
    usual = Path(os.environ.get("THRESHER_CACHE", "caches"))
    folders = paths or ([usual] if usual.is_dir() else [])
    found = list(dict.fromkeys(path for folder in folders for path in find(folder)))
    users = trained_from({runs, *(path.parent / "runs" for path in found)})
    policy, now = Policy(older_than, used), time.time()
    strangers, freed = [], 0
    for path in found:
        seen = survey(path, users)
        if yes:
            decision = remove(path, policy, named=path in named, runs=users)
        else:
            decision = decide(seen, policy, named=path in named, now=now)
        freed += decision.bytes
        strangers += [path / name for name in seen.strangers]
        print_decision(path, seen, decision, out, gone=yes)
    for stranger in strangers:
        out.print(f"not ours, left alone: {stranger}", markup=False, highlight=False, soft_wrap=True)
    where = ", ".join(map(str, folders or [usual]))
    more = " Add --yes to remove it." if freed and not yes else ""
    out.print(f"{decimal(freed)} {'freed' if yes else 'would be freed'} in {where}.{more}", highlight=False)


@recipes_app.command("list")
def recipes_list() -> None:
    """The bundled recipes."""
    from thresher.recipes.display import print_list
    from thresher.recipes.reading import bundled_names

    print_list([_read(name, None) for name in bundled_names()], out)


@recipes_app.command("show")
def recipes_show(name: RecipeName) -> None:
    """Print a recipe file, to copy and change."""
    from thresher.recipes.reading import find

    sys.stdout.write(find(name).read_text(encoding="utf-8"))


@recipes_app.command("check")
def recipes_check(
    name: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe file or a bundled one's name; none: all bundled.")
    ] = None,
    assignments: Assignments = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All recipes as the tables of docs/recipes.md.")] = False,
) -> None:
    """Resolve a recipe with every default written out, or all bundled ones, without network or model."""
    from thresher.cache.records import to_dict
    from thresher.recipes.display import page, print_checked, print_reference
    from thresher.recipes.reading import bundled_names

    recipes, checked, failed = [], [], False
    for each in bundled_names() if name is None else [name]:
        try:
            recipe = _read(each, assignments)
            checked.append(check_recipe(recipe))
            recipes.append(recipe)
        except UserError as error:
            if name is not None:
                raise
            failed = True
            err.print(f"[bold red]error:[/] recipe {each}: {escape(str(error))}", highlight=False, soft_wrap=True)
    if markdown:
        sys.stdout.write(page(recipes, checked))
        raise typer.Exit(int(failed))
    for recipe in recipes if name is not None else ():
        for variant in recipe.variants:
            out.print(f"[bold]{variant.label}[/]")
            sys.stdout.write(json.dumps(variant.resolved, indent=1) + "\n")
        if not recipe.variants:
            wanted = ("target", "data", "pretrain")
            sys.stdout.write(json.dumps({table: to_dict(recipe.tables[table]) for table in wanted}, indent=1) + "\n")
        print_reference(recipe, out)
    print_checked(checked, out)
    raise typer.Exit(int(failed))


@recipes_app.command("keys")
def recipes_keys(
    table: Annotated[str | None, typer.Argument(help="One table only, for example train.")] = None,
) -> None:
    """Every key a recipe may have: type, default, meaning."""
    from thresher.cache.records import described, nearest

    tables = _tables()
    if table is not None and table not in tables:
        raise UserError(f"A recipe has no table [{table}].{nearest(table, tables)} Known: {', '.join(tables)}.")
    for name, kind in tables.items():
        if table in (None, name):
            grid = Table("key", "type", "default", "meaning", title=f"\\[{name}]", title_justify="left", box=None)
            for row in described(kind):
                grid.add_row(*(cell.replace("[", "\\[") for cell in row))
            out.print(grid, "")


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
        plans = _plans(recipe, sites)
        together(plans)  # raises for what training would refuse
        return [Planned(*outlook(each, rows)) for each in plans]

    return check(recipe, TAPS, plan)


def harvest_recipe(recipe: "Recipe", cache: Path | None, *, extend: bool = False) -> "HarvestResult":
    """Fill the recipe's cache, or find it full; or extend the one at `cache`."""
    from thresher.harvest.run import harvest as run_harvest

    target, data, settings = (recipe.tables[table] for table in ("target", "data", "harvest"))
    return run_harvest(target, data, settings, path=cache or default_cache(recipe), console=out, extend=extend)


def train_recipe(
    recipe: "Recipe",
    cache: Path | None,
    runs: Path | None,
    *,
    resume: bool,
    live: bool = False,
    device: str,
    wandb: WandbMode,
    profile: bool = False,
) -> "list[RunResult]":
    """Train all dictionaries of the recipe: from its cache, from a ring that harvest refills, or live."""
    from thresher.train.endtoend.setting import needs_target
    from thresher.train.run import train as run_train

    folder = runs or Path("runs") / recipe.name
    with _source(recipe, cache, live) as source:
        plans = _plans(recipe, source.sites)
        target = _target_on(recipe, device) if needs_target(plans) else None
        results = run_train(
            plans,
            source,
            out=folder,
            device=device,
            resume=resume,
            wandb=wandb,
            profile=profile,
            console=out,
            target=target,
        )
        source.finish()
    failed = [result.name for result in results if result.status == "failed"]
    out.print(
        f"{len(results) - len(failed)} dictionaries in {folder}" + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return results


def evaluate_recipe(
    recipe: "Recipe", cache: Path | None, runs: Path | None, report: Path | None, text: str | None = None
) -> "Results":
    """Evaluate the runs that the recipe trained: all of them, and none that was trained under another recipe."""
    from thresher.evaluate.origin import check_recipe
    from thresher.harvest.target import load_target
    from thresher.harvest.texts import own_config
    from thresher.train.files import read_config

    folder = runs or Path("runs") / recipe.name
    target, wanted = load_target(recipe.tables["target"]), recipe.tables["harvest"]
    plans = _plans(recipe, {site.name: site for site in target.sites(wanted.sites, wanted.layers)})
    missing = [plan.name for plan in plans if not (folder / plan.name / "config.json").is_file()]
    if missing:
        raise UserError(
            f"{folder} has no run {', '.join(missing)}. Train them first: thresher train {recipe.name} (with the same "
            "--runs and --set)."
        )
    for plan in plans:
        check_recipe(folder / plan.name, plan.recipe, read_config(folder / plan.name)["recipe"])
    paths = [folder / plan.name for plan in plans]
    out_folder = report or Path("reports") / recipe.name
    own = None if text is None else own_config(recipe.tables["data"], text, {})
    return _judge(paths, recipe.tables, target, cache, out_folder, own)


def evaluate_runs(
    folders: Sequence[Path],
    assignments: Sequence[str],
    cache: Path | None,
    report: Path | None,
    text: str | None = None,
) -> "Results":
    """Evaluate run directories, under the settings of the first one's recipe; [data] says how `text` is read."""
    from thresher.cache.records import from_dict, override
    from thresher.harvest.target import load_target
    from thresher.harvest.texts import own_config
    from thresher.recipes.reading import parsed
    from thresher.train.files import read_config
    from thresher.train.found import run_directories

    tables = _tables()
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
    return _judge(paths, built, target, cache, report or Path("reports") / folders[0].name, own)


def default_cache(recipe: "Recipe") -> Path:
    """`$THRESHER_CACHE/NAME-FINGERPRINT.zarr`: the name is for people, the fingerprint decides."""
    from thresher.cache.records import fingerprint

    return (
        Path(os.environ.get("THRESHER_CACHE", "caches"))
        / f"{recipe.name}-{fingerprint(_identity(recipe.tables))[:12]}.zarr"
    )


def _judge(
    paths: Sequence[Path],
    tables: Mapping[str, Any],
    target: "TransformerTarget",
    cache: Path | None,
    report: Path,
    own: "DataConfig | None",
) -> "Results":
    """Judge runs on held-out text or on the user's `own`; `tables` are a recipe's [target], [data] and [evaluate]."""
    from thresher.evaluate.origin import Run, check_origin, replacements
    from thresher.evaluate.report import print_table, write_report
    from thresher.evaluate.run import evaluate as run_evaluate
    from thresher.evaluate.store import Store
    from thresher.train.files import load_run, weights_hash
    from thresher.train.metrics import curves

    loaded = [load_run(path, device=target.device) for path in paths]
    check_origin([run.config for run in loaded], target.identity)
    settings: EvaluateConfig = tables["evaluate"]
    texts = _texts(loaded[0].config, tables, cache, target, own)
    judged = [
        Run(path, run.dictionary, run.dictionary.spec.sparsity_label, run.config, weights_hash(path), curves(path))
        for path, run in zip(paths, loaded, strict=True)
    ]
    results = run_evaluate(
        replacements(judged, together=settings.together),
        target,
        texts.contexts,
        settings,
        console=out,
        provenance={"contexts": texts.source, "runs": [str(path) for path in paths], **texts.facts},
        training=texts.training,
        store=Store(report / "sums"),
    )
    results = results._replace(notes=(*texts.notes, *results.notes))
    print_table(results, out)
    written = write_report(results, report)
    for label, path in written._asdict().items():
        for item in path if isinstance(path, (list, tuple)) else [path]:
            out.print(f"{label:<8} {item}", highlight=False, soft_wrap=True)
    return results


def _plans(recipe: "Recipe", sites: "Mapping[str, Site]") -> "list[RunPlan]":
    from thresher.train.plan import plan_runs

    if not recipe.variants:
        raise UserError(
            f"The recipe {recipe.name} makes a target and no dictionary: it has no table [dictionary]. Add one, or run "
            f"`thresher target train {recipe.name}`."
        )
    return [
        plan
        for variant in recipe.variants
        for plan in plan_runs(
            variant.label, variant.tables["dictionary"], variant.tables["train"], sites, variant.resolved
        )
    ]


def _target_on(recipe: "Recipe", device: str) -> "TransformerTarget":
    """The recipe's language model where training takes place."""
    import dataclasses

    from thresher.harvest.target import load_target

    return load_target(dataclasses.replace(recipe.tables["target"], device=device))


def _identity(tables: Mapping[str, Any]) -> dict[str, Any]:
    from thresher.harvest.run import identity

    return identity(tables["target"], tables["data"], tables["harvest"])


def _source(recipe: "Recipe", cache: Path | None, live: bool) -> "CacheReader | WindowedSource":
    """What the recipe trains from; close it."""
    from thresher.cache.ring import open_ring
    from thresher.harvest.live import live_source

    path = cache or default_cache(recipe)
    target, data, settings = (recipe.tables[table] for table in ("target", "data", "harvest"))
    if live:
        return live_source(target, data, settings, path=path, console=out)
    if settings.window_gb is None:
        return _open_cache(recipe, cache)
    return open_ring(path, _identity(recipe.tables), lambda line: out.print(line, highlight=False))


def _open_cache(recipe: "Recipe", cache: Path | None) -> "CacheReader":
    from thresher.cache.reader import CacheReader

    path = cache or default_cache(recipe)
    if not path.exists():
        raise UserError(f"There is no cache at {path}. Fill it first: thresher harvest {recipe.name}.")
    reader = CacheReader.open(path, identity=_identity(recipe.tables))
    if reader.incomplete:
        names = ", ".join(reader.incomplete)
        out.print(f"Note: {names} of {path} is in the making and does not count.", highlight=False, soft_wrap=True)
    return reader


def _texts(
    config: Mapping[str, Any],
    tables: Mapping[str, Any],
    cache: Path | None,
    target: "TransformerTarget",
    own: "DataConfig | None",
) -> "Texts":
    """What runs are judged on: `own` text, or what the first of them, of this config.json, holds out."""
    from thresher.harvest.corpus import read_corpus
    from thresher.harvest.target import load_tokenizer
    from thresher.harvest.texts import held_out, own_text

    def read(data: "DataConfig") -> "Corpus":
        return read_corpus(data, load_tokenizer(tables["target"]), target.n_ctx, target.n_vocab, out)

    if own is not None:
        return own_text(config, tables["data"], own, cache, read)
    return held_out(config, tables["data"], tables["evaluate"].split, cache, read)


def _tables() -> dict[str, type]:
    from thresher.evaluate.run import EvaluateConfig
    from thresher.harvest.corpus import DataConfig
    from thresher.harvest.pretraining.settings import PretrainConfig
    from thresher.harvest.run import HarvestConfig
    from thresher.harvest.target import TargetConfig
    from thresher.recipes.reference import ReferenceConfig
    from thresher.train.config import TrainConfig
    from thresher.train.dictionary.spec import DictionaryConfig

    return {
        "target": TargetConfig,
        "data": DataConfig,
        "harvest": HarvestConfig,
        "dictionary": DictionaryConfig,
        "train": TrainConfig,
        "evaluate": EvaluateConfig,
        "pretrain": PretrainConfig,
        "reference": ReferenceConfig,
    }


def _read(name: str, assignments: Sequence[str] | None) -> "Recipe":
    from thresher.recipes.reading import read

    return read(name, assignments or [], _tables())


if __name__ == "__main__":
    sys.path.pop(0)  # the root of the checkout, whose folders must not be found as `evaluate` or `cache`
    main()
