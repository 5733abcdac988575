"""Axes: which range is shown, where its ticks stand and what they say. Pure numbers; `svg` and the page place them.

Every range and tick of the page is computed here, also for the axes that its script switches to, so that the script
only multiplies and adds.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

FLOOR = 1e-4
"""Smallest value that a log axis shows; anything below is drawn at the axis."""
LARGE = 1024
"""From here on a cost axis counts 10k, 20k, 50k instead of in powers of two."""

Form = Callable[[float], str]


class Scale(NamedTuple):
    """One axis."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]
    """Value and text, rising."""

    def share(self, value: float) -> float:
        """Where a value stands from 0 (low) to 1 (high); outside that range beyond the ends."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def json(self) -> dict[str, Any]:
        return {"low": brief(self.low), "high": brief(self.high), "log": self.log, "ticks": self.ticks}


def brief(value: float) -> float:
    """Six digits: more than any screen shows, at half the bytes."""
    return float(f"{value:.6g}")


def plain(value: float) -> str:
    return f"{value:g}"


def percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def linear(values: Iterable[float], *, from_zero: bool = True, form: Form = plain) -> Scale:
    """A linear axis with air around the values, from zero where nothing is below it."""
    known = list(values)
    low, high = min(known), max(known)
    span = (high - low) or abs(high) or 1.0
    if from_zero and low >= 0:
        low, high = 0.0, high + 0.08 * (high or 1.0)
    else:
        low, high = low - 0.08 * span, high + 0.08 * span
    return Scale(low, high, False, tuple((tick, form(tick)) for tick in linear_ticks(low, high)))


def logarithmic(values: Iterable[float], form: Form = plain) -> Scale:
    """A log axis for losses: values below `FLOOR` count as `FLOOR`."""
    known = [max(value, FLOOR) for value in values]
    low, high = min(known), max(known)
    air = max((high / low) ** 0.08, 1.25)
    low, high = low / air, high * air
    return Scale(low, high, True, tuple((tick, form(tick)) for tick in log_ticks(low, high)))


def cost(values: Iterable[float], form: Form = plain) -> Scale:
    """A log axis for counts: ticks at powers of two, or at 1, 2, 5 times powers of ten for large ones."""
    known = [value for value in values if value > 0] or [1.0]
    low, high = min(known), max(known)
    air = max((high / low) ** 0.08, 1.25)
    low, high = low / air, high * air
    ticks = log_ticks(low, high) if high > LARGE or high / low > LARGE else powers_of_two(low, high)
    return Scale(low, high, True, tuple((tick, form(tick)) for tick in ticks))


def categories(names: Sequence[str], width: float, glyph: float = 6.2) -> Scale:
    """An axis of names at 0, 1, 2, …; so many of them labelled as fit `width` pixels at `glyph` pixels a letter."""
    every = max(1, math.ceil(len(names) * max(map(len, names)) * glyph / width))
    ticks = tuple((float(i), names[i]) for i in range(0, len(names), every))
    return Scale(-0.5, len(names) - 0.5, False, ticks)


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round values from low to high."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [brief(i * step) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values: dense within a decade, 1-2-5 for a few, powers of ten beyond."""
    decades = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if decades < 0.8 else (1, 2, 5) if decades < 3.2 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [brief(s * 10.0**p) for p in powers for s in steps if low <= s * 10.0**p <= high]


def powers_of_two(low: float, high: float) -> list[float]:
    """1, 2, 4, … inside a range; with other round values between when there are fewer than three."""
    ticks = [2.0**p for p in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    return ticks if len(ticks) >= 3 else log_ticks(low, high)
