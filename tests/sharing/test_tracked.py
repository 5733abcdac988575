"""An evaluation in Weights & Biases, offline, read back: table, pictures, page, and what rests on what."""

import json
import shutil
from pathlib import Path

import pytest

from tests.sharing.conftest import House
from tests.train.wandb_file import Logged, logged
from thresher.sharing.evaluated import read_results
from thresher.sharing.tracked import COLUMNS, track_evaluation
from thresher.train.files import weights_hash


@pytest.fixture(scope="module")
def report(house: House, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the house's report that was logged."""
    folder = tmp_path_factory.mktemp("tracked") / "books report"
    shutil.copytree(house.report, folder)
    runs = [house.runs / name for name in ("topk-L00", "topk-L01", "clt")]
    track_evaluation(folder, runs, "offline")
    return folder


@pytest.fixture(scope="module")
def segment(report: Path) -> Logged:
    (only,) = logged(report)
    return only


def test_the_table_has_every_row_of_the_evaluation(report: Path, segment: Logged) -> None:
    evaluation = read_results((report / "results.json").read_bytes(), "results.json")
    logged_at = next(point for point in segment.history if "pareto.path" in point)
    table = json.loads((segment.files / logged_at["pareto.path"]).read_text())
    assert table["columns"] == list(COLUMNS)
    assert len(table["data"]) == len(evaluation.rows) == logged_at["pareto.nrows"]
    for cells, row in zip(table["data"], evaluation.rows, strict=True):
        found = dict(zip(COLUMNS, cells, strict=True))
        assert (found["dictionary"], found["protocol"], found["delta"]) == (row.name, row.protocol, row.metric("delta"))
        assert (found["l0"], found["on_front"]) == (row.metric("l0"), row.on_front)
        assert row.interval is None or (found["delta_low"], found["delta_high"]) == row.interval


def test_plots_and_page_are_the_reports(report: Path, segment: Logged) -> None:
    point = next(point for point in segment.history if "report.path" in point)
    for plot in sorted((report / "plots").glob("*.png")):
        assert (segment.files / point[f"plots/{plot.stem}.path"]).read_bytes() == plot.read_bytes()
    assert "A report." in (segment.files / point["report.path"]).read_text()


def test_the_summary_has_each_dictionarys_numbers(report: Path, segment: Logged) -> None:
    evaluation = read_results((report / "results.json").read_bytes(), "results.json")
    for row in evaluation.replacements:
        assert segment.summary[f"{row.protocol}/delta/{row.name}"] == row.metric("delta")
    assert segment.config["masks"] == json.loads(json.dumps(evaluation.masks))


def test_the_evaluation_rests_on_the_dictionaries_that_it_judged(house: House, report: Path, segment: Logged) -> None:
    used = {artifact.name: artifact for artifact in segment.artifacts["dictionary"]}
    assert sorted(used) == ["clt", "topk-L00", "topk-L01"]
    for name, artifact in used.items():
        assert artifact.use_after_commit
        assert json.loads(artifact.metadata)["weights_sha256"] == weights_hash(house.runs / name)
    (made,) = segment.artifacts["evaluation"]
    assert (made.name, made.use_after_commit) == ("evaluation-books_report", False)
    about = json.loads(made.metadata)
    assert about["dictionaries"] == [
        {"run": name, "weights_sha256": weights_hash(house.runs / name)} for name in ("topk-L00", "topk-L01", "clt")
    ]
    held = {entry.path: Path(entry.local_path) for entry in made.manifest.contents}
    assert held["results.json"] == report / "results.json"
    assert "plots/delta_l0.png" in held
    assert not any(name.startswith("sums") for name in held)
    assert (segment.run.job_type, segment.run.run_group, segment.exit_code) == ("evaluate", "runs", 0)


def test_training_and_evaluation_name_the_same_version_of_a_dictionary(house: House, segment: Logged) -> None:
    from thresher.train.files import read_config
    from thresher.train.metrics import FILES
    from thresher.train.tracking import dictionary_artifact

    path = house.runs / "clt"
    of_training = dictionary_artifact(path, read_config(path), weights_hash(path), FILES)
    (of_evaluation,) = [artifact for artifact in segment.artifacts["dictionary"] if artifact.name == "clt"]
    assert of_training.digest == of_evaluation.digest
