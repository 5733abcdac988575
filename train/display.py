"""The live table of a training pass: one line per dictionary."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

_MOST_ROWS = 40


class TrainingDisplay:
    """Draws when told of news, at most a few times a second; a quiet console draws nothing."""

    def __init__(
        self, console: Console, title: str, names: Sequence[str], columns: Mapping[str, str] | None = None
    ) -> None:
        """`columns`: headings of further metrics, by key; a run that lacks one has an empty cell."""
        self.title = title
        self.columns = dict(columns or {})
        self.rows: dict[str, Mapping[str, Any] | None] = dict.fromkeys(names)
        self.failed: dict[str, str] = {}
        self.caption = ""
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._drawn = 0.0

    def __enter__(self) -> "TrainingDisplay":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.draw(force=True)
        self._live.stop()
        if not self._live.console.is_terminal:
            self._live.console.line()  # where nothing moves, the last table ends without a line break

    def progress(self, step: int, total: int, tokens_per_s: float, seconds_left: float) -> None:
        """Update the caption: steps done, tokens of the stream per second, time left."""
        minutes, seconds = divmod(round(seconds_left), 60)
        self.caption = f"step {step:,} of {total:,} · {tokens_per_s:,.0f} tokens/s · {minutes}:{seconds:02d} left"
        self.draw()

    def update(self, name: str, metrics: Mapping[str, Any]) -> None:
        """New numbers of one run."""
        self.rows[name] = metrics

    def fail(self, name: str, reason: str) -> None:
        """A run was set aside."""
        self.failed[name] = reason

    def draw(self, force: bool = False) -> None:
        """Redraw unless it was done a moment ago."""
        now = time.monotonic()
        if force or now - self._drawn > 0.3:
            self._live.update(self._table(), refresh=True)
            self._drawn = now

    def _table(self) -> Table:
        table = Table(title=self.title, caption=self.caption, title_justify="left", caption_justify="left")
        table.add_column("run")
        for column in ("step", *self.columns.values(), "FVU", "L0", "dead %", "lr"):
            table.add_column(column, justify="right")
        for name in list(self.rows)[:_MOST_ROWS]:
            row = self.rows[name]
            if name in self.failed:
                table.add_row(name, f"{row['step']:,}" if row else "", "[red]failed[/red]")
                continue
            if row is None:
                table.add_row(name)
                continue
            table.add_row(
                name,
                f"{row['step']:,}",
                *(f"{row[key]:.4f}" if key in row else "" for key in self.columns),
                f"{row['fvu']:.4f}",
                f"{row['l0']:.1f}",
                f"{100 * row['dead']:.1f}",
                f"{row['lr']:.1e}",
            )
        if len(self.rows) > _MOST_ROWS:
            table.add_row(f"… and {len(self.rows) - _MOST_ROWS} more")
        return table
