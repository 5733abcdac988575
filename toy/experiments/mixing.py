"""What the label mixes in (nb2), and what is left when it is taken away (nb2a)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from thresher.toy import figures
from thresher.toy.bounds import naive
from thresher.toy.experiments.base import (
    Data,
    Experiment,
    Verdict,
    at,
    bernoulli,
    close,
    crossing,
    curves,
    fit,
    line,
    measured,
    target_of,
    within,
)
from thresher.toy.inputs import Inputs
from thresher.toy.lab import Lab
from thresher.toy.labels import INITIAL_SCALE, Labels
from thresher.toy.measure import Target
from thresher.toy.sizes import Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEARNED = {"scale": INITIAL_SCALE, "learn_scale": True}
KINDS = {
    "clean": Labels(kind="clean"),
    "residual transpose": Labels(kind="residual_transpose", scale=1.0),
    "symmetric": Labels(**LEARNED, symmetric=True),  # type: ignore[arg-type]
    "asymmetric": Labels(**LEARNED),  # type: ignore[arg-type]
}
EXPECTED = {
    "residual transpose": (0.0597, 0.0645),
    "symmetric": (0.060, 0.0655),
    "asymmetric": (0.072, 0.0755),
    "clean": (0.0833, 0.0833),
}
"""L/p at p = 0.001 and 0.01."""


def measure(lab: Lab, size: Size) -> Data:
    """Train on every kind of label and measure each on its own."""
    fits = [fit(size, bernoulli(size), labels, 10_000) for labels in KINDS.values()]
    models = lab.trained(fits, "mixing")
    named = {kind: (one.weights, target_of(one)) for kind, one in zip(KINDS, models, strict=True)}
    scales = {kind: one.scale for kind, one in zip(KINDS, models, strict=True)}
    return Data(curves(named, size), {"naive": naive(size.features, size.neurons), "scales": scales})


def draw(data: Data) -> "Mapping[str, Figure]":
    """L/p along p by kind of label."""
    named = {f"{kind}, σ = {data.extra['scales'][kind]:.3f}" if kind != "clean" else kind: kind for kind in KINDS}
    traces = [(title, line(data.records, kind)) for title, kind in named.items()]
    return {"mixing": figures.loss_curves(traces, "p of the inputs", level=("naive", data.extra["naive"]))}


def judge(data: Data, size: Size) -> list[Verdict]:
    """Learned scales, losses, where the curves cross the naive one and where they end."""
    wide = 0.004 if size.quick else 0.0
    scales = data.extra["scales"]
    out = [
        close("learned σ, asymmetric", scales["asymmetric"], 0.024, 0.002 + wide),
        close("learned σ, symmetric", scales["symmetric"], 0.033, 0.002 + wide),
    ]
    for kind, losses in EXPECTED.items():
        for p, loss in zip((0.001, 0.01), losses, strict=True):
            out.append(close(f"L/p of {kind} at p = {p:g}", at(data.records, kind, p), loss, 0.002 + wide))
    if size.quick:
        return out
    for kind, where in (("asymmetric", 0.04), ("symmetric", 0.07)):
        points = line(data.records, kind)
        out.append(close(f"{kind} crosses naive at p", crossing(points, data.extra["naive"]), where, 0.015))
    for kind in ("residual transpose", "symmetric", "asymmetric"):
        out.append(within(f"L/p of {kind} at p = 1", at(data.records, kind, 1.0), 0.102, 0.115))
    return [*out, close("L/p of clean at p = 1", at(data.records, "clean", 1.0), 0.080, 0.003)]


EXPERIMENT = Experiment(
    "mixing",
    "nb2",
    "Kinds of mixing",
    "Models trained at p = 0.01 on clean labels, on the transpose of a residual stream, and on Gaussian mixing whose "
    "scale they learn. All but the clean one beat the naive solution where inputs are sparse, and lose where they are "
    "dense.",
    measure,
    draw,
    judge,
)


def measure_transplant(lab: Lab, size: Size) -> Data:
    """Go on training the asymmetric model of nb2, that very model, on clean labels."""
    before = lab.trained([fit(size, bernoulli(size), KINDS["asymmetric"], 10_000)], "transplant: mixed labels")[0]
    after = lab.tuned(fit(size, bernoulli(size), KINDS["clean"], 10_000), before, "transplant: clean labels")
    inputs: Inputs = bernoulli(size)
    clean = Target(after.fit.matrix, 0.0)
    states = {"mixed labels": (before.weights, target_of(before)), "at once": (before.weights, clean)}
    states["tuned"] = (after.weights, clean)
    losses = measured(list(states.values()), inputs, size)
    records = [{"model": name, **loss.record()} for name, loss in zip(states, losses, strict=True)]
    history = {
        name: (one.losses / inputs.rate).tolist() for name, one in (("mixed labels", before), ("clean labels", after))
    }
    return Data(records, {"history": history, "naive": naive(size.features, size.neurons)})


def draw_transplant(data: Data) -> "Mapping[str, Figure]":
    """Running means of the training loss, before and after."""
    return {"transplant": figures.histories(data.extra["history"], data.extra["naive"])}


def judge_transplant(data: Data, size: Size) -> list[Verdict]:
    """Before, in the first steps, and tuned."""
    wide = 0.004 if size.quick else 0.0
    losses = {one["model"]: one["loss"] for one in data.records}
    first = data.extra["history"]["clean labels"][:100]  # the published curve is a running mean, falling from the start
    return [
        close("L/p on mixed labels", losses["mixed labels"], 0.0755, 0.0015 + wide),
        close("L/p on clean labels, mean of the first 100 steps", sum(first) / len(first), 0.088, 0.002 + wide),
        close("L/p on clean labels, tuned", losses["tuned"], 0.0835, 0.0015 + wide),
    ]


TRANSPLANT = Experiment(
    "transplant",
    "nb2a",
    "The mixing taken away",
    "The asymmetric model goes on training with M = 0: at once it is worse than naive, and after 10,000 steps it is "
    "naive, not better.",
    measure_transplant,
    draw_transplant,
    judge_transplant,
)
