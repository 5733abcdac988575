"""How well a shard stores its rows, and the sums from which that and the statistics follow.

The error of decoding is measured on every row while it is encoded, and a shard whose error passes the gate stops the
harvest: a cache never holds rows worse than it says.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from thresher.cache.errors import UserError
from thresher.cache.stats import Sums


class Quality(NamedTuple):
    """How well one shard stores one site."""

    fvu: float
    """Fraction of the variance of kept rows that decoding does not give back."""
    median: float
    """The same of the median dimension."""
    worst: float
    """The same of the worst dimension; dimensions that hardly move are measured against the calibration's floor."""
    peak: float
    """Largest |z| of a stored row (int8z; 0 for bf16)."""
    special_fvu: float
    """FVU of special rows, 0 when none are stored."""


def _unexplained(sums: Sums, unit_D: np.ndarray | float) -> tuple[float, float, float]:
    """Squared error over squared deviation in all, of the median and of the worst dimension; zeros without rows.

    A dimension counts as moving at least by a millionth of what the median dimension does.
    """
    error_D, m2_D, tiny = sums.values[2] * np.square(unit_D), sums.moments().m2, float(np.finfo(np.float64).tiny)
    share_D = error_D / np.maximum(m2_D, max(1e-6 * float(np.median(m2_D)), tiny))
    return float(error_D.sum() / max(m2_D.sum(), tiny)), float(np.median(share_D)), float(share_D.max())


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


def quality(kept: Sums, special: Sums, unit_D: np.ndarray | float) -> Quality:
    """Quality of one site of a shard; `unit_D` [d] is what errors were measured in (σ for int8z, 1 for bf16)."""
    fvu, median, worst = _unexplained(kept, unit_D)
    peak = float(max(kept.peak[0], special.peak[0]))
    return Quality(fvu, median, worst, peak, _unexplained(special, unit_D)[0])
