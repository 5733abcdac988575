"""How large an experiment is: as published, or quick.

Quick experiments train the same model for a fifth of the steps at ten times the rate and a quarter of the batch, on
fewer settings, and are judged with wider tolerances: they show in seconds that everything works.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Size:
    """What an experiment may spend."""

    quick: bool = False
    features: int = 100
    neurons: int = 50
    batch: int = 2048
    lr: float = 3e-3
    fraction: float = 1.0
    """Of the published number of steps."""
    samples: int = 1_000_000
    """Rows with an active feature behind a sampled loss, at most."""
    enough: float = 2e-4
    """Standard error of L/p at which sampling ends before that."""
    points: int = 100
    """Values of p along a curve, from 0.001 to 1."""
    seed: int = 0

    def steps(self, published: int, p: float | None = None) -> int:
        """Steps of a run; with `p`, as many more as make up for rows without an active feature (toy.md, marked *)."""
        filled = 1.0 if p is None else 1 - (1 - p) ** self.features
        return max(1, round(published * self.fraction / filled))

    def curve(self) -> list[float]:
        """Values of p to evaluate at, ascending."""
        return [float(p) for p in np.geomspace(0.001, 1, self.points)]

    def chosen(self, published: list[float], quick: list[float]) -> list[float]:
        """The settings of a sweep."""
        return quick if self.quick else published


FULL = Size()
QUICK = Size(quick=True, batch=512, lr=3e-2, fraction=0.2, samples=50_000, enough=1e-3, points=7)
