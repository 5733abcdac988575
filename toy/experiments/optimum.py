"""How much mixing helps most (nb3): σ in 41 points, symmetric and asymmetric."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from thresher.toy import figures
from thresher.toy.bounds import naive, rank_bound
from thresher.toy.experiments.base import (
    Data,
    Experiment,
    Verdict,
    bernoulli,
    close,
    crossing,
    fit,
    line,
    measured,
    target_of,
    within,
)
from thresher.toy.lab import Lab
from thresher.toy.labels import Labels
from thresher.toy.sizes import Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = [float(scale) for scale in np.linspace(0, 0.08, 41)]
QUICK = [0.0, 0.02, 0.03, 0.08]
KINDS = {"symmetric": True, "asymmetric": False}


def measure(lab: Lab, size: Size) -> Data:
    """Train a model for every scale and kind, and measure it at the p it was trained at."""
    settings = [(kind, scale) for kind in KINDS for scale in size.chosen(SCALES, QUICK)]
    fits = [fit(size, bernoulli(size), Labels(scale=scale, symmetric=KINDS[kind]), 10_000) for kind, scale in settings]
    models = lab.trained(fits, "optimum")
    losses = measured([(one.weights, target_of(one)) for one in models], bernoulli(size), size)
    records = [
        {
            "model": kind,
            "scale": scale,
            **loss.record(),
            "single_active_bound": rank_bound(one.fit.matrix, scale, size.neurons),
        }
        for (kind, scale), loss, one in zip(settings, losses, models, strict=True)
    ]
    return Data(records, {"naive": naive(size.features, size.neurons)})


def draw(data: Data) -> "Mapping[str, Figure]":
    """L/p against σ."""
    traces = [(kind, line(data.records, kind, "scale")) for kind in KINDS]
    return {
        "optimum": figures.loss_curves(
            traces,
            "σ",
            level=("naive, M = 0", data.extra["naive"]),
            log=False,
            title="trained and measured at Bernoulli 0.01",
        )
    }


def judge(data: Data, size: Size) -> list[Verdict]:
    """Least loss and where, where mixing stops to help, and the ends."""
    wide = 0.004 if size.quick else 0.0
    out = []
    for kind, least, low, high, cross, end in (
        ("symmetric", 0.065, 0.028, 0.036, 0.064, 0.103),
        ("asymmetric", 0.075, 0.022, 0.028, 0.047, 0.115),
    ):
        points = line(data.records, kind, "scale")
        best = min(points, key=lambda point: point[1])
        out.append(close(f"least L/p, {kind}", best[1], least, 0.0015 + wide))
        out.append(close(f"L/p at σ = 0.08, {kind}", points[-1][1], end, 0.003 + wide))
        if not size.quick:
            out.append(within(f"σ of the least L/p, {kind}", best[0], low - 0.002, high + 0.002))
            out.append(close(f"{kind} crosses naive at σ", crossing(points, data.extra["naive"]), cross, 0.003))
    return out


EXPERIMENT = Experiment(
    "optimum",
    "nb3",
    "The best amount of mixing",
    "Trained at p = 0.01 with σ from 0 to 0.08. A little mixing lowers the loss, much of it raises it; symmetric "
    "mixing helps more.",
    measure,
    draw,
    judge,
)
