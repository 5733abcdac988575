"""`thresher export` and `thresher import`: our runs as other tools' files, theirs as our runs."""

from pathlib import Path
from typing import Annotated

import typer

from thresher.commands import completion
from thresher.commands.document import Json, write
from thresher.commands.options import Assignments, CachePath, RecipeName, RunsPath, examples, out
from thresher.commands.wiring import open_cache, read_recipe

EXPORT_EXAMPLES = examples(
    "thresher export runs/books-demo/sae-topk-L02 --to saelens",
    "thresher export runs/books-demo --to npz --out exports/all",
)
IMPORT_EXAMPLES = examples(
    "thresher import exports/saelens books-demo --from saelens --name back",
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
        Path | None, typer.Option("--out", metavar="DIR", help="Where the files go; by default exports/FORMAT.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write trained dictionaries in the format of another tool.

    Its own class then computes the same.
    """
    from thresher.interop.export import export as run_export
    from thresher.train.found import run_directories

    written = run_export(run_directories(runs), to, folder or Path("exports") / to, overwrite=overwrite)
    for part in written:
        out.print(f"{part.path}  {', '.join(part.runs)}", highlight=False, soft_wrap=True)
    if as_json:
        write({"files": written})


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

    They act on the target whose activations the recipe caches. Every way to understand the files is tried on held-out rows of the cache, and what each comes to is printed.
    """
    from thresher.cache.records import to_dict
    from thresher.interop.display import print_imported
    from thresher.interop.importing import Naming, import_dictionaries

    found = read_recipe(recipe, assignments)
    tables = {table: to_dict(found.tables[table]) for table in ("target", "data", "harvest", "evaluate")}
    naming = Naming(name or path.resolve().name, reads, writes)
    with open_cache(found, cache) as source:
        done = import_dictionaries(path, form, source, tables, runs or Path("runs") / found.name, naming, reading)
    print_imported(done, out)
    if as_json:
        write({"runs": done})
