"""`thresher push` and `thresher pull`: runs to the Hugging Face hub and from it."""

from pathlib import Path
from typing import Annotated

import typer

from thresher.commands import completion
from thresher.commands.document import Json, write
from thresher.commands.options import examples, out

PUSH_EXAMPLES = examples(
    "thresher push runs/books-demo ada/books --license apache-2.0",
    "thresher push runs/books-demo/sae-topk ada/books --report reports/books-demo",
)
PULL_EXAMPLES = examples(
    "thresher pull ada/books",
    "thresher pull ada/books sae-topk --runs runs/theirs --report reports/theirs",
)
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="NAME", help="A branch; to pull from, also a tag or a commit."),
]


def push(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN… OWNER/NAME",
            help="Runs, folders of them, or the stem of a set's names; last, the repository.",
            autocompletion=completion.runs,
            show_default=False,
        ),
    ],
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="An evaluation of them: numbers and plots go along.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="PATH",
            help="Their cache: manifest and statistics go along, not the rows.",
            autocompletion=completion.caches,
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option("--license", metavar="NAME", help="For the card, as the hub spells it: apache-2.0, mit."),
    ] = None,
    revision: Revision = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Push the training state too.")] = False,
    as_json: Json = False,
) -> None:
    """Push finished runs to the Hugging Face hub, with a model card."""
    from thresher.cache.errors import UserError
    from thresher.sharing.push import push as run_push

    *runs, repo = places
    if not runs:
        raise UserError(
            f"`thresher push {repo}` names one thing: expected run directories and then the repository, for example "
            "`thresher push runs/books-demo ada/books`."
        )
    done = run_push(
        [Path(run) for run in runs],
        repo,
        report=report,
        cache=cache,
        license=license,
        revision=revision,
        private=private,
        checkpoints=checkpoints,
    )
    for note in done.notes:
        out.print(f"Note: {note}", highlight=False, soft_wrap=True)
    held = f"; {len(done.held)} were there already" if done.held else ""
    out.print(f"{len(done.new)} runs pushed{held}: {done.address}", highlight=False, soft_wrap=True)
    if as_json:
        write(done)


def pull(
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="A repository that push filled.", show_default=False)
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN…]", help="Runs, or stems of sets; none: all.", show_default=False),
    ] = None,
    runs: Annotated[
        Path | None, typer.Option("--runs", metavar="DIR", help="Where run directories go; by default runs/NAME.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Fetch the evaluation too, into this directory.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Fetch the cache's manifest and statistics too.")
    ] = None,
    revision: Revision = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Fetch the training state too.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch runs from the Hugging Face hub, and check every file."""
    from thresher.sharing.pull import pull as run_pull

    folder = runs or Path("runs") / repo.split("/")[-1]
    done = run_pull(
        repo,
        names or [],
        out=folder,
        report=report,
        cache=cache,
        revision=revision,
        checkpoints=checkpoints,
    )
    for path in done.runs:
        out.print(str(path), highlight=False, soft_wrap=True)
    held = f"; {len(done.reused)} were there already" if done.reused else ""
    out.print(f"{len(done.runs)} runs pulled from {repo} at {done.commit[:12]}{held}.", highlight=False, soft_wrap=True)
    if as_json:
        write(done)
