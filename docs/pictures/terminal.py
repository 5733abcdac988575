"""Records the terminal pictures of the README and docs/terminal.md: `python docs/pictures/terminal.py FOLDER`.

Runs the real commands on the bundled model in FOLDER, keeps there what each of them wrote, escape codes and all
(a second call only draws), and writes it as SVG beside this file. rich is told that a terminal listens, but one on
which nothing moves, so that each display is written once, as it was at its end.
"""

import argparse
import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

HERE = Path(__file__).parent
WIDTH = 100
PICTURES = {
    "harvest": "thresher harvest books-demo",
    "train": "thresher train books-demo",
    "evaluate": "thresher evaluate books-demo --set evaluate.protocols=\"['cascade']\"",
    "cache": "thresher cache info caches/*.zarr",
    "help": "thresher --help",
}
"""By picture: what is typed."""
LONGEST = 46
"""Lines of a picture; the middle of a longer one is left out, and says so."""
TERMINAL = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "0"}
THEME = TerminalTheme(
    (24, 28, 36),
    (222, 226, 233),
    [(60, 66, 80), (240, 113, 120), (137, 202, 120), (229, 192, 123), (97, 175, 239), (198, 120, 221),
     (86, 182, 194), (200, 204, 212)],
    [(110, 118, 135), (255, 140, 145), (165, 224, 145), (245, 214, 150), (130, 195, 250), (220, 150, 240),
     (110, 205, 215), (255, 255, 255)],
)  # fmt: skip
SHEET = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: "Fira Code", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g>
</svg>
"""


def recorded(line: str, folder: Path) -> str:
    """What a command line writes to a terminal of `WIDTH` columns, in `folder`."""
    ours = str(Path(sys.executable).parent)  # where this environment's `thresher` is
    environment = os.environ | TERMINAL | {"COLUMNS": str(WIDTH), "PATH": f"{ours}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout


def picture(name: str, folder: Path) -> str:
    """The SVG of one picture."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    kept = folder / f"{name}.ansi"
    if not kept.exists():
        kept.write_text(recorded(PICTURES[name], folder), encoding="utf-8")
    console.print(f"[bold green]$[/] [bold]{PICTURES[name]}[/]", highlight=False)
    lines = kept.read_text(encoding="utf-8").strip("\n").splitlines()
    if len(lines) > LONGEST:
        cut = len(lines) - LONGEST + 1
        lines[LONGEST // 2 : LONGEST // 2 + cut] = [f"\x1b[2m… {cut} lines …\x1b[0m"]
    for line in lines:
        console.print(Text.from_ansi(line))
    return console.export_svg(title="", theme=THEME, code_format=SHEET, unique_id="t")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the commands run and what they write is kept")
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        path = HERE / f"terminal-{name}.svg"
        path.write_text(picture(name, folder), encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
