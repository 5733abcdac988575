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
        self._writer, self._plan, pending = writer, writer.plan, writer.pending()
        self._left, self._mine = set(pending), set[tuple[str, int]]()
        self._total = self._bytes([(split, index) for split, index in pending])
        self._written, self._done, self._began = 0, 0, time.perf_counter()
        columns = ("{task.description}", BarColumn(), "{task.fields[rate]}", "{task.fields[written]}")
        self._progress = Progress(
            *(TextColumn(column) if isinstance(column, str) else column for column in columns),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        tokens = sum(map(self._tokens, pending))
        self._task = self._progress.add_task("harvest", total=tokens, rate="", written="")

    def __enter__(self) -> "Meter":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, split: str, index: int) -> None:
        """A shard is being filled."""
        self._mine.add((split, index))
        self._count_others()
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

    def idle(self) -> None:
        """All that is left is in the hands of other processes."""
        self._count_others()
        self._progress.update(self._task, description="waiting for other processes")

    def committed(self, split: str, index: int) -> None:
        """A shard is on its way to the disk."""
        self._written += self._bytes([(split, index)])

    def _count_others(self) -> None:
        """Take what other processes committed meanwhile as done."""
        left = set(self._writer.pending())
        others = [shard for shard in self._left - left if shard not in self._mine]
        self._left = left
        self._written += self._bytes(others)
        self._progress.update(self._task, advance=sum(map(self._tokens, others)))

    def _tokens(self, shard: tuple[str, int]) -> float:
        """Tokens of a shard, on average: shards hold equal numbers of rows, not of contexts."""
        sizes = self._plan.splits[shard[0]]
        return self._plan.shard_rows_of(*shard) * sizes.contexts * sizes.tokens / sizes.rows

    def _bytes(self, shards: Sequence[tuple[str, int]]) -> int:
        rows = sum(self._plan.shard_rows_of(split, index) for split, index in shards)
        return estimate_bytes(self._plan.sites, self._plan.codec, rows, 0, len(shards))
