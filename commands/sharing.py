"""`thresher push` and `thresher pull`: runs to the Hugging Face hub and from it."""

from pathlib import Path
from typing import Annotated

import typer

from thresher.commands.options import err, out

Repository = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A repository on the hub.")]
Revision = Annotated[str | None, typer.Option("--revision", help="A branch; to pull from, also a tag or a commit.")]


def push(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN… OWNER/NAME",
            help="Run directories, folders of them, or the stem of a set's names; last, the repository on the hub.",
        ),
    ],
    report: Annotated[
        Path | None, typer.Option("--report", help="An evaluation of these runs: its numbers and plots go along.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Their cache: its manifest and statistics go along, not its rows.")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="For the model card, as the hub spells it: apache-2.0, mit, ….")
    ] = None,
    revision: Revision = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Push the training state too.")] = False,
) -> None:
    """Push finished runs to the Hugging Face hub, with a model card made from their numbers."""
    from thresher.cache.errors import UserError
    from thresher.sharing.push import push as run_push

    _bars_on_terminals_only()
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


def pull(
    repo: Repository,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN…]", help="Names of runs or stems of sets; none: all runs.")
    ] = None,
    runs: Annotated[Path | None, typer.Option("--runs", help="Where run directories go; by default runs/NAME.")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Fetch the evaluation too, into this directory.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Fetch the cache's manifest and statistics into this directory.")
    ] = None,
    revision: Revision = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Fetch the training state too.")] = False,
) -> None:
    """Fetch runs from the Hugging Face hub, and check every file against its SHA-256."""
    from thresher.sharing.pull import pull as run_pull

    _bars_on_terminals_only()
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


def _bars_on_terminals_only() -> None:
    """Keep the client's progress bars out of logs."""
    from huggingface_hub.utils import disable_progress_bars

    if not err.is_terminal:
        disable_progress_bars()
