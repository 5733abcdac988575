"""How well a shard stores its rows, and the sums from which that and the statistics follow.

The error of decoding is measured on every row while it is encoded, and a shard whose error passes the gate stops the
harvest: a cache never holds rows worse than it says.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from thresher.cache import stats
from thresher.cache.codec import LEVELS
from thresher.cache.contracts import Site, UserError
from thresher.cache.stats import Moments

WidthGroups = Mapping[int, Sequence[Site]]
"""Sites of equal width, which are added up side by side."""


class Quality(NamedTuple):
    """How well one shard stores one site."""

    fvu: float
    """Fraction of the variance of kept rows that decoding does not give back."""
    worst: float
    """The same of the worst dimension; dimensions that hardly move are measured against the calibration's floor."""
    peak: float
    """Largest |z| of a stored row (int8z; 0 for bf16)."""
    special_fvu: float
    """FVU of special rows, 0 when none are stored."""


def unexplained(error_D: np.ndarray, m2_D: np.ndarray) -> tuple[float, float]:
    """Squared error over squared deviation: in all, and of the worst dimension (floor: a millionth of the median)."""
    tiny = float(np.finfo(np.float64).tiny)
    floor_D = np.maximum(m2_D, max(1e-6 * float(np.median(m2_D)), tiny))
    return float(error_D.sum() / max(m2_D.sum(), tiny)), float((error_D / floor_D).max())


def check_gate(codec: str, where: str, quality: Mapping[str, Quality], gate: float) -> None:
    """Raise UserError when a site was stored worse than the gate allows."""
    name, q = max(quality.items(), key=lambda item: max(item[1].fvu, item[1].worst))
    if max(q.fvu, q.worst) <= gate:
        return
    other = "bf16" if codec == "int8z" else "int8z"
    raise UserError(
        f"site {name!r} loses too much in codec {codec!r}: in {where} the stored rows leave {q.fvu:.2e} of the "
        f"variance unexplained ({q.worst:.2e} in the worst dimension), expected at most harvest.fvu_gate = {gate:.0e}. "
        f'Harvest with codec = "{other}", or raise the gate if that error is acceptable. The shards committed before '
        f"stay valid."
    )


class Tally:
    """Moments, error and peak of the rows of one class (kept or special), by site width, all sites of one stacked."""

    def __init__(self) -> None:
        self._moments: dict[int, Moments] = {}
        self._error_SD: dict[int, np.ndarray] = {}
        self._peak_S: dict[int, np.ndarray] = {}

    def add(self, width: int, moments: Moments, error_SD: np.ndarray, scale_SN: np.ndarray | None) -> None:
        """Add a block: its moments, its squared errors by dimension, and the scales of its rows (int8z)."""
        if width in self._moments:
            moments = self._moments[width].merge(moments)
            error_SD = self._error_SD[width] + error_SD
        self._moments[width], self._error_SD[width] = moments, error_SD
        if scale_SN is not None:
            peak_S = scale_SN.max(axis=1) * LEVELS
            self._peak_S[width] = np.maximum(self._peak_S.get(width, peak_S), peak_S)

    def moments(self, groups: WidthGroups) -> dict[str, Moments]:
        """By site; no rows where nothing was added."""
        return {
            site.name: self._moments[width].site(i) if width in self._moments else stats.empty(width)
            for width, sites in groups.items()
            for i, site in enumerate(sites)
        }

    def unexplained(self, width: int, index: int) -> tuple[float, float]:
        """(FVU, worst dimension) of one site; (0, 0) without rows."""
        if width not in self._moments:
            return 0.0, 0.0
        return unexplained(self._error_SD[width][index], self._moments[width].m2[index])

    def peak(self, width: int, index: int) -> float:
        """Largest |z| of one site, 0 without rows or scales."""
        return float(self._peak_S[width][index]) if width in self._peak_S else 0.0


def quality(kept: Tally, special: Tally, groups: WidthGroups) -> dict[str, Quality]:
    """Quality of every site of a shard."""
    out = {}
    for width, sites in groups.items():
        for i, site in enumerate(sites):
            fvu, worst = kept.unexplained(width, i)
            special_fvu, _ = special.unexplained(width, i)
            out[site.name] = Quality(fvu, worst, max(kept.peak(width, i), special.peak(width, i)), special_fvu)
    return out
