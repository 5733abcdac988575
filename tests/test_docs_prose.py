"""What pages say beside their blocks: links and pictures are there, messages are those of the program."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from tests.pages import DOCS, ROOT, nav, pages

PAGES = pages()
HEADINGS = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
ROOMS = ("cache", "commands", "evaluate", "harvest", "interop", "recipes", "sharing", "toy", "train")
ELSEWHERE = {"No space left": "the operating system's words"}


def without_blocks(path: Path) -> str:
    return re.sub(r"^\s*```.*?^\s*```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What GitHub and mkdocs call the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_of_a_page_are_there(page: Path) -> None:
    """And those of the site stay inside it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_blocks(page))):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.is_file(), f"{page.name}: {target}"
        assert page.parent == ROOT or path.is_relative_to(DOCS), f"{page.name}: {target} leaves the site"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


def test_the_site_lists_every_page_once() -> None:
    listed = nav()
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.name for page in DOCS.glob("*.md")}


def test_every_picture_is_shown_somewhere_and_drawn_by_a_script() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    scripts = "".join(script.read_text(encoding="utf-8") for script in (DOCS / "pictures").glob("*.py"))
    for picture in (DOCS / "pictures").glob("*.svg"):
        assert f"pictures/{picture.name})" in text, picture.name
        assert picture.stem.split("-")[-1] in scripts, picture.name


def test_diagrams_are_what_their_script_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("concepts", DOCS / "pictures/concepts.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "concepts.py"))
    script.main()
    drawn = list(tmp_path.glob("*.svg"))
    assert drawn
    for picture in drawn:
        assert picture.read_text() == (DOCS / "pictures" / picture.name).read_text(), picture.name


def texts() -> str:
    """All strings of the program, `…` where a value stands in them."""
    found: list[str] = []
    for path in [*ROOT.glob("*.py"), *(each for room in ROOMS for each in (ROOT / room).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_that_troubleshooting_explains_are_in_the_program() -> None:
    program = texts()
    assert len(HEADINGS) > 15
    missing = [heading for heading in HEADINGS if heading not in program and heading not in ELSEWHERE]
    assert not missing
