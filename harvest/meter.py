"""The progress line of a harvest."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from thresher.cache.layout import estimate_bytes
from thresher.cache.writer import CacheWriter


class Meter:
    """Shows the shard being filled, tokens/s, bytes written, time left."""

    def __init__(self, writer: CacheWriter, console: Console) -> None:
        self._plan, pending = writer.plan, writer.pending()
        self._total = self._bytes([(split, index) for split, index in pending])
        self._written, self._done, self._began = 0, 0, time.perf_counter()
        columns = ("{task.description}", BarColumn(), "{task.fields[rate]}", "{task.fields[written]}")
        self._progress = Progress(
            *(TextColumn(column) if isinstance(column, str) else column for column in columns),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        # Shards hold equal numbers of rows, not of contexts: their tokens are known on average.
        tokens = sum(
            self._plan.shard_rows_of(split, index) * sizes.contexts * sizes.tokens / sizes.rows
            for split, index in pending
            if (sizes := self._plan.splits[split]).rows
        )
        self._task = self._progress.add_task("harvest", total=tokens, rate="", written="")

    def __enter__(self) -> "Meter":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, split: str, index: int) -> None:
        """A shard is being filled."""
        self._progress.update(self._task, description=f"{split} {index + 1}/{self._plan.splits[split].shards}")

    def advance(self, tokens: int) -> None:
        """So many tokens went through the model."""
        self._done += tokens
        rate = self._done / (time.perf_counter() - self._began)
        self._progress.update(
            self._task,
            advance=tokens,
            rate=f"{rate:,.0f} tokens/s",
            written=f"{decimal(self._written)} of {decimal(self._total)}",
        )

    def committed(self, split: str, index: int) -> None:
        """A shard is on its way to the disk."""
        self._written += self._bytes([(split, index)])

    def _bytes(self, shards: Sequence[tuple[str, int]]) -> int:
        rows = sum(self._plan.shard_rows_of(split, index) for split, index in shards)
        return estimate_bytes(self._plan.sites, self._plan.codec, rows, 0, len(shards))
