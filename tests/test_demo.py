"""What the demo promises of its numbers, on a run of its own recipe with half the latents and rows in a batch."""

import json
import subprocess
import sys
from pathlib import Path

from tests.documents import document

SHORTER = (
    *("data.max_tokens=120000", "dictionary.expansion=4", "train.epochs=2", "train.batch_rows=1024"),
    *("evaluate.tokens=8000", "evaluate.resamples=200", "evaluate.neurons=[32]", "evaluate.training_tokens=15000"),
)


def test_the_numbers_of_the_demo_make_sense(tmp_path: Path) -> None:
    extra = [part for item in SHORTER for part in ("--set", item)]
    command = [sys.executable, "-m", "thresher", "demo", "--json", *extra]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = document("demo", done.stdout)
    assert [len(told[stage]) for stage in ("harvest", "train", "evaluate")] == [6, 1, 4]
    results = json.loads((tmp_path / "demo/report/results.json").read_text())
    assert all(check["passed"] for check in results["checks"])
    for protocol in ("cascade", "clean_input", "single_site"):
        rows = {row["name"]: row for row in results["rows"] if row["protocol"] == protocol}
        sets = {name: row for name, row in rows.items() if row["kind"] == "replacement"}
        assert len(sets) == 6
        family = [sets[f"transcoder-batchtopk-k{k}"] for k in (8, 16, 32)]
        l0, delta = ([row["metrics"][key] for row in family] for key in ("l0", "delta"))
        assert l0 == sorted(l0), "L0 follows k"
        assert delta == sorted(delta, reverse=True), "δ falls as L0 grows"
        worst = min(rows[name]["metrics"]["delta"] for name in ("zero", "mean"))
        assert rows["neurons k=32"]["metrics"]["delta"] > sets["transcoder-batchtopk-k32"]["metrics"]["delta"]
        for name, row in sets.items():
            assert 0 < row["metrics"]["delta"] < worst / 3, f"{name} clearly beats zero and mean ablation"
            assert row["metrics"]["dead"] < 0.2, f"{name} has too many dead latents"
    report = (tmp_path / "demo/report/report.html").read_text()
    assert "Lowest δ" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "https://" not in report
