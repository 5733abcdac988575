"""The commands that docs/training.md shows do what the page says, and what another page says it leaves there."""

import json
import re
from pathlib import Path

from tests.program import SMALL, thresher

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
METHODS = PAGE.with_name("methods.md")
SHORT = (*SMALL, "dictionary.expansion=1")


def test_the_commands_of_the_page_work(tmp_path: Path) -> None:
    block, *_ = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    said = {}
    for line in block.splitlines():
        program, *arguments = line.split()
        assert program == "thresher"
        done = thresher(tmp_path, *arguments, sets=SHORT)
        assert done.returncode == 0, done.stdout + done.stderr
        said[line.split()[-1]] = done.stdout
    assert "Bound by" in said["books-demo"]
    assert "numba" in said["train.micro_rows=1024"]
    assert "numba" not in said["train.kernels=plain"]
    assert list((tmp_path / "runs/traced").glob("*/profile/*.pt.trace.json.gz"))
    settings = [
        json.loads(path.read_text())["training"]["settings"]["micro_rows"]
        for path in (tmp_path / "runs/parts").glob("*/config.json")
    ]
    assert set(settings) == {1024}


def test_the_page_points_to_sections_of_the_equations_and_repeats_none_of_their_tables() -> None:
    page, methods = PAGE.read_text(encoding="utf-8"), METHODS.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", methods, re.MULTILINE)
    sections = {heading.lower().replace(" ", "-") for heading in headings}
    pointed = set(re.findall(r"\(methods\.md#([^)]+)\)", page))
    assert {"firing-rules", "topologies", "penalties", "optimisers", "end-to-end"} <= pointed <= sections
    rows = [set(re.findall(r"^\| (`[^|]+?) \|", text, re.MULTILINE)) for text in (page, methods)]
    assert rows[0], "the page has tables of its own"
    assert not rows[0] & rows[1]
