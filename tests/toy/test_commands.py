"""`thresher toy` as scripts call it: the documents are those of docs/terminal.md."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from tests.documents import document
from thresher import cli
from thresher.toy.experiments import registry
from thresher.toy.experiments.base import Data, Experiment, close


def told(command: str, *words: str) -> dict[str, object]:
    done = CliRunner().invoke(cli.app, [*command.split(), *words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return document(command, done.stdout)


def test_list_target_and_run_print_what_is_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(told("toy list")["experiments"]) == len(registry.EXPERIMENTS)  # type: ignore[arg-type]
    assert told("toy target", "chain", "--out", str(tmp_path / "chain"))["layers"] == 4
    tiny = Experiment(
        "tiny",
        "nb0",
        "Nothing",
        "Nothing is asked.",
        lambda lab, size: Data([{"model": "none", "loss": float(size.quick)}], {}),
        lambda data: {"empty": Figure()},
        lambda data, size: [close("quick", data.records[0]["loss"], 1.0, 0.1), close("wrong", 0.0, 1.0, 0.1)],
    )
    monkeypatch.setitem(registry.EXPERIMENTS, "tiny", tiny)
    found = told("toy run", "tiny", "--quick", "--out", str(tmp_path / "study"))
    (one,) = found["experiments"]  # type: ignore[misc]
    assert set(one) == {"name", "path", "reused", "seconds", "verdicts", "figures"}
    assert [verdict["passed"] for verdict in one["verdicts"]] == [True, False]
    assert (tmp_path / "study/toy.html").is_file()
    assert told("toy run", "nb0", "--quick", "--out", str(tmp_path / "study"))["experiments"][0]["reused"]  # type: ignore[index]
    # another size is another measurement
    assert not told("toy run", "nb0", "--out", str(tmp_path / "study"))["experiments"][0]["reused"]  # type: ignore[index]
