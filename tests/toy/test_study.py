"""Experiments: each in its quick form against its tolerances, taken up again, drawn, and put on a page."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted, StopFlag
from thresher.cache.records import to_dict
from thresher.toy.experiments.base import close, crossing, interpolate, within
from thresher.toy.experiments.registry import EXPERIMENTS, chosen
from thresher.toy.inputs import Inputs
from thresher.toy.lab import Lab, fit_from
from thresher.toy.labels import Labels
from thresher.toy.sizes import FULL, QUICK
from thresher.toy.study import PAGE, Done, run
from thresher.toy.training import TOLD_EVERY, Fit

QUIET = Console(quiet=True)
IN_SUITE = "transplant"
"""The experiment that stands for all in the suite; the others are long."""


def failures(done: Done) -> list[str]:
    return [verdict.line for verdict in done.verdicts if not verdict.passed]


def test_a_quick_experiment_meets_its_tolerances_and_is_then_reused(tmp_path: Path) -> None:
    (done,) = run(chosen(IN_SUITE), QUICK, tmp_path, QUIET)
    assert not failures(done)
    assert not done.reused
    records = json.loads((done.folder / "data.json").read_text())["records"]
    assert {record["mode"] for record in records} == {"bernoulli"}
    assert all({"p", "error", "rows"} <= record.keys() for record in records)
    header = (done.folder / "data.csv").read_text().splitlines()[0]
    assert header.split(",")[:3] == ["model", "loss", "error"]
    assert {path.suffix for path in done.figures} == {".png", ".svg"}
    pictures = {path.name: path.read_bytes() for path in done.figures}
    # the tuned model is the one that was plotted: the loss before tuning is that of the mixed model on clean labels
    losses = {record["model"]: record["loss"] for record in records}
    assert losses["mixed labels"] < losses["tuned"] < losses["at once"]
    (again,) = run(chosen("nb2a"), QUICK, tmp_path, QUIET)
    assert again.reused
    assert again.verdicts == done.verdicts
    assert {path.name: path.read_bytes() for path in again.figures} == pictures
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert page.count("<figure>") == 1
    assert all(verdict.what in page for verdict in done.verdicts)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != IN_SUITE])
def test_every_quick_experiment_meets_its_tolerances(name: str, tmp_path: Path) -> None:
    (done,) = run(chosen(name), QUICK, tmp_path, QUIET)
    assert not failures(done)
    assert done.figures


def test_what_was_trained_before_a_stop_is_kept(tmp_path: Path) -> None:
    inputs = Inputs(p=0.1, features=8)
    fits = [
        Fit(inputs=inputs, labels=Labels(scale=0.1), neurons=4, steps=steps, batch=16) for steps in (3, TOLD_EVERY + 1)
    ]
    stop = StopFlag()
    lab = Lab(tmp_path, QUIET, stop)
    lab.trained(fits[:1], "first")
    stop.requested = True
    with pytest.raises(Interrupted):
        lab.trained(fits, "both")
    assert len(list(tmp_path.iterdir())) == 1
    stop.requested = False
    first, second = lab.trained(fits, "both")
    assert [one.fit for one in (first, second)] == fits
    again = Lab(tmp_path, QUIET).trained(fits, "both")
    assert again[1].weights.w_in.equal(second.weights.w_in)
    assert again[1].losses.equal(second.losses)
    assert again[1].scale == second.scale
    assert fit_from(json.loads(json.dumps(to_dict(fits[1])))) == fits[1]


def test_names_of_the_published_study_are_known_and_near_misses_are_told() -> None:
    assert chosen("nb3") == [EXPERIMENTS["optimum"]]
    assert chosen("all") == list(EXPERIMENTS.values())
    with pytest.raises(UserError, match="Did you mean 'sparsity'"):
        chosen("sparcity")


def test_a_starred_run_makes_up_for_empty_rows() -> None:
    assert FULL.steps(10_000) == 10_000
    assert FULL.steps(10_000, 0.001) == 105_033
    assert FULL.steps(10_000, 0.01) == 15_774
    assert FULL.curve()[0] == pytest.approx(0.001)
    assert len(FULL.curve()) == 100


def test_verdicts_curves_and_crossings() -> None:
    assert close("a", 1.09, 1.0, 0.1).passed
    assert not close("a", 1.11, 1.0, 0.1).passed
    assert not within("a", float("nan"), 0, 1).passed
    assert interpolate([(0.01, 1.0), (1.0, 3.0)], 0.1) == pytest.approx(2.0)
    assert interpolate([(0.01, 1.0), (1.0, 3.0)], 0.01) == 1.0
    assert crossing([(0.0, 1.0), (1.0, 0.0), (2.0, 1.0)], 0.5) == pytest.approx(1.5)
