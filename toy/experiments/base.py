"""What an experiment is: it measures data, and from the data alone come figures and verdicts.

So figures can be drawn anew without measuring, and a page shows what is on disk.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from thresher.toy.inputs import Inputs
from thresher.toy.lab import Lab
from thresher.toy.labels import Labels
from thresher.toy.measure import Loss, Target, check_one_mode, sampled, single_active
from thresher.toy.model import Weights, stacked
from thresher.toy.sizes import Size
from thresher.toy.training import Fit, Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPARSE_P = 0.01
"""Training sparsity where an experiment does not vary it."""
SINGLE = "single"


class Verdict(NamedTuple):
    """One number against what is expected."""

    what: str
    expected: str
    """In words, with the tolerance."""
    measured: float
    passed: bool

    @property
    def line(self) -> str:
        """As one line of text."""
        return f"{'ok  ' if self.passed else 'MISS'} {self.what}: {self.measured:.4g}, expected {self.expected}"


class Data(NamedTuple):
    """What an experiment has measured: JSON values."""

    records: list[dict[str, Any]]
    """Lines of the CSV; every loss with its mode, its p and its sampling error."""
    extra: dict[str, Any]
    """What is no table: matrices for heat maps, loss histories."""


class Experiment(NamedTuple):
    """One experiment."""

    name: str
    """As in `thresher toy run NAME`."""
    also: str
    """Its name in the published study."""
    title: str
    lead: str
    """What is asked and seen, a sentence or two."""
    measure: Callable[[Lab, Size], Data]
    draw: Callable[[Data], "Mapping[str, Figure]"]
    """Figures by file name."""
    judge: Callable[[Data, Size], list[Verdict]]


def close(what: str, measured: float, expected: float, tolerance: float) -> Verdict:
    """Whether a number is what is expected, give or take."""
    passed = abs(measured - expected) <= tolerance
    return Verdict(what, f"{expected:g} ± {tolerance:g}", measured, passed)


def within(what: str, measured: float, low: float, high: float) -> Verdict:
    """Whether a number lies in a range."""
    return Verdict(what, f"{low:g} to {high:g}", measured, low <= measured <= high)


def fit(
    size: Size, inputs: Inputs, labels: Labels, published_steps: int, *, starred: bool = False, seed: int | None = None
) -> Fit:
    """A fit of this size; `starred`: with as many more steps as make up for empty rows."""
    steps = size.steps(published_steps, inputs.p if starred else None)
    return Fit(
        inputs=inputs,
        labels=labels,
        neurons=size.neurons,
        steps=steps,
        batch=size.batch,
        lr=size.lr,
        seed=size.seed if seed is None else seed,
    )


def bernoulli(size: Size, p: float = SPARSE_P) -> Inputs:
    """Bernoulli inputs of this size's width."""
    return Inputs(p=p, features=size.features)


def single(size: Size) -> Inputs:
    """Single-active inputs of this size's width."""
    return Inputs(mode="single", features=size.features)


def target_of(one: Trained) -> Target:
    """What a trained model was trained on, with its learned σ."""
    return Target(one.fit.matrix, one.scale)


def measured(models: Sequence[tuple[Weights, Target]], inputs: Inputs, size: Size) -> list[Loss]:
    """L/p of one model per entry, exact under single-active inputs. Neighbours of one target are measured together."""
    if inputs.mode == SINGLE:
        return [loss for model in models for loss in single_active(*model)]
    groups: list[tuple[list[Weights], Target]] = []
    for weights, target in models:
        if groups and groups[-1][1] is target:
            groups[-1][0].append(weights)
        else:
            groups.append(([weights], target))
    stacks = [(stacked(weights), target) for weights, target in groups]
    return sampled(stacks, inputs, seed=size.seed, samples=size.samples, enough=size.enough)


def curves(
    named: Mapping[str, tuple[Weights, Target]], size: Size, values: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """L/p of every model at every p of the curve, as records with the model's name."""
    out: list[dict[str, Any]] = []
    for p in size.curve() if values is None else values:
        losses = measured(list(named.values()), bernoulli(size, p), size)
        out += [{"model": name, **loss.record()} for name, loss in zip(named, losses, strict=True)]
    return out


def line(records: Sequence[Mapping[str, Any]], model: str, x: str = "p") -> list[tuple[float, float]]:
    """(x, loss) of one model, ascending; `records` are all that its plot may show, so of one mode."""
    check_one_mode(records)
    return sorted((one[x], one["loss"]) for one in records if one["model"] == model and one.get("loss") is not None)


def at(records: Sequence[Mapping[str, Any]], model: str, p: float) -> float:
    """The loss of a model at p, between the two nearest values of its curve, in log p."""
    return interpolate(line(records, model), p)


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at x between two neighbours, linear in log x; the end's value beyond an end."""
    before = [point for point in points if point[0] <= x * (1 + 1e-9)]
    after = [point for point in points if point[0] >= x * (1 - 1e-9)]
    if not before or not after:
        return (before or after)[-1 if before else 0][1]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 if x1 <= x0 else y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)


def crossing(points: Sequence[tuple[float, float]], level: float) -> float:
    """The first x at which a curve rises through a level, linear between neighbours; NaN where it does not."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 <= level < y1:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return math.nan
