"""`--json`: exactly one JSON document on standard output, everything that is said to people on standard error.

A command takes `as_json: Json = False` and ends with `if as_json: write(result)`. While it runs, standard output is
standard error, so that whatever a library prints cannot get into the document. An error becomes `{"error": text}`,
written by `cli.main`, with the exit code that it has without `--json`. docs/terminal.md lists the documents.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Set
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from thresher.cache.remote.place import ObjectPlace

FLAG = "--json"


class _Aside:
    """Where the document goes while standard output is elsewhere."""

    file: TextIO | None = None


def _turn_aside(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        _Aside.file = sys.stdout
        context.call_on_close(give_back)
        context.with_resource(redirect_stdout(sys.stderr))
    return wanted


def give_back() -> None:
    """Let documents go to standard output again."""
    _Aside.file = None


Json = Annotated[
    bool,
    typer.Option(
        FLAG, help="Print one JSON document, for scripts; all else goes to standard error.", callback=_turn_aside
    ),
]


def write(result: object) -> None:
    """The document of a command: a NamedTuple, a dataclass or plain values."""
    print(json.dumps(plain(result), indent=1, ensure_ascii=False, allow_nan=False), file=_Aside.file, flush=True)


def write_error(text: str) -> None:
    """The document of a command that failed."""
    print(json.dumps({"error": text}, ensure_ascii=False), file=_Aside.file, flush=True)


def plain(value: Any) -> Any:
    """JSON values: records become objects by field, paths text, numbers that are not finite null."""
    if isinstance(value, (Path, ObjectPlace)):
        return str(value)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Set):
        return [plain(inner) for inner in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
