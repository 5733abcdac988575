"""Sparsity regimes (nb1): one model per training sparsity, measured at all of them; and how their neurons are used."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from thresher.toy import figures
from thresher.toy.bounds import naive
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
    target_of,
    within,
)
from thresher.toy.lab import Lab
from thresher.toy.labels import Labels
from thresher.toy.model import Weights, rays
from thresher.toy.sizes import Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALE = 0.02
TRAINED = {
    0.001: 0.0720, 0.002: 0.0726, 0.005: 0.0743, 0.01: 0.0757, 0.02: 0.0775,
    0.05: 0.0794, 0.1: 0.0800, 0.2: 0.0789, 0.5: 0.0720, 1.0: 0.0543,
}  # fmt: skip
"""L/p of a model at the p that it was trained at."""
QUICK = [0.01, 1.0]


def measure(lab: Lab, size: Size) -> Data:
    """Train, measure at the training sparsity and along p, look into the sparsest and the densest model."""
    values = size.chosen(list(TRAINED), QUICK)
    fits = [fit(size, bernoulli(size, p), Labels(scale=SCALE), 10_000, starred=True) for p in values]
    models = lab.trained(fits, "sparsity")
    target = target_of(models[0])
    own = [
        {"model": "own", **measured([(one.weights, target)], one.fit.inputs, size)[0].record(), "steps": one.fit.steps}
        for one in models
    ]
    named = {f"p = {p:g}": (one.weights, target) for p, one in zip(values, models, strict=True)}
    views = {"sparse": _view(models[0].weights), "dense": _view(models[-1].weights)}
    views = {name: {**view, "p": values[0 if name == "sparse" else -1]} for name, view in views.items()}
    facts = {"naive": naive(size.features, size.neurons, SCALE), "values": values}
    return Data(own + curves(named, size), {**facts, "views": views})


def _view(weights: Weights) -> dict[str, object]:
    """What a model makes of one active feature: outputs in row f for x = ±e_f, and every neuron's part in its gain."""
    plus_DD, minus_DD = (part[0] for part in rays(weights))
    pieces_DH = weights.w_in[0] * weights.w_out[0].T
    return {
        "plus": _short(plus_DD),
        "minus": _short(minus_DD),
        "slopes": _short(plus_DD.diagonal()),
        "below": _short(minus_DD.diagonal()),
        "pieces": _short(pieces_DH),
    }


def _short(tensor: torch.Tensor) -> list[object]:
    return [[round(v, 5) for v in row] if isinstance(row, list) else round(row, 5) for row in tensor.tolist()]


def draw(data: Data) -> "Mapping[str, Figure]":
    """Curves; and of the sparsest and densest model input-output curves, stacked gains and outputs."""
    values, views = data.extra["values"], data.extra["views"]
    return {
        "sparsity": figures.sparsity_curves(
            [(f"p = {p:g}", p, line(data.records, f"p = {p:g}")) for p in values], data.extra["naive"]
        ),
        "input_output": figures.input_output(
            {f"trained at p = {v['p']:g}": (v["slopes"], v["below"]) for v in views.values()}
        ),
        "gains": figures.stacked_gains({f"trained at p = {v['p']:g}": v["pieces"] for v in views.values()}),
        "outputs": figures.heat_grid(
            [
                (f"p = {v['p']:g}, x = {sign}e_f", v[side])
                for v in views.values()
                for sign, side in (("+", "plus"), ("−", "minus"))
            ],
            ("output", "active feature f"),
            columns=2,
        ),
    }


def judge(data: Data, size: Size) -> list[Verdict]:
    """Trained losses, the ends of two curves, and the slopes."""
    wide = 0.004 if size.quick else 0.0
    out = []
    for record in data.records:
        if record["model"] == "own":
            tolerance = (0.0015 if record["p"] <= 0.1 else 0.003) + wide
            out.append(close(f"L/p trained at p = {record['p']:g}", record["loss"], TRAINED[record["p"]], tolerance))
    out.append(close("the dense model at p = 0.01", at(data.records, "p = 1", 0.01), 0.0915, 0.003 + wide))
    slopes, below = (torch.tensor(data.extra["views"]["sparse"][key]) for key in ("slopes", "below"))
    dense = torch.tensor(data.extra["views"]["dense"]["slopes"])
    out.append(within("dense slopes in 0.8 to 1", float(((dense >= 0.77) & (dense <= 1.03)).sum()), 45, 55))
    if size.quick:
        return out
    rest = dense[dense < 0.5]
    return [
        *out,
        close("the sparsest model at p = 1", at(data.records, "p = 0.001", 1.0), 0.125, 0.005),
        close("mean sparse slope", float(slopes.mean()), 0.55, 0.02),
        within("least sparse slope", float(slopes.min()), 0.31, 0.55),
        within("largest sparse slope", float(slopes.max()), 0.55, 0.80),
        within("sparse output at x = -1, least", float(below.min()), -0.10, -0.02),
        within("sparse output at x = -1, largest", float(below.max()), -0.08, 0.0),
        within("other dense slopes, mean", float(rest.mean()), 0.05, 0.12),
    ]


EXPERIMENT = Experiment(
    "sparsity",
    "nb1",
    "Sparsity regimes",
    "One model per training sparsity, σ = 0.02, measured at every sparsity. Trained sparse, every feature gets a part "
    "of many neurons; trained dense, half the features get a neuron each and the rest an offset.",
    measure,
    draw,
    judge,
)
