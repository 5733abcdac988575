"""Small trained runs of every variant (zoo.toml), made once below .parity/."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.parity.environments import FOLDER, HERE
from thresher.train.files import read_config

ZOO = FOLDER / "zoo"
CACHE, RUNS = ZOO / "cache", ZOO / "runs"


def runs() -> Mapping[str, list[Path]]:
    """Run directories by the name of their block in zoo.toml, in the order of layers. Trains what is not there."""
    recipe = HERE / "zoo.toml"
    ready = ZOO / "ready"
    if not ready.is_file() or ready.read_text() != recipe.read_text():
        shutil.rmtree(ZOO, ignore_errors=True)
        ZOO.mkdir(parents=True)
        for command in ("harvest", "train"):
            further = ["--runs", str(RUNS)] if command == "train" else []
            arguments = [command, str(recipe), "--cache", str(CACHE), *further]
            subprocess.run([sys.executable, "-m", "thresher", *arguments], check=True, env=dict(os.environ), cwd=ZOO)
        ready.write_text(recipe.read_text())
    found: dict[str, list[Path]] = {}
    for path in sorted(RUNS.iterdir()):
        group = str(read_config(path)["group"])  # swept lists stand behind the block's name
        found.setdefault(group.split("-layers[")[0].split("-prefixes[")[0], []).append(path)
    return found
