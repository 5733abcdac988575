"""Baselines beside a trained model (nb8): σ = 0.01, Bernoulli 0.01, one table and one curve."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from thresher.toy import figures
from thresher.toy.baselines import half_identity, semi_nmf, svd
from thresher.toy.bounds import naive
from thresher.toy.experiments.base import (
    Data,
    Experiment,
    Verdict,
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
from thresher.toy.sizes import Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALE = 0.01
TABLE = "table"


def measure(lab: Lab, size: Size) -> Data:
    """Zero, half identity, SVD, semi-NMF and a trained model on one M, in one mode."""
    one = lab.trained([fit(size, bernoulli(size), Labels(scale=SCALE), 20_000)], "baselines")[0]
    target = target_of(one)
    named = {
        "half identity": half_identity(size.features, size.neurons),
        "SVD of I/2 + σM": svd(target.mixing, SCALE, size.neurons, 0.5),
        "semi-NMF": semi_nmf(target.mixing, SCALE, size.neurons, seed=size.seed),
        "trained": one.weights,
    }
    zero = named["half identity"]._replace(w_out=0 * named["half identity"].w_out)
    models = {"zero": zero, **named}
    losses = measured([(weights, target) for weights in models.values()], bernoulli(size), size)
    table = [{"model": f"{TABLE}: {name}", **loss.record()} for name, loss in zip(models, losses, strict=True)]
    along = curves({name: (weights, target) for name, weights in named.items()}, size)
    return Data(table + along, {"naive": naive(size.features, size.neurons, SCALE), "models": list(named)})


def draw(data: Data) -> "Mapping[str, Figure]":
    """L/p along p."""
    traces = [(name, line(data.records, name)) for name in data.extra["models"]]
    return {
        "baselines": figures.loss_curves(traces, "p of the inputs", level=("naive, in theory", data.extra["naive"]))
    }


def judge(data: Data, size: Size) -> list[Verdict]:
    """Half identity as in theory; the order of the others."""
    wide = 0.002 if size.quick else 0.0
    losses = {one["model"].removeprefix(f"{TABLE}: "): one["loss"] for one in data.records if TABLE in one["model"]}
    return [
        close("half identity", losses["half identity"], 0.0867, 0.0008 + wide),
        within("trained over half identity", losses["trained"] / losses["half identity"], 0.85, 0.97),
        within("trained over semi-NMF", losses["trained"] / losses["semi-NMF"], 0.9, 1.0),
    ]


EXPERIMENT = Experiment(
    "baselines",
    "nb8",
    "Baselines beside a trained model",
    "σ = 0.01, trained at p = 0.01 for 20,000 steps, all measured on the same rows.",
    measure,
    draw,
    judge,
)
