"""The last acts of training: BatchTopK's frozen threshold, and a held-out check of what was frozen.

BatchTopK's threshold is the ⌊k·N⌋-th largest positive pre-activation over N training rows, per source, measured on the
folded dictionary as it will be saved. It is exact, in one pass and little memory: the first batch says about where the
threshold lies, and of all rows only the values in a narrow window there are kept, beside a count of those above. If
the rank turns out to lie outside, the window is moved and widened, and the rows are read again.

The check encodes held-out rows under the frozen rule and sums squared errors in float64.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.batches import Batches
from thresher.cache.contracts import Codes, UserError
from thresher.cache.interrupts import StopFlag
from thresher.cache.reader import CacheReader
from thresher.train.crew import Crew, Task
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.rules import Deployed

_BATCH_ROWS = 4096
_WINDOW = 0.02  # first half-width, as a share of the estimate


class RankSearch:
    """Finds the value of a given rank in a stream of blocks that may have to be shown more than once."""

    def __init__(self, k: float) -> None:
        """Wanted: the ⌊k · N⌋-th largest positive value of N rows."""
        self.k = k
        self.low = self.high = math.nan
        self.half_width = _WINDOW
        self._restart()

    def _restart(self) -> None:
        self.rows = self.above = 0
        self.kept: list[Tensor] = []

    def add(self, a_NF: Tensor) -> None:
        """Show the next block."""
        if math.isnan(self.low):
            self._place(a_NF)
        flat = a_NF.reshape(-1)
        self.rows += a_NF.shape[0]
        if flat.device.type == "cpu":  # numpy compacts faster there
            some = flat[torch.from_numpy(np.flatnonzero(flat.numpy() >= self.low))]
        else:
            some = flat[flat >= self.low]
        within = some <= self.high
        self.above += some.shape[0] - int(within.sum())
        self.kept.append(some[within])

    def result(self) -> float | None:
        """The value once all blocks were shown; None: the window missed it, show them all again."""
        rank = int(self.k * self.rows)
        values = torch.cat(self.kept)
        if rank == 0:
            return float("inf")
        if self.above < rank <= self.above + values.shape[0]:
            return float(torch.kthvalue(values, values.shape[0] - (rank - self.above) + 1).values)
        if self.low <= _TINY and rank > self.above + values.shape[0]:
            return 0.0  # fewer positive values than wanted: everything positive fires
        self._move(too_high=rank > self.above + values.shape[0])
        return None

    def _place(self, a_NF: Tensor) -> None:
        """Put the window around the first block's own value of that rank."""
        flat = a_NF.reshape(-1)
        rank = min(max(1, int(self.k * a_NF.shape[0])), flat.shape[0])
        centre = max(float(torch.kthvalue(flat, flat.shape[0] - rank + 1).values), _TINY)
        self.low, self.high = centre * (1 - self.half_width), centre * (1 + self.half_width)

    def _move(self, too_high: bool) -> None:
        self.half_width = min(0.5, 2 * self.half_width)
        if too_high:
            self.low, self.high = max(_TINY, self.low * (1 - 2 * self.half_width)), self.low
        else:
            self.low, self.high = self.high, self.high * (1 + 2 * self.half_width)
        self._restart()


_TINY = float(np.finfo(np.float32).tiny)


def calibrate(
    coders: Sequence[Coder], reader: CacheReader, rows: int, device: torch.device, crew: Crew, stop: StopFlag
) -> None:
    """Set the thresholds of all BatchTopK dictionaries, sharing each read of the training rows.

    Returns early, with thresholds unset, when a stop is requested.
    """
    searches = {
        (index, source): RankSearch(float(coder.spec.k or 0))
        for index, coder in enumerate(coders)
        if coder.spec.firing == "batchtopk"
        for source in range(len(coder.reads))
    }
    while searches and not stop.requested:
        sites = [coders[index].reads[source] for index, source in searches]
        for acts in passes(reader, "train", sites, rows, device, stop):
            crew.run(
                [
                    Task(coders[index].spec, _BATCH_ROWS, functools.partial(_show, search, coders[index], source, acts))
                    for (index, source), search in searches.items()
                ]
            )
        for (index, source), search in list(searches.items()):
            threshold = search.result()
            if threshold is not None:
                rule = coders[index].encoder(source).rule
                assert isinstance(rule, Deployed)
                rule.threshold.fill_(threshold)
                del searches[index, source]


def _show(search: RankSearch, coder: Coder, source: int, acts: Mapping[str, Tensor]) -> None:
    encoder = coder.encoder(source)
    x_ND = acts[coder.reads[source]]
    search.add(encoder.preactivations(x_ND, coder.bias(source), encoder.workspace.block(x_ND.shape[0], encoder.W_enc)))


class HeldOut(NamedTuple):
    """One dictionary under its frozen rule, each destination from clean inputs."""

    split: str
    """`validation`, or `test` when there is no validation split."""
    rows: int
    """Rows measured."""
    fvu: list[float]
    """Per destination: Σ‖y − ŷ‖² / Σ‖y − ȳ‖², ȳ the training mean, in raw units."""
    l0: list[float]
    """Per source: mean active latents per token."""


def held_out(
    coders: Sequence[Coder], reader: CacheReader, rows: int, device: torch.device, crew: Crew, stop: StopFlag
) -> list[HeldOut | None]:
    """Check all dictionaries in one pass; None for each when the cache has no held-out rows."""
    split = next((name for name in ("validation", "test") if _rows(reader, name) > 0), None)
    if split is None:
        return [None for _ in coders]
    sums = [
        {
            name: torch.zeros(size, dtype=torch.float64, device=device)
            for name, size in (("error", len(c.writes)), ("variance", len(c.writes)), ("active", len(c.reads)))
        }
        for c in coders
    ]
    sites = [site for coder in coders for site in (*coder.reads, *coder.writes)]
    count = 0
    for acts in passes(reader, split, sites, rows, device, stop):
        count += next(iter(acts.values())).shape[0]
        tasks = [
            Task(coder.spec, _BATCH_ROWS, functools.partial(_measure, coder, acts, total))
            for coder, total in zip(coders, sums, strict=True)
        ]
        crew.run(tasks)
    return [HeldOut(split, count, (t["error"] / t["variance"]).tolist(), (t["active"] / count).tolist()) for t in sums]


def _measure(coder: Coder, acts: Mapping[str, Tensor], total: Mapping[str, Tensor]) -> None:
    codes: list[Codes] = [coder.encode(source, acts[site]) for source, site in enumerate(coder.reads)]
    for source, part in enumerate(codes):
        total["active"][source] += (part.values > 0).sum()
    for destination, site in enumerate(coder.writes):
        y_NE = acts[site]
        guess_NE = coder.decode(destination, [codes[source] for source in coder.sources(destination)])
        total["error"][destination] += (y_NE - guess_NE).square().sum(dtype=torch.float64)
        total["variance"][destination] += (y_NE - coder.mean[destination]).square().sum(dtype=torch.float64)


def passes(
    reader: CacheReader, split: str, sites: Iterable[str], rows: int, device: torch.device, stop: StopFlag
) -> Iterator[dict[str, Tensor]]:
    """Whole batches over up to `rows` rows of a split, each row once, always the same ones in the same order."""
    available = min(rows, _rows(reader, split))
    batch_rows = min(_BATCH_ROWS, available)
    batches = Batches(
        reader, sites=list(dict.fromkeys(sites)), batch_rows=batch_rows, seed=0, split=split, device=device
    )
    try:
        for index, batch in enumerate(batches):
            yield batch.acts
            if stop.requested or index + 1 == available // batch_rows:
                return
    finally:
        batches.close()


def _rows(reader: CacheReader, split: str) -> int:
    try:
        return reader.rows(split)
    except (KeyError, UserError):  # a cache without that split
        return 0
