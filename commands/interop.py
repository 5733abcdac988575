"""`thresher export` and `thresher import`: our runs as other tools' files, theirs as our runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cache.place import Place
from thresher.commands import completion
from thresher.commands.document import Json, write
from thresher.commands.options import Assignments, CachePath, RecipeName, RunsPath, examples, out
from thresher.commands.tables import known_tables
from thresher.commands.wiring import open_cache, read_recipe, texts_for

if TYPE_CHECKING:
    from thresher.cache.reader import CacheReader
    from thresher.interop.adapting import Moved
    from thresher.interop.export import Written
    from thresher.interop.formats import Text

EXPORT_EXAMPLES = examples(
    "thresher export runs/books-demo/sae-topk-L02 --to saelens",
    "thresher export runs/books-demo/clt-batchtopk --to circuit-tracer --pages",
    "thresher export runs/books-demo --to npz --thresholds --out exports/all",
)
IMPORT_EXAMPLES = examples(
    "thresher import exports/saelens/sae-topk-L02 books-demo --from saelens",
    "thresher import theirs mine.toml --from saelens --reads L05.mlp_in --writes L05.mlp_out",
)


def export(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…",
            help="Run directories, or folders of them.",
            autocompletion=completion.runs,
            show_default=False,
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="saelens, circuit-tracer, dictionary-learning, …")],
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the files go; by default exports/FORMAT/RUN.")
    ] = None,
    thresholds: Annotated[
        bool,
        typer.Option("--thresholds", help="Give TopK and GroupMax a threshold instead, set on the run's cache."),
    ] = False,
    hook: Annotated[
        str | None,
        typer.Option("--hook", metavar="HOOK", help="Let an MLP's dictionary read here: ln2.hook_normalized."),
    ] = None,
    pages: Annotated[bool, typer.Option("--pages", help="circuit-tracer: show what latents fire on.")] = False,
    cache: CachePath = None,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", min=1, help="delphi-cache: tokens of held-out text to encode.")
    ] = 1_000_000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write trained dictionaries in the format of another tool.

    Its own class then computes the same. What it cannot hold is refused, with the nearest route; of several runs those
    that it can hold are written.
    """
    from thresher.cache.interrupts import deferred_interrupts
    from thresher.interop.adapting import Thresholds
    from thresher.interop.display import print_written
    from thresher.interop.export import export as run_export
    from thresher.interop.formats import load
    from thresher.interop.thresholds import ROWS
    from thresher.train.found import run_directories

    paths, left_out = run_directories(runs), list[str]()
    with _pages(paths, to, cache, hook, pages) as add:
        with deferred_interrupts() as stop, _text(paths, tokens, cache, load(to).write_codes is not None) as text:
            written = run_export(
                paths,
                to,
                folder or Path("exports") / to,
                overwrite=overwrite,
                nested=folder is None,
                thresholds=Thresholds(ROWS, cache, stop) if thresholds else None,
                moved=None if hook is None else _moved(paths, hook),
                text=text,
                left_out=left_out.append,
            )
        print_written(written, out)
        shown = [add(part) for part in written] if add is not None else []
    for reason in left_out:
        out.print(f"Left out: {reason}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        write({"files": written, "pages": shown, "left_out": left_out})
    if left_out:
        raise typer.Exit(1)


def _config_of(runs: Sequence[Path], same: Sequence[str]) -> dict[str, Any]:
    """config.json of the first run. Raises UserError where another one has, of what is `same`, something else."""
    from thresher.cache.errors import UserError
    from thresher.train.files import read_config

    first = read_config(runs[0])
    for run in runs[1:]:
        identity = read_config(run)["cache"]["identity"]
        unlike = [part for part in same if identity.get(part) != first["cache"]["identity"].get(part)]
        if unlike:
            raise UserError(
                f"{run} has another {' and '.join(unlike)} than {runs[0]}; expected the same, since one is loaded for "
                "all of them. Export them one by one."
            )
    return first


def _moved(runs: Sequence[Path], hook: str) -> "Moved":
    """The norms of the target that the runs were trained on."""
    from thresher.harvest.checkpoint import locate
    from thresher.interop.adapting import Moved
    from thresher.interop.norms import norms_of

    target = _config_of(runs, ["target"])["recipe"]["target"]
    return Moved(hook, norms_of(locate(target["model"], target["revision"])))


@contextmanager
def _text(runs: Sequence[Path], tokens: int, cache: Place | None, wanted: bool) -> "Iterator[Text | None]":
    """Held-out text of the first run and its target, for formats that hold codes over a text, with a bar."""
    if not wanted:
        yield None
        return
    from rich.progress import Progress

    from thresher.cache.records import from_dict
    from thresher.harvest.target import load_target
    from thresher.harvest.texts import evenly
    from thresher.interop.formats import Text

    config, kinds = _config_of(runs, ["target", "data"]), known_tables()
    stored = config["recipe"]
    tables: dict[str, Any] = {
        name: from_dict(kinds[name], stored[name], name) for name in ("target", "data", "evaluate")
    }
    target = load_target(tables["target"])
    held_out = texts_for(config, tables, cache, target, None)
    contexts = evenly(held_out.contexts, tokens)
    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("encoding", total=len(contexts.token_id))
        yield Text(target, contexts, held_out.source, advance=lambda count: progress.advance(task, count))


@contextmanager
def _pages(
    runs: Sequence[Path], to: str, cache: Place | None, hook: str | None, wanted: bool
) -> "Iterator[Callable[[Written], Path] | None]":
    """What writes the pages of an export and says where: from the cache of its runs, in words of their target's.

    Raises UserError, before anything is exported, for another format, and for what cache or target does not have.
    """
    if not wanted:
        yield None
        return
    from rich.progress import Progress

    from thresher.cache.errors import UserError
    from thresher.interop import circuit_tracer, feature_pages
    from thresher.interop.adapting import Caches
    from thresher.train.files import read_config

    if to != circuit_tracer.FORMAT.name:
        raise UserError(f"--pages has no effect with --to {to}: only circuit-tracer's viewer shows any. Leave it out.")
    word, configs = _word(runs), [read_config(run) for run in runs]
    with ExitStack() as opened:
        caches = Caches("--pages", cache, opened)
        for config in configs:
            source = caches.of(config)
            if hook is not None:
                _check_stored(config, source, hook)

        def add(part: "Written") -> Path:
            own = [c for c in configs if c["name"] in part.runs]
            own = [c for c in own if c["group"] == part.path.name] or own  # two sets may have names in common
            with Progress(console=out, transient=True) as progress:
                task = progress.add_task(f"pages of {part.path.name}", total=None)
                feature_pages.add_pages(
                    part.path,
                    caches.of(own[0]),
                    word,
                    advance=lambda done, of: progress.update(task, completed=done, total=of),
                )
            out.print(f"{part.path / feature_pages.FOLDER}  pages", highlight=False, soft_wrap=True)
            return part.path / feature_pages.FOLDER

        yield add


def _check_stored(config: dict[str, Any], source: "CacheReader", hook: str) -> None:
    """Raise UserError where the cache of a run does not have what an export for `hook` reads."""
    from thresher.cache.errors import UserError
    from thresher.interop.hooks import layer_of, site_of

    for name in config["dictionary"]["reads"]:
        wanted = f"blocks.{layer_of(name)}.{hook}"
        try:
            site_of(wanted, source.sites.values(), "--hook")
        except UserError as error:
            raise UserError(
                f"--pages looks at what the export reads, which with --hook {hook} is {wanted}, and {source.path} has "
                "not stored that. Leave one of them out, or harvest that site too."
            ) from error


def _word(runs: Sequence[Path]) -> Callable[[int], str]:
    """The text of a token id of the runs' target. Raises UserError for one that has no tokenizer."""
    from thresher.cache.errors import UserError
    from thresher.cache.records import from_dict
    from thresher.harvest.target import load_tokenizer

    stored = _config_of(runs, ["target"])["recipe"]["target"]
    tokenizer = load_tokenizer(from_dict(known_tables()["target"], stored, "target"))
    if tokenizer is None:
        raise UserError(
            f"--pages shows text, but the target {stored['model']} has no tokenizer files. Put them beside its "
            "weights, or leave --pages out."
        )
    return lambda token: str(tokenizer.decode([token]))


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The directory or file that the other tool wrote.")],
    recipe: RecipeName,
    form: Annotated[str, typer.Option("--from", metavar="FORMAT", help="saelens, circuit-tracer, openmoss, npz, …")],
    assignments: Assignments = None,
    cache: CachePath = None,
    runs: RunsPath = None,
    name: Annotated[str | None, typer.Option("--name", help="What the run is called; by default PATH's name.")] = None,
    reads: Annotated[
        str | None,
        typer.Option("--reads", metavar="SITE", help="Site it reads, if not what its files say; {} is the layer."),
    ] = None,
    writes: Annotated[
        str | None, typer.Option("--writes", metavar="SITE", help="Site it writes, if not what its files say.")
    ] = None,
    reading: Annotated[
        str | None, typer.Option("--reading", metavar="LABEL", help="How to understand the files, of those listed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read dictionaries of another tool into run directories.

    They act on the target whose activations the recipe caches. Every way to understand the files is tried on held-out
    rows of the cache, and what each comes to is printed.
    """
    from thresher.cache.records import to_dict
    from thresher.interop.display import print_imported
    from thresher.interop.importing import Naming, called_after, import_dictionaries

    found = read_recipe(recipe, assignments)
    tables = {table: to_dict(found.tables[table]) for table in ("target", "data", "harvest", "evaluate")}
    naming = Naming(name or called_after(path), reads, writes)
    with open_cache(found, cache) as source:
        done = import_dictionaries(path, form, source, tables, runs or Path("runs") / found.name, naming, reading)
    print_imported(done, out)
    if as_json:
        write({"runs": done})
