"""Environments of the foreign packages, made below .parity/ in the checkout on first use.

A machine's own pip settings decide where packages come from. The interpreter is the one that runs this, or the one that
THRESHER_PARITY_PYTHON names (the packages want Python 3.11 or 3.12).
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FOLDER = ROOT / ".parity"
LATEST = os.environ.get("THRESHER_PARITY") == "latest"


def environments() -> dict[str, dict[str, Any]]:
    """The tables of environments.toml, under `latest` those that have such a list."""
    tables = tomllib.loads((HERE / "environments.toml").read_text())
    return {
        name: table for name, table in tables.items() if isinstance(table, dict) and (not LATEST or "latest" in table)
    }


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is made if it is not there or its list has changed."""
    table = environments()[name]
    wanted = repr((table, LATEST))
    home = FOLDER / (f"{name}-latest" if LATEST else name)
    home.parent.mkdir(exist_ok=True)
    with home.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready = home / "ready"
        if not ready.is_file() or ready.read_text() != wanted:
            _make(home, table)
            ready.write_text(wanted)
    return home / "bin" / "python"


def _make(home: Path, table: Mapping[str, Any]) -> None:
    torch = tomllib.loads((HERE / "environments.toml").read_text())["torch"]
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (home / "constraints.txt").write_text(f"{torch}\n")
    interpreter = os.environ.get("THRESHER_PARITY_PYTHON", sys.executable)
    subprocess.run([interpreter, "-m", "venv", str(home)], check=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    install = [*pip, "install", "-c", str(home / "constraints.txt")]
    subprocess.run([*install, torch], check=True)  # first, so that nothing pulls another
    packages = table["latest" if LATEST else "packages"]
    subprocess.run([*install, *packages], check=True)
    if table.get("bare"):
        subprocess.run([*install, "--no-deps", *table["bare"]], check=True)
    if table.get("thresher"):
        subprocess.run([*install, "--no-deps", "--editable", str(ROOT)], check=True)
    if table.get("remove"):
        subprocess.run([*pip, "uninstall", "--yes", *table["remove"]], check=True)


def run(environment: str, script: str, arguments: Sequence[str | Path]) -> str:
    """What a script of foreign/ prints last, run by an environment's interpreter: the package and its version.

    Raises RuntimeError with the end of its output when it fails.
    """
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environments()[environment].get("variables", {})}
    command = [str(python_of(environment)), str(HERE / "foreign" / script), *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} in {environment} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout.strip().splitlines()[-1]
