"""The console script: the program put together from its commands, its global options, how it ends.

Heavy imports sit inside the commands, so `thresher --help` is quick.
"""

import itertools
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.process import prepare_process
from thresher.commands import cache, demo, evaluate, harvest, interop, recipes, target, train
from thresher.commands.options import err

app = typer.Typer(
    help="Harvest a transformer's activations once, train every sparse dictionary from them, judge all of them "
    "under one protocol. A RECIPE is a TOML file or the name of a bundled one (thresher recipes list).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(harvest.harvest)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(interop.export)
app.command("import")(interop.import_)
app.command()(demo.demo)
app.add_typer(target.app, name="target")
app.add_typer(cache.app, name="cache")
app.add_typer(recipes.app, name="recipes")


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


if __name__ == "__main__":
    sys.path.pop(0)  # the root of the checkout, whose folders must not be found as `evaluate` or `cache`
    main()
