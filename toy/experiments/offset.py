"""How strong the naive solution's offset should be (nb4), and trained models beside it. Clean labels."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from thresher.toy import figures
from thresher.toy.baselines import half_identity
from thresher.toy.bounds import best_offset, naive
from thresher.toy.bounds import offset as offset_loss
from thresher.toy.experiments.base import (
    Data,
    Experiment,
    Verdict,
    at,
    bernoulli,
    close,
    curves,
    fit,
    line,
    measured,
    within,
)
from thresher.toy.lab import Lab
from thresher.toy.labels import Labels
from thresher.toy.measure import Target
from thresher.toy.sizes import Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRENGTHS = [float(b) for b in np.geomspace(0.002, 0.05, 100)]
SPARSITIES = [0.001, 0.01, 0.1, 1.0]
AT_ONE = {0.001: 0.11, 0.01: 0.069, 0.1: 0.0565, 1.0: 0.0525}
"""L/p at p = 1 of a model trained at p."""
CLEAN = Labels(kind="clean")


def measure(lab: Lab, size: Size) -> Data:
    """Naive models of all offsets at four sparsities; trained ones and the best naive ones along p."""
    fits = [fit(size, bernoulli(size, p), CLEAN, 10_000, starred=True) for p in size.chosen(SPARSITIES, [0.1, 1.0])]
    models = lab.trained(fits, "offset")
    target = Target(fits[0].matrix, 0.0)
    strengths = size.chosen(STRENGTHS, STRENGTHS[::11])
    records = []
    for p in SPARSITIES:
        naives = [(half_identity(size.features, size.neurons, b), target) for b in strengths]
        losses = measured(naives, bernoulli(size, p), size)
        records += [
            {
                "model": f"offset at p = {p:g}",
                "offset": b,
                **loss.record(),
                "closed_form": offset_loss(size.features, size.neurons, p, b),
            }
            for b, loss in zip(strengths, losses, strict=True)
        ]
    named = {f"trained at p = {one.fit.inputs.rate:g}": (one.weights, target) for one in models}
    best = {p: best_offset(size.neurons, p) for p in SPARSITIES}
    named |= {f"best for p = {p:g}": (half_identity(size.features, size.neurons, b), target) for p, b in best.items()}
    facts = {"naive": naive(size.features, size.neurons), "trained": [one.fit.inputs.rate for one in models]}
    return Data(records + curves(named, size), facts)


def draw(data: Data) -> "Mapping[str, Figure]":
    """L/p against b, and along p."""
    left = [(f"p = {p:g}", line(data.records, f"offset at p = {p:g}", "offset")) for p in SPARSITIES]
    right = [(f"trained at p = {p:g}", line(data.records, f"trained at p = {p:g}")) for p in data.extra["trained"]]
    dashed = [(f"best b for p = {p:g}", line(data.records, f"best for p = {p:g}")) for p in SPARSITIES]
    return {
        "offset": figures.loss_curves(left, "offset b", level=("naive", data.extra["naive"])),
        "trained": figures.loss_curves(right, "p of the inputs", dashed=dashed, level=("naive", data.extra["naive"])),
    }


def judge(data: Data, size: Size) -> list[Verdict]:
    """Best offsets, sampled losses against the closed form, and trained models at either end."""
    out = []
    for p, where, wide, loss in ((1.0, 0.0194, 0.002, 0.0531), (0.1, 0.0132, 0.002, 0.0813)):
        points = line(data.records, f"offset at p = {p:g}", "offset")
        best = min(points, key=lambda point: point[1])
        out.append(close(f"best offset at p = {p:g}", best[0], where, 0.004 if size.quick else wide))
        out.append(close(f"L/p of the best offset at p = {p:g}", best[1], loss, 0.002 if size.quick else 0.0008))
    errors = [abs(one["loss"] - one["closed_form"]) for one in data.records if "closed_form" in one and one["p"] >= 0.1]
    out.append(within("largest distance from the closed form, p ≥ 0.1", max(errors), 0, 0.004 if size.quick else 8e-4))
    for p in data.extra["trained"]:
        name = f"trained at p = {p:g}"
        out.append(
            close(f"L/p at p = 1, {name}", at(data.records, name, 1.0), AT_ONE[p], 0.006 if size.quick else 0.004)
        )
        if not size.quick:
            out.append(within(f"L/p at p = 0.001, {name}", at(data.records, name, 0.001), 0.0825, 0.0855))
    return out


EXPERIMENT = Experiment(
    "offset",
    "nb4",
    "The offset on unused outputs",
    "On clean labels. With dense inputs the naive model gains by adding a little of every neuron to the outputs that "
    "no neuron serves; trained models find that, and no more.",
    measure,
    draw,
    judge,
)
