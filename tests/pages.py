"""The pages of the documentation and their fenced blocks, and what holds of a command that is not run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer
import yaml

from thresher import cli
from thresher.commands.wiring import read_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PROGRAM = typer.main.get_command(cli.app)
FENCE = re.compile(r"^\s*```(\w*)\s*(?:\{([^}]*)\})?\s*$")


class Block(NamedTuple):
    """A fenced block."""

    page: str
    """The file's name without `.md`."""
    line: int
    """Of its first fence, from 1."""
    language: str
    flags: frozenset[str]
    """Words in braces behind the language: why it cannot run here, or whose test runs it."""
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}.md:{self.line}"


def nav() -> list[str]:
    """The pages that mkdocs.yml lists, in its order."""

    def leaves(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        else:
            for part in node.values() if isinstance(node, dict) else node:
                yield from leaves(part)

    return list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


def pages() -> list[Path]:
    """The README, then the pages as a reader meets them."""
    return [ROOT / "README.md", *(DOCS / name for name in nav())]


def blocks(path: Path) -> Iterator[Block]:
    """Every fenced block of a page."""
    start, head, body = 0, ("", ""), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if start and line.strip() == "```":
            yield Block(path.stem, start, head[0], frozenset((head[1] or "").split()), "\n".join(body) + "\n")
            start, body = 0, []
        elif start:
            body.append(line)
        elif line.lstrip().startswith("```"):
            fence = FENCE.match(line)
            assert fence, f"{path.name}:{number}: a fence that no test can read: {line}"
            start, head = number, fence.groups()
    assert not start, f"{path.name}:{start}: a block without an end"


def lines(block: Block) -> list[list[str]]:
    """The commands of a block, as words; comments are left out."""
    found = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
    return [words for words in found if words]


def check_command(words: list[str], under: str = "") -> None:
    """Raise unless the command exists below `under`, takes these options, and its recipe these keys.

    Of a recipe file only the keys are looked at; a pipe and what stands behind it are not.
    """
    assert words[0] == "thresher"
    words = [*words[1:], "|"]
    words = words[: min(words.index(mark) for mark in ("|", ">") if mark in words)]
    name, group = "", PROGRAM
    while hasattr(group, "commands"):
        if words[0].startswith("-"):
            assert words[0] in {option for parameter in group.params for option in parameter.opts}, words[0]
            return
        name, group = f"{name} {words[0]}".strip(), group.commands[words.pop(0)]
    assert name.startswith(under)
    with group.make_context(name, words) as context:  # raises for an option that is not there; gives stdout back
        given = context.params
    for parameter in group.params:
        value = given.get(parameter.name or "")
        if "RECIPE" in (getattr(parameter, "metavar", None) or "") and value:
            for recipe in [value] if isinstance(value, str) else value:
                if "/" not in recipe:
                    read_recipe("books-demo" if recipe.endswith(".toml") else recipe, given.get("assignments"))
