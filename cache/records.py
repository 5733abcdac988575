"""Frozen dataclasses to and from plain dicts, strictly, with one fingerprint for all.

Recipes (TOML), run configurations and cache attributes (JSON) all pass through here, so an unknown key or a wrong
type gives the same kind of message everywhere: which field, what was expected, what came, and the nearest known key.

A field's help is the docstring under it: `described` reads it from the class's source for `thresher recipes keys`.
"""

import ast
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from thresher.cache.errors import UserError

T = TypeVar("T")


def canonical(value: object) -> bytes:
    """JSON as UTF-8 with sorted keys and no spaces: equal values give equal bytes. Refuses NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(value: object) -> str:
    """SHA-256 of `canonical(value)`, as 64 hex digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def to_dict(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON values (tuples become lists)."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(record)))


def from_dict(kind: type[T], raw: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a table; `where` names the table in messages.

    Raises UserError for an unknown or missing key and for a value of the wrong type. Checks across fields belong in
    the class's `__post_init__`, which raises UserError too.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in raw:
        if key not in fields:
            raise UserError(f"[{where}] has no key {key!r}.{nearest(key, fields)} Known keys: {', '.join(fields)}.")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in raw:
            raise UserError(f"[{where}] needs the key {name!r} ({_spelled(hints[name])}), and it is missing.")
    return kind(**{key: _checked(value, hints[key], f"{where}.{key}") for key, value in raw.items()})


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def override(raw: Mapping[str, Any], assignments: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested tables with dotted keys (`train.lr`) set. Raises UserError for a key without a table."""
    out = json.loads(json.dumps(raw))
    for dotted, value in assignments.items():
        *tables, key = dotted.split(".")
        if not tables:
            raise UserError(f"{dotted!r} names no table. Write table.key, for example train.lr=3e-4.")
        inner = out
        for table in tables:
            inner = inner.setdefault(table, {})
            if not isinstance(inner, dict):
                raise UserError(f"{dotted!r}: {table!r} is a value, not a table.")
        inner[key] = value
    return typing.cast(dict[str, Any], out)


def product(lists: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the lists in nested tables, as {dotted key: value}, first list slowest.

    A value that is not a list stands for a list of one. An empty mapping gives one empty combination.
    """
    flat = dict(flattened(lists))
    for key, values in flat.items():
        if isinstance(values, list) and not values:
            raise UserError(f"[sweep] {key} is an empty list: give at least one value, or remove it.")
    columns = [values if isinstance(values, list) else [values] for values in flat.values()]
    for row in itertools.product(*columns):
        yield dict(zip(flat, row, strict=True))


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """`key: expected …, got …` for every dotted key in which two nested tables differ."""
    want, have = dict(flattened(expected)), dict(flattened(got))
    lines = []
    for key in sorted(want.keys() | have.keys()):
        left, right = want.get(key, "nothing"), have.get(key, "nothing")
        if left != right:
            lines.append(f"{key}: expected {left!r}, got {right!r}")
    return lines


def described(kind: type) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, help) for every field of a config class."""
    hints = typing.get_type_hints(kind)
    helps = {name: text for owner in reversed(kind.__mro__[:-1]) for name, text in _field_docs(owner).items()}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            default = json.dumps(_plain(field.default))
        elif field.default_factory is not dataclasses.MISSING:
            default = json.dumps(_plain(field.default_factory()))
        else:
            default = "required"
        yield field.name, _spelled(hints[field.name]), default, helps.get(field.name, "")


def _field_docs(kind: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in itertools.pairwise(body.body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def flattened(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested tables under its dotted key, in order; an empty table counts as a value."""
    for key, value in tables.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _spelled(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(json.dumps(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " | ".join(_spelled(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        return f"list of {_spelled(args[0])}"
    if origin is dict:
        return f"table of {_spelled(args[1])}"
    if hint in (float, int, str, bool):
        return {float: "number", int: "integer", str: "string", bool: "true | false"}[hint]
    return getattr(hint, "__name__", str(hint))


def _checked(value: Any, hint: Any, where: str) -> Any:
    """The value converted to the hinted type (int to float, list to tuple), or UserError."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in args and any(type(value) is type(arg) and value == arg for arg in args):
            return value
        hint_text = nearest(value, [a for a in args if isinstance(a, str)]) if isinstance(value, str) else ""
        raise UserError(f"{where} is {value!r}; expected one of {_spelled(hint)}.{hint_text}")
    if origin in (Union, types.UnionType):
        for arg in args:
            if arg is type(None) and value is None:
                return None
            try:
                return _checked(value, arg, where)
            except UserError:
                continue
    elif origin is tuple:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(_checked(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(key): _checked(item, args[1], f"{where}.{key}") for key, item in value.items()}
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():  # 1e6 in TOML is a float
            return int(value)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise UserError(f"{where} is {value!r} ({type(value).__name__}); expected {_spelled(hint)}.")
