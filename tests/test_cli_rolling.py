"""Rolling and live mode on the command line: the same dictionary comes out, whoever keeps the shards."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import load_file

from tests.program import environment, line_of, thresher

SETS = (
    "data.max_tokens=60000",
    "data.context=128",
    "data.test_fraction=0.25",
    "harvest.sites=['mlp_in','mlp_out']",
    "harvest.layers=[1,2]",
    "harvest.window_gb=0.014",
    "dictionary.expansion=2",
    "train.batch_rows=1024",
    "train.epochs=1.5",
    "train.checkpoint_every=15",
    "train.calibrate_rows=4096",
    "evaluate.tokens=1500",
    "evaluate.resamples=100",
)
RECIPE = """
[target]
[data]
[harvest]
[dictionary]
kind = "transcoder"
firing = "batchtopk"
k = 8
[train]
[evaluate]
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "thresher", *line_of(arguments, SETS)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, *arguments: str) -> str:
    done = thresher(folder, *arguments, sets=SETS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def weights(folder: Path) -> dict[str, bytes]:
    """Every array of every run, by run and name."""
    files: Sequence[Path] = sorted(folder.glob("*/weights.safetensors"))
    assert len(files) == 2
    return {f"{file.parent.name}/{name}": a.tobytes() for file in files for name, a in load_file(file).items()}


def test_rolling_and_live_give_the_same_dictionaries_and_rolling_survives_a_kill_of_both(tmp_path: Path) -> None:
    (tmp_path / "roll.toml").write_text(RECIPE)
    live = run(tmp_path, "train", "roll.toml", "--live", "--runs", "live")
    assert "Live from" in live
    windows = int(live.split(" windows of ")[0].split()[-1])
    assert windows > 3, "the bound is to be felt"

    harvest = start(tmp_path, "harvest", "roll.toml", "--cache", "ring")
    train = start(tmp_path, "train", "roll.toml", "--cache", "ring")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/roll/*/checkpoints/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    train.kill()
    harvest.kill()
    train.communicate()
    harvest.communicate()
    assert not (tmp_path / "ring" / "MANIFEST.json").exists()

    harvest = start(tmp_path, "harvest", "roll.toml", "--cache", "ring")
    said = run(tmp_path, "train", "roll.toml", "--cache", "ring", "--resume")
    assert "2 dictionaries" in said
    filled, _ = harvest.communicate(timeout=60)
    assert harvest.returncode == 0, filled
    assert "Training is over" in filled
    assert weights(tmp_path / "runs" / "roll") == weights(tmp_path / "live")

    said = run(tmp_path, "evaluate", "roll.toml", "--cache", "ring")
    assert "Pareto front" in said
