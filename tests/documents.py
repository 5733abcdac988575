"""What docs/terminal.md says of `--json`, for the tests of the commands to hold them to."""

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs/terminal.md"


def documented() -> dict[str, set[str]]:
    """By command: the keys of its document."""
    rows = re.findall(r"^\| `([a-z ]+)` \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {command: set(re.findall(r"`([a-z_]+)`", re.sub(r"\([^)]*\)", "", keys))) for command, keys in rows}


def document(command: str, text: str) -> dict[str, Any]:
    """`text` as the one JSON document of a command, with the keys that are documented and no others."""
    found: dict[str, Any] = json.loads(text)
    assert found.keys() == documented()[command]
    return found
