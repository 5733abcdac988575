"""Selections of fixed capacity: what a device needs that must not be asked how many entries there are.

Reading a number back makes the host wait until everything queued before it is done, and the device idle after it. So
on CUDA a selection has room for a number of entries known beforehand: exactly N·k for TopK, ⌊k·N⌋ for BatchTopK, and
for rules without a count what earlier steps needed and some more (`Room`). What is not used is padding behind the
entries that count: it has a pre-activation far below zero, so its code is 0, and so is its gradient.

A block with more entries than room is cut off and marked `overflowed`, a flag on the device, and the step's update has
to be left out like one whose loss is not finite; `Room` learns of it and the capacity grows.

How many latents are dead needs no guess: a counter that tells how long a latent was silent rises by no more than a
step's tokens, so an old count of those that come near says how many there can be now (`Forecast`).

Everything here is torch and runs on any device; kernels/triton/select.py does the same in fewer passes.
"""

import math
from collections import deque
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from thresher.train.kernels.sparse import ByLatent, Selection

PADDING = -1e30
"""The pre-activation of an entry that is none: below every threshold and every window, and finite."""


class Padded(Selection):
    """Entries at ascending flat positions, those past offsets[N] being padding."""

    def __init__(self, positions: Tensor, tokens: int, width: int, overflowed: Tensor | None = None) -> None:
        """positions [C] int64, ascending; padding stands at N · F."""
        end = tokens * width
        starts = torch.arange(0, end + 1, width, device=positions.device)
        super().__init__(positions % width, torch.searchsorted(positions, starts), width)
        self.positions = positions
        self.end = end
        self.overflowed = overflowed
        """Scalar bool on the device: entries had to be left out; None: impossible."""

    @property
    def real(self) -> Tensor:
        """[C] bool: the entries that are no padding."""
        return self.positions < self.end

    @cached_property
    def rows(self) -> Tensor:
        """[C] int64: the token of each entry; padding counts as the last one's."""
        return torch.div(self.positions, self.width, rounding_mode="floor").clamp_max(self.tokens - 1)

    @cached_property
    def by_latent(self) -> ByLatent:
        """The entries ordered by latent, padding behind all of them."""
        keys = torch.where(self.real, self.latents, self.width)
        ordered, order = torch.sort(keys.to(torch.int32), stable=True)
        latents = torch.arange(self.width + 1, dtype=torch.int32, device=keys.device)
        return ByLatent(order, self.rows.index_select(0, order), torch.searchsorted(ordered, latents))

    def take(self, a_NF: Tensor) -> Tensor:
        """[C]: the entries' values in a dense block, float32 or wider; padding gets `PADDING`."""
        values = a_NF.reshape(-1).take(self.positions.clamp_max(self.end - 1))
        return values.to(wide(a_NF.dtype)).masked_fill(~self.real, PADDING)


def must_not_ask(tensor: Tensor) -> bool:
    """Whether reading a number back from where this lies makes the host wait."""
    return tensor.device.type != "cpu"


def wide(dtype: torch.dtype) -> torch.dtype:
    """What selection computes in: float32 for every shorter format."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def topk(a_NF: Tensor, k: int) -> Padded:
    """The k largest of every row, latents ascending; full, so there is no padding."""
    tokens, width = a_NF.shape
    latents = torch.topk(a_NF, k, dim=1, sorted=False).indices.sort(dim=1).values
    starts = torch.arange(0, tokens * width, width, device=a_NF.device)
    return Padded((latents + starts[:, None]).view(-1), tokens, width)


def batch_topk(a_NF: Tensor, count: int) -> Padded:
    """The `count` largest positive entries of the block, ties to the lower position; padding if fewer are positive."""
    flat = a_NF.reshape(-1)
    if count == 0:
        return Padded(torch.empty(0, dtype=torch.int64, device=flat.device), *a_NF.shape)
    return Padded(_positions(best(flat, count), count), *a_NF.shape)


def above(a_NF: Tensor, floor: Tensor | float, capacity: int) -> tuple[Padded, Tensor]:
    """The first `capacity` entries above their floor ([F] or a number), and how many there are, on the device."""
    tokens, width = a_NF.shape
    mask = (a_NF > floor).reshape(-1)
    count = torch.count_nonzero(mask)
    return Padded(_positions(mask, capacity), tokens, width, count > capacity), count


def cut(
    parts: Sequence[tuple[Selection, Tensor]], count: int, scores: Sequence[Tensor] | None = None
) -> list[tuple[Selection, Tensor]]:
    """Selections of several blocks and their values [C], reduced to the `count` largest positive ones of all blocks.

    `scores` [C] of each block: what they compete by, if not the values. Of equal ones the earlier stays. If each part
    holds the `count` largest of its block, together they are now what `batch_topk` would have chosen from the blocks on
    top of each other.
    """
    compared = torch.cat([values for _, values in parts] if scores is None else list(scores))
    if compared.shape[0] <= count:
        return list(parts)
    keep = best(compared, count)
    out: list[tuple[Selection, Tensor]] = []
    for (old, own), mask in zip(parts, keep.split([own.shape[0] for _, own in parts]), strict=True):
        assert isinstance(old, Padded)
        out.append(only(old, own, mask, count))
    return out


def only(old: Padded, own: Tensor, mask: Tensor, count: int) -> tuple[Selection, Tensor]:
    """A selection and its values [C], reduced to the entries in a mask [C], `count` at most."""
    places = _positions(mask, min(own.shape[0], count))
    positions = torch.cat([old.positions, old.positions.new_full((1,), old.end)]).index_select(0, places)
    kept = torch.cat([own, own.new_full((1,), PADDING)]).index_select(0, places)
    return Padded(positions, old.tokens, old.width), kept


def best(flat: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` largest positive numbers, of equal ones the first."""
    edge = torch.topk(flat, count, sorted=False).values.min().clamp_min(0.0)
    keep = flat > edge
    tied = (flat == edge) & (edge > 0)
    return keep | (tied & (tied.cumsum(0, dtype=torch.int32) <= count - keep.sum()))


def _positions(mask: Tensor, capacity: int) -> Tensor:
    """[capacity] int64: ascending positions of the true entries, then the vector's length."""
    return torch.nonzero_static(mask, size=capacity, fill_value=mask.shape[0]).view(-1)


def rounded(count: int) -> int:
    """Up to one of eight sizes per octave, so that a step rarely meets a new one."""
    unit = 1 << max(count.bit_length() - 4, 0)
    return -(-count // unit) * unit


class Lagged:
    """Counts made on a device, in a queue until the device has long passed them."""

    LAG = 4
    """Counts between one and its use. By then nobody waits; and because the lag is a number and not a race, the same
    recipe takes the same decisions."""

    def __init__(self) -> None:
        self._counts: deque[tuple[Tensor, int]] = deque()
        self._arrivals: deque[torch.cuda.Event | None] = deque()

    def put(self, count: Tensor, note: int) -> None:
        """A count, a scalar on the device, and what is to be known beside it."""
        if count.device.type == "cuda":
            landed = torch.empty((), dtype=torch.int64, pin_memory=True)
            landed.copy_(count, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record()
            self._arrivals.append(arrival)
            count = landed
        else:
            self._arrivals.append(None)
        self._counts.append((count, note))

    def take(self) -> tuple[int, int] | None:
        """The oldest count and its note, once `LAG` are waiting."""
        if len(self._counts) < self.LAG:
            return None
        count, note = self._counts.popleft()
        arrival = self._arrivals.popleft()
        if arrival is not None:
            arrival.synchronize()
        return int(count), note

    def clear(self) -> None:
        """Forget all."""
        self._counts.clear()
        self._arrivals.clear()

    def listed(self) -> list[float]:
        """All that waits, for a checkpoint: count, note, count, note, …"""
        for arrival in self._arrivals:
            if arrival is not None:
                arrival.synchronize()
        return [float(number) for count, note in self._counts for number in (int(count), note)]

    def restore(self, listed: Sequence[float]) -> None:
        """Put back what `listed` gave."""
        self.clear()
        for count, note in zip(listed[::2], listed[1::2], strict=True):
            self.put(torch.tensor(int(count)), int(note))


class Room(nn.Module):
    """How many entries the next selection may hold, from the counts of earlier ones.

    Until the first count is read the step goes dense, which holds any number. The state is saved with the weights, so a
    resumed run decides likewise.
    """

    LAG = Lagged.LAG
    """Selections between a count and its use."""
    MARGIN = 1.25
    """Capacity over the largest count remembered."""
    DECAY = 0.98
    """What of the remembered count is left after each selection."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0.0
        """Entries per token, the largest of late; 0: not known."""
        self._counts = Lagged()

    def capacity(self, tokens: int, width: int, dense_share: float) -> int | None:
        """Entries that a block of [tokens, width] gets room for; None: a selection would not pay, or none is known."""
        old = self._counts.take()
        if old is not None:
            self.peak = max(old[0] / old[1], 1 / old[1], self.DECAY * self.peak)
        if self.peak == 0.0:
            return None
        capacity = rounded(math.ceil(self.MARGIN * self.peak * tokens) + 64)
        return capacity if capacity <= dense_share * tokens * width else None

    def note(self, count: Tensor, tokens: int) -> None:
        """A selection's count, a scalar on the device."""
        self._counts.put(count, tokens)

    def get_extra_state(self) -> Tensor:
        """[1 + 2·pending] float64: the peak, then counts and tokens not yet used."""
        return torch.tensor([self.peak, *self._counts.listed()], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Put back what `get_extra_state` gave."""
        self.peak, *pending = state.tolist()
        self._counts.restore(pending)


class Forecast(nn.Module):
    """How many latents can be dead by now, from older counts: an upper bound, known without asking.

    A step adds its tokens to the counter of every latent that did not fire. So whoever counts as dead within the next H
    tokens now lacks H or less, and a count of those bounds every count to come until H tokens have passed. A count of
    each step is read `Lagged.LAG` steps later, which is why the bound is close: a little more than a step's tokens old.

    `tokens` is the clock. What is known is thrown away when it is too old (a batch far larger than those before), and
    by CPU training, which asks. Then there is room for all latents until the next count arrives. The state is saved
    with the weights, so a resumed run decides likewise. Counters that are set from outside have to be told (`recount`).
    """

    def __init__(self, dead_after: int) -> None:
        super().__init__()
        self.dead_after = dead_after
        self._tokens = 0
        self._known: tuple[int, int] | None = None
        """How many at most, and until when."""
        self._counts = Lagged()

    def most(self, silent_F: Tensor, tokens: int) -> int:
        """Latents that may be dead in a batch of so many tokens; silent_F: tokens since each fired."""
        if not self.known:
            self._count(silent_F, tokens)
        return self._known[0] if self._known is not None and self.known else silent_F.shape[0]

    def capacity(self, silent_F: Tensor, tokens: int) -> int:
        """Latents that room is made for; 0: none can be dead."""
        most = self.most(silent_F, tokens)
        return min(rounded(most), silent_F.shape[0])

    def advance(self, silent_F: Tensor, tokens: int) -> None:
        """Go on by a step, after which the counters are these; each rose by `tokens` at most."""
        if not must_not_ask(silent_F):
            self.forget()
            return
        self._tokens += tokens
        self._count(silent_F, tokens)

    def recount(self, silent_F: Tensor) -> None:
        """Count now, and wait for it: not within a step."""
        self._counts.clear()
        horizon = self.dead_after - 1
        self._known = int(self._near(silent_F, horizon)), self._tokens + horizon

    def forget(self) -> None:
        """Know nothing."""
        self._known = None
        self._counts.clear()

    def _count(self, silent_F: Tensor, tokens: int) -> None:
        horizon = self._counts.LAG * tokens
        self._counts.put(self._near(silent_F, horizon), self._tokens + horizon)
        self._known = self._counts.take() or self._known

    def _near(self, silent_F: Tensor, horizon: int) -> Tensor:
        return torch.count_nonzero(silent_F >= self.dead_after - horizon)

    @property
    def known(self) -> bool:
        """Whether there is a bound that still holds."""
        return self._known is not None and self._known[1] >= self._tokens

    def get_extra_state(self) -> Tensor:
        """float64: the clock, then (how many, until when) of what is known and of what waits; −1 for nothing known."""
        known = (-1, -1) if self._known is None else self._known
        return torch.tensor([self._tokens, *known, *self._counts.listed()], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Put back what `get_extra_state` gave."""
        clock, most, until, *pending = state.tolist()
        self._tokens = int(clock)
        self._known = None if most < 0 else (int(most), int(until))
        self._counts.restore(pending)
