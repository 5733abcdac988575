"""Loss per feature, L/p: the mean squared error over rows and outputs, divided by the share of active features.

`sampled` draws evaluation rows from their own stream, always from its start: equal settings give equal numbers, and
training is not moved. Rows with one active feature need no forward pass (see `inputs`): only those with several are
computed. The sampling error is the standard deviation of a row's loss over √rows, divided by p too.

`single_active` needs no sampling: with d_j± = relu(±W_in[j]) W_out,

    L/p = (1 / 6D) Σ_j (‖e_j + σ M[:, j] - d_j⁺‖² + ‖σ M[:, j] + d_j⁻‖²)        (toy.md §3)

since a squared value has the mean 1/3 and either sign half of the rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.toy.inputs import DENSE_FROM, Inputs, draw_active, draw_rows, stream
from thresher.toy.model import Weights, rays
from thresher.toy.training import loss_of

SAMPLES = 1_000_000
"""Rows with an active feature that a loss is the mean over, about."""
CHUNK_ROWS = 100_000
ENOUGH = 2e-4
"""Sampling ends early, after a chunk, once no model's L/p has a larger standard error."""
PASS_ROWS = 4096
"""Rows of one forward pass: what it touches stays in the cache."""


class Loss(NamedTuple):
    """L/p of one model, with all that must travel with the number."""

    value: float
    error: float
    """Its standard error; 0 where nothing was sampled."""
    mode: str
    p: float
    """Share of active features."""
    rows: int
    """Sampled; 0 where nothing was."""

    def record(self) -> dict[str, float | str | int]:
        """By field, as `loss` instead of `value`: a line of a table."""
        return {"loss": self.value, **{name: getattr(self, name) for name in ("error", "mode", "p", "rows")}}


class Target(NamedTuple):
    """The label map of one model."""

    mixing: Tensor
    """M [D, D]."""
    scale: float
    """σ."""


def single_active(weights: Weights, target: Target) -> list[Loss]:
    """Exact L/p of every model under single-active inputs."""
    up_KD, down_KD = _unit_losses(weights, target)
    features = up_KD.shape[1]
    values = (up_KD + down_KD).sum(1) / 6
    return [Loss(float(value), 0.0, "single", 1 / features, 0) for value in values]


def sampled(
    models: Sequence[tuple[Weights, Target]],
    inputs: Inputs,
    *,
    seed: int,
    samples: int = SAMPLES,
    enough: float = ENOUGH,
) -> list[Loss]:
    """L/p of stacks of models, each with its label map, all on the same rows; in order, stack by stack.

    Of `samples` / (share of rows with an active feature) rows; of fewer where the standard error is `enough` before.
    """
    rows = max(1, round(samples / inputs.filled))
    rng = stream(seed, "evaluation")
    sums = [torch.zeros(2, weights.models, dtype=torch.float64) for weights, _ in models]
    units = [tuple(loss.double() for loss in _unit_losses(*model)) for model in models]
    dense = inputs.p is not None and inputs.p >= DENSE_FROM
    done = 0
    while done < rows and not (done and _largest_error(sums, done, inputs) <= enough):
        count = min(rows - done, CHUNK_ROWS)
        done += count
        if dense:
            for low in range(0, count, PASS_ROWS):
                x_RD = torch.from_numpy(draw_rows(inputs, min(PASS_ROWS, count - low), rng))
                _add_rows(sums, models, x_RD)
            continue
        active = draw_active(inputs, count, rng)
        counts = np.bincount(active.row, minlength=count)
        alone = counts[active.row] == 1
        for own, unit in zip(sums, units, strict=True):
            _add_alone(own, unit, active.column[alone], active.value[alone].astype(np.float64))
        several = np.cumsum(counts >= 2) - 1
        x = np.zeros((int(several[-1]) + 1, inputs.features), np.float32)
        x[several[active.row[~alone]], active.column[~alone]] = active.value[~alone]
        for low in range(0, len(x), PASS_ROWS):
            _add_rows(sums, models, torch.from_numpy(x[low : low + PASS_ROWS]))
    return [loss for own in sums for loss in _losses(own, done, inputs)]


def check_one_mode(records: Iterable[Mapping[str, object]]) -> None:
    """Raise UserError for losses (as `Loss.record` has them) of several modes, which are to stand in one plot."""
    modes = sorted({str(record["mode"]) for record in records})
    if len(modes) > 1:
        raise UserError(
            f"losses under {' and '.join(modes)} inputs are to stand in one plot; expected one mode, since neither is "
            "a bound of the other. Measure all of them under the same inputs."
        )


def _unit_losses(weights: Weights, target: Target) -> tuple[Tensor, Tensor]:
    """[K, D] loss of the rows +e_j and -e_j, averaged over outputs."""
    plus_KDD, minus_KDD = rays(weights)
    mixed_DD = target.scale * target.mixing.T
    wanted_DD = torch.eye(mixed_DD.shape[0]) + mixed_DD
    return (plus_KDD - wanted_DD).square().mean(2), (minus_KDD + mixed_DD).square().mean(2)


def _add_rows(sums: Sequence[Tensor], models: Sequence[tuple[Weights, Target]], x_RD: Tensor) -> None:
    for own, (weights, target) in zip(sums, models, strict=True):
        loss_KR = loss_of(weights, x_RD, target.mixing, target.scale).double()
        own[0] += loss_KR.sum(1)
        own[1] += loss_KR.square().sum(1)


def _add_alone(own: Tensor, unit: tuple[Tensor, ...], column: np.ndarray, value: np.ndarray) -> None:
    """Rows with one active feature: a loss is value² times that of the unit row of its sign."""
    features = unit[0].shape[1]
    for loss_KD, which in zip(unit, (value >= 0, value < 0), strict=True):
        for power, total_K in ((2, own[0]), (4, own[1])):
            moments = np.bincount(column[which], value[which] ** power, minlength=features)
            total_K += loss_KD ** (power // 2) @ torch.from_numpy(moments.astype(np.float64))  # int where empty


def _largest_error(sums: Sequence[Tensor], rows: int, inputs: Inputs) -> float:
    return max(loss.error for own in sums for loss in _losses(own, rows, inputs))


def _losses(sums_2K: Tensor, rows: int, inputs: Inputs) -> list[Loss]:
    means, squares = sums_2K / rows
    errors = ((squares - means**2).clamp(min=0) / rows).sqrt()
    rate = inputs.rate
    return [
        Loss(float(mean) / rate, float(error) / rate, inputs.mode, rate, rows)
        for mean, error in zip(means, errors, strict=True)
    ]
