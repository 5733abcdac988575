"""The console script: the program put together from its commands, its global options, how it ends.

Heavy imports sit inside the commands, so `thresher --help` is quick.
"""

import faulthandler
import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.process import prepare_process
from thresher.commands import (
    cache,
    demo,
    document,
    estimate,
    evaluate,
    harvest,
    interop,
    recipes,
    sharing,
    target,
    toy,
    train,
)
from thresher.commands.options import complain, examples, place

_GRACE_SECONDS = 3.0
_EXIT_SECONDS = 20.0

app = typer.Typer(
    help="Harvest a transformer's activations once, train every sparse dictionary from them, judge all of them "
    "under one protocol. A RECIPE is a TOML file or the name of a bundled one (thresher recipes list).",
    no_args_is_help=True,
    epilog=examples("thresher demo", "thresher recipes show gpt2-small > mine.toml", "thresher harvest mine.toml"),
    pretty_exceptions_enable=False,
)
app.command(epilog=harvest.EXAMPLES)(harvest.harvest)
app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=interop.EXPORT_EXAMPLES)(interop.export)
app.command("import", epilog=interop.IMPORT_EXAMPLES)(interop.import_)
app.command(epilog=demo.EXAMPLES)(demo.demo)
app.command(epilog=estimate.EXAMPLES)(estimate.estimate)
app.command(epilog=sharing.PUSH_EXAMPLES)(sharing.push)
app.command(epilog=sharing.PULL_EXAMPLES)(sharing.pull)
app.add_typer(target.app, name="target")
app.add_typer(toy.app, name="toy")
app.add_typer(cache.app, name="cache")
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Entry point: UserError ends with its text and 2, an interrupt with 130, anything else with a hint and 1.

    Under `--json` the text is a document on standard output too.
    """
    debug = "--debug" in sys.argv
    sys.argv = _plugins_first([argument for argument in sys.argv if argument != "--debug"])
    signal.signal(signal.SIGTERM, _terminate)
    prepare_process()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' progress bars: in a file each is a thousand lines
    try:
        if document.FLAG in sys.argv:
            _run_for_script()
        else:
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


def _run_for_script() -> NoReturn:
    """Run the command; what the parser refuses, and an interrupt, become documents like every other error."""
    try:
        with redirect_stdout(sys.stdout):  # gives it back where a line was refused with --json read already
            code = app(standalone_mode=False)
    except Exception as error:
        document.give_back()  # so that this one is not written where an earlier line of this process has put it
        if not hasattr(error, "format_message"):
            raise
        raise UserError(error.format_message()) from error
    if code == 130:
        document.write_error("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


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
    world = place()
    if not world.speaks:
        _leave_it_to_the_first(error, code)
        word = f"{world}: {word}"
    complain(str(error), word)
    if not world.alone:
        _leave_within(_EXIT_SECONDS)
    sys.exit(code)


def _leave_within(seconds: float) -> None:
    """End the process by then even if an exchange with other ranks that never ends keeps it; that needs no Python."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        faulthandler.dump_traceback_later(seconds, exit=True, file=os.open(os.devnull, os.O_WRONLY))


def _leave_it_to_the_first(error: Exception, code: int) -> None:
    """Wait a moment before a process that is not the first says what has stopped it.

    What all of them meet, and what stops the whole job, the first one says; torchrun then ends the others meanwhile.
    """
    if isinstance(error, Interrupted):
        sys.exit(code)
    try:
        time.sleep(_GRACE_SECONDS)
    except KeyboardInterrupt:
        sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"thresher {version('thresher')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    plugins: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin",
            metavar="FILE.py",
            help="Import this module first, for your own rules or topologies; repeatable.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Global options; `main` sees the whole line, reads `--debug` and brings `--plugin` to its front, so that both may
    stand anywhere."""
    if plugins:
        from thresher.train.plugins import import_plugin

        for path in plugins:
            import_plugin(path)


if __name__ == "__main__":
    sys.path.pop(0)  # the root of the checkout, whose folders must not be found as `evaluate` or `cache`
    main()
