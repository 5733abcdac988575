"""Low-rank mixing (nb6): single-active inputs, σ learned; once over eight ranks, once over five seeds."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from thresher.toy import figures
from thresher.toy.experiments.base import Data, Experiment, Verdict, close, fit, measured, single, target_of, within
from thresher.toy.lab import Lab
from thresher.toy.labels import INITIAL_SCALE, Labels, effective_rank
from thresher.toy.sizes import Size
from thresher.toy.training import Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKS: dict[int | None, tuple[float, float, float]] = {
    None: (80, 0.0698, 0.031),
    100: (68, 0.0695, 0.035),
    50: (51, 0.0695, 0.042),
    20: (31, 0.0675, 0.157),
    15: (27, 0.0617, 0.294),
    10: (21, 0.0661, 0.275),
    7: (20, 0.0587, 0.328),
    5: (17, 0.0567, 0.394),
}
"""Rank: effective rank, L/p and σ√r as published."""
SEED_RANKS = (1000, 70, 30, 20, 9)
SEED_EFFECTIVE = {True: (79, 60, 39, 31, 21), False: (79, 55, 27, 19, 9)}
"""By whether the diagonal is 0."""
SEEDS = range(5)


def _labels(rank: int | None, scale: float, zero_diagonal: bool = True) -> Labels:
    return Labels(scale=scale, learn_scale=True, rank=rank, zero_diagonal=zero_diagonal, normalise="none")


def _record(one: Trained, size: Size) -> dict[str, Any]:
    matrix = one.fit.matrix
    root = math.sqrt(one.fit.labels.rank or 1)
    return {
        "rank": one.fit.labels.rank or size.features,
        "full": one.fit.labels.rank is None,
        "effective_rank": effective_rank(matrix),
        "matrix_rank": int(torch.linalg.matrix_rank(matrix.double())),
        "scale": one.scale,
        "scale_rms": one.scale * root,
        "zero_diagonal": one.fit.labels.zero_diagonal,
        "seed": one.fit.seed,
        **measured([(one.weights, target_of(one))], one.fit.inputs, size)[0].record(),
    }


def measure(lab: Lab, size: Size) -> Data:
    """Train on every rank; record what was learned, and the spectra."""
    ranks = [None, 50, 5] if size.quick else list(RANKS)
    fits = [fit(size, single(size), _labels(rank, INITIAL_SCALE), 25_000) for rank in ranks]
    models = lab.trained(fits, "rank")
    spectra = {}
    for rank, one in zip(ranks, models, strict=True):
        values = torch.linalg.svdvals(one.fit.matrix.double())
        spectra["full" if rank is None else f"rank {rank}"] = [round(float(v), 4) for v in values / values.sum()]
    records = [{"model": "trained", **_record(one, size)} for one in models]
    return Data(records, {"spectra": spectra})


def draw(data: Data) -> "Mapping[str, Figure]":
    """L/p and σ against effective rank, and spectra."""
    points = [(one["effective_rank"], one["loss"], one["scale_rms"]) for one in data.records]
    return {"rank": figures.rank_panels(points, data.extra["spectra"])}


def judge(data: Data, size: Size) -> list[Verdict]:
    """Values where M has rank 50 or more, the trend below."""
    wide = 0.003 if size.quick else 0.0
    out = []
    records = {None if one["full"] else one["rank"]: one for one in data.records}
    for rank, one in records.items():
        effective, loss, scale = RANKS[rank]
        name = "full rank" if rank is None else f"rank {rank}"
        out.append(close(f"effective rank, {name}", one["effective_rank"], effective, 4))
        if rank is None or rank >= 50:
            out.append(close(f"L/p, {name}", one["loss"], loss, 0.003 + wide))
            out.append(close(f"σ√r, {name}", one["scale_rms"], scale, 0.008 + wide))
    full, low = records[None], records[5]
    out.append(within("L/p, rank 5 over full rank", low["loss"] / full["loss"], 0.5, 0.95))
    out.append(within("σ√r, rank 5 over full rank", low["scale_rms"] / full["scale_rms"], 4, 30))
    return out


EXPERIMENT = Experiment(
    "rank",
    "nb6",
    "The rank of the mixing",
    "Single-active inputs, zero diagonal, factors not normalised, σ learned. The lower the rank, the lower the loss: "
    "below some 20, σ runs away, since a term of so low a rank can be implemented exactly and then dominates the "
    "labels.",
    measure,
    draw,
    judge,
)


def measure_seeds(lab: Lab, size: Size) -> Data:
    """Train five ranks on five seeds, with and without a diagonal."""
    records = []
    ranks = (1000, 9) if size.quick else SEED_RANKS
    for seed in (0, 1) if size.quick else SEEDS:
        fits = [
            fit(size, single(size), _labels(rank, 0.05, zero), 30_000, seed=seed)
            for zero in (True, False)
            for rank in ranks
        ]
        models = lab.trained(fits, f"rank-seeds, seed {seed}")
        records += [{"model": "trained", **_record(one, size)} for one in models]
    return Data(records, {"groups": _groups(records)})


def _groups(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over seeds, by diagonal and rank."""
    out = []
    for zero, rank in dict.fromkeys((one["zero_diagonal"], one["rank"]) for one in records):
        own = [one for one in records if (one["zero_diagonal"], one["rank"]) == (zero, rank)]
        group: dict[str, Any] = {"zero_diagonal": zero, "rank": rank, "seeds": len(own)}
        for key in ("loss", "scale_rms", "effective_rank"):
            values = torch.tensor([one[key] for one in own], dtype=torch.float64)
            group[key], group[f"{key}_sem"] = float(values.mean()), float(values.std() / len(own) ** 0.5)
        out.append(group)
    return out


def draw_seeds(data: Data) -> "Mapping[str, Figure]":
    """Mean and standard error of L/p and σ√r against the measured effective rank."""
    return {"rank_seeds": figures.rank_seeds(data.extra["groups"])}


def judge_seeds(data: Data, size: Size) -> list[Verdict]:
    """Effective ranks, and that low ranks have the lower loss."""
    out = []
    for zero, expected in SEED_EFFECTIVE.items():
        own = {one["rank"]: one for one in data.extra["groups"] if one["zero_diagonal"] is zero}
        diagonal = "zero diagonal" if zero else "with diagonal"
        for rank, effective in zip(SEED_RANKS, expected, strict=True):
            if rank in own:
                out.append(
                    close(f"effective rank of rank {rank}, {diagonal}", own[rank]["effective_rank"], effective, 3)
                )
    low, high = (
        next(one for one in data.extra["groups"] if one["zero_diagonal"] and one["rank"] == rank) for rank in (9, 1000)
    )
    out.append(within("L/p, rank 9 over rank 1000, zero diagonal", low["loss"] / high["loss"], 0.3, 0.97))
    return out


SEEDED = Experiment(
    "rank-seeds",
    "nb6 variant",
    "The rank of the mixing, over seeds",
    "Five seeds, σ learned from 0.05. A zero diagonal raises the effective rank of a low-rank M, so the measured value "
    "is plotted; bars are standard errors of the mean.",
    measure_seeds,
    draw_seeds,
    judge_seeds,
)
