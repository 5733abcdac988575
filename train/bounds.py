"""What bounds a training run: one line, once there is a minute of it.

The time that has passed is divided into waiting for rows, transfer, the encoders' matrix products, the rest of the
steps, updates, and whatever else happened between the steps (logging, checkpoints, the host being late).

On a CPU several dictionaries may step at the same time, so the time in which steps ran is divided in the proportion of
the threads' seconds. On CUDA products and updates are the device's own seconds. What lay between two steps there is
reading as far as the host, too, was waiting for rows; the remainder is the device waiting for a copy: transfer.
"""

from typing import Literal, NamedTuple

import torch

from thresher.train.stages import Clock, Seconds

Part = Literal["reading", "transfer", "matmul", "rest", "update", "other"]

_AFTER_S = 60.0
_WARM_UP_STEPS = 3

_WORDS: dict[Part, tuple[str, str]] = {
    "reading": ("waiting for rows", "reading: more dictionaries per pass would cost little, a faster disk would help"),
    "transfer": ("transfer", "transfer: more dictionaries per pass would cost little"),
    "matmul": ("encoder matmul", "the encoders' matrix products, which cannot be left out"),
    "rest": ("rest of the step", "the sparse part of the step: selection, decoding, losses, gradients"),
    "update": ("update", "the optimiser's memory traffic: larger batches would help"),
    "other": ("between steps", "work between the steps: logging, checkpoints"),
}


class Shares(NamedTuple):
    """Shares of the elapsed time; they sum to 1."""

    reading: float
    transfer: float
    matmul: float
    rest: float
    update: float
    other: float

    @property
    def bound(self) -> Part:
        """The largest."""
        return max(_WORDS, key=lambda part: float(getattr(self, part)))


def shares(elapsed: float, stepping: float, seconds: Seconds, cuda: bool) -> Shares:
    """Divide `elapsed` seconds, in `stepping` of which the host was busy with steps."""
    host, device = seconds
    task = device.get("task", 0.0)
    reading, transfer = host.get("read", 0.0), host.get("transfer", 0.0)
    if cuda:
        gap = device.get("read", 0.0)
        reading = min(reading, gap)
        transfer, stepping = device.get("transfer", 0.0) + gap - reading, task
    scale = stepping / task if task > 0 else 0.0
    matmul, update = (scale * device.get(name, 0.0) for name in ("encode", "update"))
    parts = [reading, transfer, matmul, max(0.0, stepping - matmul - update), update]
    whole = max(elapsed, sum(parts), 1e-9)
    return Shares._make(part / whole for part in (*parts, max(0.0, whole - sum(parts))))


def sentence(found: Shares, seconds: float) -> str:
    """The line for the user, the largest share first."""
    order = sorted(_WORDS, key=lambda part: -float(getattr(found, part)))
    listed = ", ".join(f"{100 * getattr(found, part):.0f} % {_WORDS[part][0]}" for part in order)
    return f"Time over {seconds:.0f} s: {listed}. Bound by {_WORDS[found.bound][1]}."


class Bounds:
    """Watches a pass until it has said what bounds it."""

    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self.clock = clock or Clock(device)
        self._cuda = device.type == "cuda"
        self._steps = 0
        self._stepping = 0.0
        self.said = False

    def stepped(self, seconds: float) -> str | None:
        """All dictionaries took a step, which kept the host busy so long; the line once it is due."""
        self._steps += 1
        self._stepping += seconds
        if self._steps == _WARM_UP_STEPS:  # the first ones compile, take memory and fill queues
            self.clock.reset()
            self._stepping = 0.0
        return self.line() if self.clock.elapsed >= _AFTER_S and self._steps > _WARM_UP_STEPS else None

    def line(self) -> str | None:
        """The line, unless it was said or nothing was measured."""
        elapsed = self.clock.elapsed
        if self.said or self._steps == 0 or self._stepping <= 0:
            return None
        self.said = True
        return sentence(shares(elapsed, self._stepping, self.clock.seconds(), self._cuda), elapsed)
