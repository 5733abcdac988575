"""What was measured, kept below .parity/ as it comes in, and the table of it in docs/interop.md.

python -m tests.parity.page        put the table between the markers of docs/interop.md
"""

import json
import platform
from typing import Any

import torch

from tests.parity.compare import Verdict
from tests.parity.environments import FOLDER, LATEST, ROOT
from tests.parity.variants import Variant

MEASURED = FOLDER / ("measured-latest.jsonl" if LATEST else "measured.jsonl")
PAGE = ROOT / "docs" / "interop.md"
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
WAYS = {"with_saebench.py": " (`to_saebench`)", "with_saelens_object.py": " (`to_saelens`)"}
HEAD = "| Package | As | Ours | Code | Output | L0 equal | L0 | Rechecked |\n|---|---|---|---|---|---|---|---|\n"


def record(variant: Variant, version: str, found: Verdict, *, silent: bool) -> None:
    """Keep one comparison."""
    row = {**variant._asdict(), "version": version, **found._asdict(), "passed": found.passed, "silent": silent}
    MEASURED.parent.mkdir(exist_ok=True)
    with MEASURED.open("a") as file:
        file.write(json.dumps(row) + "\n")


def rows() -> list[dict[str, Any]]:
    """The last comparison of every variant, ordered by package."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in MEASURED.read_text().splitlines():
        row = json.loads(line)
        found[row["version"], row["script"], row["runs"]] = row
    return [found[key] for key in sorted(found)]


def table() -> str:
    """The table and what it says of itself."""
    lines = []
    for row in rows():
        way = {"with_saebench.py": " (`to_saebench`)", "with_saelens_object.py": " (`to_saelens`)"}.get(
            row["script"], ""
        )
        again = f"{row['rechecked']}" + (f" ({row['undecided']} undecided)" if row["undecided"] else "")
        lines.append(
            f"| {row['version']}{way} | {row['reads_as']} | {row['runs']} | {row['code']:.1e} | {row['output']:.1e} | "
            f"{'yes' if row['l0_equal'] else '**no**'} | {row['l0']:.1f} | {again} |"
        )
    passed = sum(row["passed"] for row in rows())
    note = (
        f"\n{passed} of {len(lines)} pass; Python {platform.python_version()}, torch "
        f"{torch.__version__.split('+')[0]}, CPU, float32. Code and output: the largest difference over the largest "
        "value of its layer and block of rows; a pass is 1e-5. Rechecked: rows (of about 8,200) with a gate too close "
        "for float32, compared in float64; undecided: such a latent is on either side of it there too, for weights are "
        "rounded to float32 as they are written.\n"
    )
    return HEAD + "\n".join(lines) + "\n" + note


def main() -> None:
    """Replace what stands between the markers."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}{END}{after}")


if __name__ == "__main__":
    main()
