"""SAEs that SAELens trained and SAEs of ours, of one shape and on the same activations, in one table.

    python -m tests.parity.pareto OUT

Harvests the bundled model, trains with SAELens in its own environment and with Thresher (pareto.toml) on as many rows
of one site, imports the former, and evaluates all of them together under one protocol; OUT gets cache, runs and report.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from tests.parity import environments
from thresher.cache.reader import CacheReader

RECIPE = environments.HERE / "pareto.toml"
SITE, HOOK = "L01.mlp_out", "blocks.1.hook_mlp_out"
SETTINGS = {"d_sae": 1024, "batch": 2048, "steps": 300, "model_name": "books-128", "hook_name": HOOK}
K = 16
RATES = (5e-4, 2e-3, 8e-3, 3.2e-2)
"""Learning rates that both are trained at: one rate is not the same step for rows of norm 1 as for rows that start at
norm 0.1, so each is judged at its own best."""


def thresher(*arguments: str | Path, cwd: Path) -> None:
    """Run a command of ours."""
    subprocess.run([sys.executable, "-m", "thresher", *map(str, arguments)], check=True, cwd=cwd)


def main(out: Path) -> None:
    """All of it; what is there already is used again."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    cache, runs = out / "cache", out / "runs"
    thresher("harvest", RECIPE, "--cache", cache, cwd=out)
    thresher("train", RECIPE, "--cache", cache, "--runs", runs, cwd=out)
    rows = out / "rows.safetensors"
    with CacheReader.open(cache) as reader:
        save_file({"x": reader.gather("train", SITE, np.arange(reader.rows("train")))}, rows)
    for rate in RATES:
        name = f"saelens-batchtopk-lr{rate:g}"
        settings, made = out / f"{name}.json", out / name
        settings.write_text(json.dumps(SETTINGS | {"k": K, "lr": rate, "seed": 0}))
        print(environments.run("saelens", "train_saelens.py", [rows, settings, made]))
        thresher("import", made, RECIPE, "--from", "saelens", "--cache", cache, "--runs", runs, "--name", name, cwd=out)
    thresher("evaluate", runs, "--cache", cache, "--out", out / "report", "--set", "evaluate.tokens=10000", cwd=out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
