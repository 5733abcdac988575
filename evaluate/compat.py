"""Explained variance as other tools define it: kept apart, batch by batch as they take it, and never ranked.

Each is a mean over batches of a ratio, so it depends on how many tokens a batch holds, which is recorded beside it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from thresher.evaluate.metrics import Errors

COMPAT = ("ev_legacy_token", "fve_centred", "ev_second_moment")
"""Explained variances as other tools define them, means over batches; see `results.DEFINITIONS`."""


class BatchTruth(NamedTuple):
    """What those need to know of the true activations of one batch."""

    centred2: Tensor
    """[N] ‖y − ȳ‖² by row, ȳ the batch's mean."""
    mean2: Tensor
    """Mean ‖y‖² over rows."""
    variance: Tensor
    """Σ_d var(y_d), unbiased."""
    width: int


def batch_truth(y_NE: Tensor) -> BatchTruth:
    """Of one batch of rows."""
    y_NE = y_NE.double()
    centred2_NE = (y_NE - y_NE.mean(0)).square()
    rows = max(y_NE.shape[0] - 1, 1)
    return BatchTruth(centred2_NE.sum(1), y_NE.square().sum(1).mean(), centred2_NE.sum() / rows, y_NE.shape[1])


def compat(truth: BatchTruth, errors: Errors) -> Tensor:
    """[3] `COMPAT` of one batch, float64; NaN or infinite where a batch leaves one undefined.

    Their formulas stand in `results.DEFINITIONS`.
    """
    rows = errors.squares.shape[0]
    residual_variance = (errors.by_dim - errors.total.square() / rows).sum() / max(rows - 1, 1)
    second = truth.mean2 - (truth.mean2 / truth.width).square()
    return torch.stack(
        [
            (1 - errors.squares / truth.centred2).mean(),
            1 - residual_variance / truth.variance,
            1 - errors.squares.mean() / second,
        ]
    )
