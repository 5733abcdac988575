"""A recipe file to checked tables and the variants of its sweep.

A recipe is TOML with one table per concern; every stage reads the tables it needs, so one file drives all of them.
`[sweep]` holds nested tables of lists, and their product is the set of dictionaries; several `[[sweep]]` blocks are
put side by side. Which tables exist and which class checks each is passed in, so this file knows no stage.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from thresher.cache.errors import UserError
from thresher.cache.records import canonical, flattened, from_dict, nearest, override, product, to_dict

BUNDLED = Path(__file__).parent

SWEEPABLE = ("dictionary", "train")
"""Tables a sweep may vary: the others change the cache, which a sweep shares."""

UNSTORED = ("reference",)
"""Tables that say something about the recipe and change nothing: no run stores them."""

ASIDE = ("pretrain",)
"""Tables that dictionaries do not depend on: left out of what a run stores where the recipe has none of them."""


class Variant(NamedTuple):
    """One point of the sweep."""

    label: str
    """Unique in the recipe: `transcoder-batch_topk-k16`; names run directories and table rows."""
    tables: dict[str, Any]
    """Every table, by name, as an instance of its class."""
    resolved: dict[str, Any]
    """The same as JSON values with every default written out, [reference] apart: what a run directory stores."""


class Recipe(NamedTuple):
    """A checked recipe."""

    name: str
    """The file's name without `.toml`."""
    about: str
    """One or two sentences for `recipes list`."""
    tables: dict[str, Any]
    """Every table without the sweep, by name, as an instance of its class; without variants, no [dictionary]."""
    variants: tuple[Variant, ...]
    """The plain recipe when there is no sweep; () for a recipe that only makes a target: [pretrain], and neither
    [dictionary] nor a sweep."""
    given: frozenset[str]
    """Tables that the file or an override has, `sweep` among them: the others are all defaults."""


def bundled_names() -> list[str]:
    """Names of the recipes that travel with the package, sorted."""
    return sorted(path.stem for path in BUNDLED.glob("*.toml"))


def find(name: str) -> Path:
    """The file that a path or the name of a bundled recipe means. Raises UserError with near misses."""
    path = Path(name)
    if path.is_file():
        return path
    bundled = BUNDLED / f"{name}.toml"
    if bundled.is_file():
        return bundled
    raise UserError(
        f"Recipe {name!r} is neither a file nor a bundled recipe.{nearest(name, bundled_names())} Give the path of a "
        "file or one of the names that `thresher recipes list` shows."
    )


def read(name: str, assignments: Sequence[str], tables: Mapping[str, type]) -> Recipe:
    """Read, override and check a recipe.

    `assignments` are `table.key=value` with the value in TOML (a bare word counts as a string); they win over the
    file, in its sweep too. `tables` maps each table name to the class that checks it.
    """
    path = find(name)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid TOML: {error}. Mend the file at that place.") from error
    about = raw.pop("about", "")
    sweep = raw.pop("sweep", {})
    fixed = parsed(assignments, tables)
    base = override(_known(raw, tables), fixed)
    blocks = sweep if isinstance(sweep, list) else [sweep]
    if "pretrain" in base and "dictionary" not in base and not sweep:
        tables, blocks = {name: kind for name, kind in tables.items() if name != "dictionary"}, []
    variants = _distinct(variant for block in blocks for variant in _variants(block, base, fixed, tables))
    _refuse_equal_labels(variants, path)
    given = frozenset(base) | ({"sweep"} if sweep else frozenset())
    return Recipe(path.stem, str(about), _built(base, tables, path.stem), variants, given)


def _known(raw: Mapping[str, Any], tables: Mapping[str, type]) -> Mapping[str, Any]:
    for key, value in raw.items():
        if key not in tables:
            raise UserError(
                f"A recipe has no table [{key}].{nearest(key, tables)} Known: {', '.join(tables)}, sweep; and the key "
                "about."
            )
        if not isinstance(value, Mapping):
            raise UserError(
                f"[{key}] is {value!r}; expected a table. Write [{key}] on a line of its own, keys below it."
            )
    return raw


def parsed(assignments: Sequence[str], tables: Mapping[str, type]) -> dict[str, Any]:
    """`table.key=value` texts as {dotted key: value}. Raises UserError for a text of another form.

    A text that is a JSON object holds several: {"train.lr": 3e-4} or {"train": {"lr": 3e-4}}, as programs write them.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        if text.lstrip().startswith("{"):
            values |= _of_object(text, tables)
            continue
        key, equals, value = text.partition("=")
        table = key.split(".")[0]
        if not equals or "." not in key:
            raise UserError(f"--set {text!r}: expected table.key=value, for example train.lr=3e-4.")
        if table not in tables:
            raise UserError(f"--set {text!r}: no table [{table}].{nearest(table, tables)} Known: {', '.join(tables)}.")
        try:
            values[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = value.strip()
    return values


def _of_object(text: str, tables: Mapping[str, type]) -> dict[str, Any]:
    """The assignments of a JSON object, nested or with dotted keys."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise UserError(f"--set {text!r} is no valid JSON: {error}. Write table.key=value instead.") from error
    values = {}
    for dotted, value in flattened(raw):
        table, _, key = dotted.partition(".")
        if not key or table not in tables:
            raise UserError(
                f"--set {text!r}: {dotted!r} is no key of a recipe.{nearest(table, tables)} Expected table.key, of "
                f"{', '.join(tables)}."
            )
        values[dotted] = value
    return values


def _variants(
    block: Mapping[str, Any], base: dict[str, Any], fixed: Mapping[str, Any], tables: Mapping[str, type]
) -> list[Variant]:
    lists = {key: value for key, value in block.items() if key != "name"}
    for table in lists:
        if table not in SWEEPABLE:
            raise UserError(
                f"[sweep] varies [{table}]; expected keys of {' or '.join(f'[{t}]' for t in SWEEPABLE)}, since all "
                "dictionaries of a sweep share one cache. Make another recipe for another cache."
            )
    found = []
    for row in product(lists):
        built = _built(override(base, {**row, **fixed}), tables, "recipe")
        varied = [key for key, value in row.items() if isinstance(_at(block, key), list) and key not in fixed]
        label = _label(block.get("name"), built, {key: row[key] for key in varied})
        left_out = {*UNSTORED, *(table for table in ASIDE if table not in base)}
        stored = {table: to_dict(value) for table, value in built.items() if table not in left_out}
        found.append(Variant(label, built, stored))
    return found


def _built(raw: Mapping[str, Any], tables: Mapping[str, type], name: str) -> dict[str, Any]:
    return {table: from_dict(kind, raw.get(table, {}), table) for table, kind in tables.items()}


def _at(tables: Mapping[str, Any], dotted: str) -> Any:
    value: Any = tables
    for key in dotted.split("."):
        value = value[key]
    return value


_BARE = ("kind", "firing", "objective", "mode")
"""Keys whose values say by themselves what they are."""


def _label(name: str | None, tables: Mapping[str, Any], varied: Mapping[str, Any]) -> str:
    """`kind-firing` (and `-kl-cascade` where it is trained so), or the block's name; then what it varies: `-k16`.

    A local objective has no mode.
    """
    dictionary, train = tables["dictionary"], tables["train"]
    local = getattr(train, "objective", "local") == "local"
    pieces = [name or f"{dictionary.kind}-{dictionary.firing}"]
    if name is None and not local:
        pieces.append(f"{train.objective}-{train.mode}")
    for dotted, value in varied.items():
        key = dotted.split(".")[-1]
        if key in _BARE and (name is None or (key == "mode" and local)):
            continue  # in the label already, or of no effect
        text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
        pieces.append(text if key in _BARE else f"{key}{text}")
    return "-".join(pieces).replace("/", "_").replace(" ", "")


def _distinct(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """Without repetitions: an override of a key that the sweep varies makes its points equal."""
    seen: dict[tuple[str, bytes], Variant] = {}
    for variant in variants:
        seen.setdefault((variant.label, canonical(variant.resolved)), variant)
    return tuple(seen.values())


def _refuse_equal_labels(variants: Sequence[Variant], path: Path) -> None:
    seen: set[str] = set()
    for variant in variants:
        if variant.label in seen:
            raise UserError(
                f"{path.name}: two dictionaries of the sweep are both called {variant.label!r}. Give each [[sweep]] "
                "block that repeats a kind and firing rule a name, such as name = 'wide'."
            )
        seen.add(variant.label)
