"""Small trained runs of every variant (zoo.toml), made once below .parity/, by whichever test process comes first."""

import fcntl
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


def _make(recipe: Path) -> None:
    """Harvest and train, unless this recipe's zoo is there; for one process at a time."""
    ready = ZOO / "ready"
    if ready.is_file() and ready.read_text() == recipe.read_text():
        return
    shutil.rmtree(ZOO, ignore_errors=True)
    ZOO.mkdir(parents=True)
    for command in ("harvest", "train"):
        further = ["--runs", str(RUNS)] if command == "train" else []
        arguments = [command, str(recipe), "--cache", str(CACHE), *further]
        subprocess.run([sys.executable, "-m", "thresher", *arguments], check=True, env=dict(os.environ), cwd=ZOO)
    ready.write_text(recipe.read_text())


def runs() -> Mapping[str, list[Path]]:
    """Run directories by the name of their block in zoo.toml, in the order of layers. Trains what is not there."""
    recipe = HERE / "zoo.toml"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "zoo.lock").open("w") as lock:  # beside the zoo, which is removed
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make(recipe)
    found: dict[str, list[Path]] = {}
    for path in sorted(RUNS.iterdir()):
        group = str(read_config(path)["group"])  # swept lists stand behind the block's name
        found.setdefault(group.split("-layers[")[0].split("-prefixes[")[0], []).append(path)
    return found
