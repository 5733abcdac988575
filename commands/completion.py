"""What the shell offers after TAB: recipes, keys for --set, caches, run directories.

Every key press starts the program anew, so nothing here imports a stage, which would load PyTorch: keys and their
help are read from the source of the config classes. Where nothing is offered, the shell falls back to file names.
"""

import ast
import importlib.util
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from thresher.commands.tables import TABLES

_DEPTH = ("*", "*/*", "*/*/*")
"""Where runs are looked for below a folder: runs/NAME, runs/RECIPE/NAME, demo/runs/NAME."""

Offer = tuple[str, str]
"""A word and what is said of it; shells that show no help show the word."""


def recipes(incomplete: str) -> list[Offer]:
    """Bundled recipes, and recipe files of the folder being typed."""
    from thresher.recipes.reading import BUNDLED, bundled_names

    names = [(name, _about(BUNDLED / f"{name}.toml")) for name in bundled_names() if name.startswith(incomplete)]
    return names + [(str(path), "a recipe file") for path in _typed(incomplete, ("*.toml",))]


def keys(incomplete: str) -> list[Offer]:
    """`table.key=` of every table, with the first sentence of its help."""
    tables = [table for table in TABLES if f"{table}.".startswith(incomplete) or incomplete.startswith(f"{table}.")]
    offers = ((f"{table}.{key}=", text) for table in tables for key, text in fields(TABLES[table]))
    return [(key, _sentence(text)) for key, text in offers if key.startswith(incomplete)]


def tables(incomplete: str) -> list[str]:
    """Tables of a recipe."""
    return [table for table in TABLES if table.startswith(incomplete)]


def caches(incomplete: str) -> list[Offer]:
    """Caches in the folder being typed, or in the usual one."""
    usual = Path(os.environ.get("THRESHER_CACHE", "caches"))
    near = [path for path in sorted(usual.glob("*.zarr")) if str(path).startswith(incomplete)]
    return [(str(path), "a cache") for path in dict.fromkeys((*near, *_typed(incomplete, ("*.zarr", "*/*.zarr"))))]


def runs(incomplete: str) -> list[Offer]:
    """Run directories below the folder being typed: those with a config.json."""
    found = _typed(incomplete, tuple(f"{depth}/config.json" for depth in _DEPTH))
    return [(str(config.parent), "a run") for config in found]


def runs_or_recipes(incomplete: str) -> list[Offer]:
    """What `evaluate` takes."""
    return recipes(incomplete) + runs(incomplete)


def fields(place: str) -> Iterator[Offer]:
    """(key, help) of the config class at `module:Class`, those of its bases first, read from its source."""
    module, name = place.split(":")
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    body = ast.parse(Path(found.origin).read_text(encoding="utf-8")).body
    at = {node.name: f"{module}:{node.name}" for node in body if isinstance(node, ast.ClassDef)}
    for node in body:
        if isinstance(node, ast.ImportFrom):
            at |= {alias.name: f"{node.module}:{alias.name}" for alias in node.names}
    (own,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    for base in reversed(own.bases):
        if isinstance(base, ast.Name):
            yield from fields(at[base.id])
    for statement, following in itertools.pairwise([*own.body, ast.Pass()]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value.value if _is_text(following) else ""  # type: ignore[attr-defined]
            yield statement.target.id, " ".join(text.split())


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _typed(incomplete: str, patterns: tuple[str, ...]) -> list[Path]:
    """Paths of these patterns below the folder of what was typed, of those that begin with it."""
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)))
    return [path for path in found if str(path).startswith(incomplete)]


def _about(path: Path) -> str:
    """The recipe's `about`, without checking the rest of the file."""
    import tomllib

    return _sentence(str(tomllib.loads(path.read_text(encoding="utf-8")).get("about", "")))


def _sentence(text: str) -> str:
    return text.split(". ")[0].split(": ")[0][:70]
