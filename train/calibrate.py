"""The last acts of training: BatchTopK's frozen threshold, and a held-out check of what was frozen.

The threshold of a rule that counts over a batch (BatchTopK, global) is the ⌊k·N⌋-th largest positive score over N
training rows, per source, or of a joint pool the ⌊k·N·L⌋-th over its L sources, measured on the folded dictionary as it
will be saved. Scores are pre-activations, times the decoder norm where that ranks latents. The threshold is exact,
mostly in one pass and never in more than three, from counts of bounded size: the first batch says about where it lies,
values in a narrow window there are counted by their bit patterns, those above by coarse bins. If the rank turns out to
lie outside, the counts say where the window belongs, and the rows are read again.

The check encodes held-out rows under the frozen rule and sums squared errors in float64.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.batches import Batches
from thresher.cache.contracts import Codes, side_by_side
from thresher.cache.errors import UserError
from thresher.cache.interrupts import StopFlag
from thresher.cache.source import Source
from thresher.train.counting import entries
from thresher.train.crew import Crew, Task
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.fold import ranked
from thresher.train.dictionary.rules import Deployed, facts
from thresher.train.mesh import Group

BATCH_ROWS = 4096
_BINS = 1 << 15  # upper halves of the bit patterns of positive float32 values
_PER_BIN = 1 << 16
_WINDOW = 11  # bins: about 2% to 4% to either side of the middle one
_L0_TOLERANCE = 0.1
"""Share by which a frozen rule's L0 may depart from training's before that is said: held-out text alone makes a few
per cent."""
PIECE = 1 << 24  # values looked at together, to bound what is copied


class RankSearch:
    """Finds the value of a given rank in a stream of blocks that may have to be shown up to three times.

    Positive floats order like their bit patterns. The upper halves of the patterns (32768 bins, under 1% wide each)
    say which bin holds the rank; in a window of a few bins the lower halves are counted too, which makes the value
    exact. Only counts are kept, however many values there are and however many of them are equal.
    """

    def __init__(self, k: float, group: Group | None = None) -> None:
        """Wanted: the ⌊k · N⌋-th largest positive value of N rows; `group`: ranks that are shown other columns of them,
        and look for it together."""
        self.k, self.group = k, group or Group()
        self._placed = False

    def _look(self, first: int, width: int, floor: int) -> None:
        """Start a pass: single values counted in `width` bins from `first`, bins from `floor` up."""
        self.first, self.width, self.floor = first, width, floor
        self.rows = 0
        self.bins = torch.zeros(_BINS, dtype=torch.int64)
        self.patterns = torch.zeros(width * _PER_BIN, dtype=torch.int64)
        self._placed = True

    def add(self, a_NF: Tensor) -> None:
        """Show the next block, float32."""
        assert a_NF.dtype == torch.float32
        if not self._placed:
            self._place(a_NF)
        self.rows += a_NF.shape[0]
        self.bins, self.patterns = self.bins.to(a_NF.device), self.patterns.to(a_NF.device)
        for bits in _bits_from(a_NF, self.floor):
            self.bins += torch.bincount(bits >> 16, minlength=_BINS)
            offset = bits - self.first * _PER_BIN
            inside = offset[(offset >= 0) & (offset < self.patterns.shape[0])]
            self.patterns.index_add_(0, inside, torch.ones_like(inside, dtype=torch.int64))  # few among many counters

    def result(self) -> float | None:
        """The value once all blocks were shown; None: the window missed it, show them all again."""
        self.group.add_up([self.bins, self.patterns])
        rank = entries(self.k, self.rows)
        if rank == 0:
            return float("inf")
        found = _holding(self.bins, rank)
        if found is None and self.floor == 0:
            return 0.0  # fewer positive values than wanted: everything positive fires
        if found is None:  # it lies below, most likely just below; the bins of all values settle it otherwise
            self._look(max(0, self.first - _WINDOW), _WINDOW, 0)
            return None
        index, above = found
        if not self.first <= index < self.first + self.width:
            self._look(index, 1, index)
            return None
        start = (index - self.first) * _PER_BIN
        exact = _holding(self.patterns[start : start + _PER_BIN], rank - above)
        assert exact is not None, "a bin and its patterns are counts of the same values"
        return _value(index * _PER_BIN + exact[0])

    def _place(self, a_NF: Tensor) -> None:
        """Put the window around the first block's own value of that rank; where it has none, count everything."""
        bins = torch.zeros(_BINS, dtype=torch.int64, device=a_NF.device)
        for bits in _bits_from(a_NF, 0):
            bins += torch.bincount(bits >> 16, minlength=_BINS)
        self.group.add_up([bins])
        found = _holding(bins, max(1, entries(self.k, a_NF.shape[0])))
        first = 0 if found is None else max(0, found[0] - _WINDOW // 2)
        self._look(first, _WINDOW, first)


def _bits_from(a_NF: Tensor, floor: int) -> Iterator[Tensor]:
    """Bit patterns, piece by piece, of the positive values in bins from `floor` up."""
    below = _value(max(0, floor * _PER_BIN - 1))
    for flat in a_NF.reshape(-1).split(PIECE):
        if flat.device.type == "cpu":  # numpy compacts faster there
            some = flat[torch.from_numpy(np.flatnonzero(flat.numpy() > below))]
        else:
            some = flat[flat > below]
        yield some.view(torch.int32)


def _holding(counts: Tensor, rank: int) -> tuple[int, int] | None:
    """Index of the count that holds the rank, from the top, and the sum of those above it; None: too few in all."""
    sums = counts.flip(0).cumsum(0)
    place = int((sums < rank).sum())
    if place == counts.shape[0]:
        return None
    index = counts.shape[0] - 1 - place
    return index, int(sums[place] - counts[index])


def _value(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


RowsOf = Callable[[int], Iterable[Mapping[str, Tensor]]]
"""So many training rows, about, in batches [N, D] by site; the same ones at every call."""


def calibrate(
    coders: Sequence[Coder],
    reader: Source,
    rows: int,
    device: torch.device,
    crew: Crew,
    stop: StopFlag,
    read: RowsOf | None = None,
    latents: Group | None = None,
) -> None:
    """Set the thresholds of all dictionaries whose rule asks for it, sharing each read of the training rows.

    `read`: the rows, where they are not the cache's. `latents`: ranks that share the latents, which stop together.
    Returns early, with thresholds unset, when a stop is requested.
    """
    group = latents or Group()
    searches = {
        pool: RankSearch(float(coders[pool.coder].spec.k or 0), group)
        for index, coder in enumerate(coders)
        if facts(coder.spec.firing).calibrated
        for pool in _pools(index, coder)
    }
    while searches and not group.any(stop.requested):
        sites = _sites_of(coders, searches)
        for acts in passes(reader, "train", sites, rows, device, _own(stop, group)) if read is None else read(rows):
            if group.any(stop.requested):
                return
            crew.run(
                [
                    Task(coders[p.coder].spec, BATCH_ROWS, functools.partial(_show, search, coders[p.coder], p, acts))
                    for p, search in searches.items()
                ]
            )
        for pool, search in list(searches.items()):
            threshold = search.result()
            if threshold is not None:
                for source in pool.sources:
                    encoder = coders[pool.coder].encoder(source)
                    assert isinstance(encoder.rule, Deployed)
                    score = torch.full_like(encoder.rule.threshold, threshold)
                    encoder.rule.threshold.copy_(ranked(score, encoder.norms))
                del searches[pool]


def _own(stop: StopFlag, group: Group) -> StopFlag:
    """What may end a rank's reading: among several nothing that the others do not know of."""
    return stop if group.alone else StopFlag()


class _Pool(NamedTuple):
    """Sources whose latents compete, and so have one threshold."""

    coder: int
    sources: tuple[int, ...]


def _pools(index: int, coder: Coder) -> list[_Pool]:
    sources = tuple(range(len(coder.inputs)))
    return [_Pool(index, sources)] if coder.spec.pool == "joint" else [_Pool(index, (source,)) for source in sources]


def _sites_of(coders: Sequence[Coder], pools: Iterable[_Pool]) -> list[str]:
    """All sites that the pools' sources read."""
    return [site for pool in pools for source in pool.sources for site in coders[pool.coder].inputs[source]]


def _show(search: RankSearch, coder: Coder, pool: _Pool, acts: Mapping[str, Tensor]) -> None:
    """Rows of all sources of a pool, one after the other: k of ⌊k·N·L⌋ rows is k per layer."""
    for source in pool.sources:
        encoder, x_ND = coder.encoder(source), side_by_side(acts, coder.inputs[source])
        block = encoder.workspace.block(x_ND.shape[0], encoder.W_enc)
        frame = coder.frame(x_ND)
        x_ND = x_ND if frame is None else frame.enter(x_ND)
        a_NF = encoder.preactivations(x_ND, coder.bias(source), block)
        search.add(a_NF if encoder.norms is None else a_NF.mul_(encoder.norms))


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
    coders: Sequence[Coder],
    reader: Source,
    rows: int,
    device: torch.device,
    crew: Crew,
    stop: StopFlag,
    latents: Group | None = None,
) -> list[HeldOut | None]:
    """Check all dictionaries in one pass; None for each when the cache has no held-out rows; `latents` as above."""
    group = latents or Group()
    split = next((name for name in ("validation", "test") if _rows(reader, name) > 0), None)
    if split is None:
        return [None for _ in coders]
    sums = [
        {
            name: torch.zeros(size, dtype=torch.float64, device=device)
            for name, size in (("error", len(c.writes)), ("variance", len(c.writes)), ("active", len(c.inputs)))
        }
        for c in coders
    ]
    sites = [site for coder in coders for site in (*coder.reads, *coder.writes)]
    count = 0
    for acts in passes(reader, split, sites, rows, device, _own(stop, group)):
        if not group.alone and group.any(stop.requested):
            break
        count += next(iter(acts.values())).shape[0]
        tasks = [
            Task(coder.spec, BATCH_ROWS, functools.partial(_measure, coder, acts, total))
            for coder, total in zip(coders, sums, strict=True)
        ]
        crew.run(tasks)
    group.add_up([total["active"] for total in sums])
    count = max(count, 1)
    return [HeldOut(split, count, (t["error"] / t["variance"]).tolist(), (t["active"] / count).tolist()) for t in sums]


def difference(check: HeldOut, trained_l0: Sequence[float]) -> str | None:
    """A sentence where L0 under the frozen rule is another than at the end of training, per source; None: it is not."""
    pairs = list(enumerate(zip(check.l0, trained_l0, strict=True)))
    apart = [
        f"{frozen:.4g} where training ended at {trained:.4g}" + (f" (source {source})" if len(pairs) > 1 else "")
        for source, (frozen, trained) in pairs
        if abs(frozen - trained) > _L0_TOLERANCE * max(trained, 1.0)
    ]
    if not apart:
        return None
    return f"Under the frozen rule L0 on held-out rows is {', '.join(apart)}."


def _measure(coder: Coder, acts: Mapping[str, Tensor], total: Mapping[str, Tensor]) -> None:
    codes: list[Codes] = [coder.encode(source, side_by_side(acts, sites)) for source, sites in enumerate(coder.inputs)]
    for source, part in enumerate(codes):
        total["active"][source] += (part.values > 0).sum()
    for destination, site in enumerate(coder.writes):
        y_NE = acts[site]
        guess_NE = coder.decode(destination, [codes[source] for source in coder.sources(destination)])
        total["error"][destination] += (y_NE - guess_NE).square().sum(dtype=torch.float64)
        total["variance"][destination] += (y_NE - coder.mean[destination]).square().sum(dtype=torch.float64)


def passes(
    reader: Source, split: str, sites: Iterable[str], rows: int, device: torch.device, stop: StopFlag
) -> Iterator[dict[str, Tensor]]:
    """Whole batches over up to `rows` rows of a split, each row once, always the same ones in the same order."""
    available = min(rows, _rows(reader, split))
    batch_rows = min(BATCH_ROWS, available)
    batches = Batches(
        reader,
        sites=list(dict.fromkeys(sites)),
        batch_rows=batch_rows,
        seed=0,
        split=split,
        end=available // batch_rows * batch_rows,
        device=device,
        interrupted=lambda: stop.raised,
    )
    try:
        for index, batch in enumerate(batches):
            yield batch.acts
            if stop.requested or index + 1 == available // batch_rows:
                return
    finally:
        batches.close()


def _rows(reader: Source, split: str) -> int:
    try:
        return reader.rows(split)
    except (KeyError, UserError):  # a cache without that split
        return 0
