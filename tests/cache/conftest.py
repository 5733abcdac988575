"""Fixtures: the toy harvest of `fill.py`, finished caches of it, and a server that runs it in children to be killed."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_FILL = Path(__file__).with_name("fill.py")
_OWN_MOUNTS = ("unshare", "-Urm", "sh", "-c")


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("thresher_toy_fill", _FILL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def finished(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Path of a finished toy cache that nobody changes, made once for each combination of settings."""
    made: dict[tuple[tuple[str, Any], ...], Path] = {}

    def get(**changes: Any) -> Path:
        key = tuple(sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("cache") / "toy.zarr"
            toy.fill(made[key], **changes)
        return made[key]

    return get


@pytest.fixture
def copied(finished: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished int8z cache of one's own, to be damaged."""
    path = tmp_path / "copy.zarr"
    shutil.copytree(finished(), path)
    return path


class Victims:
    """Runs toy harvests in child processes. Called with a path and a command, it returns what the child said: "done",
    a UserError's text, or "killed"."""

    def __init__(self, *prefix: str) -> None:
        self._server = subprocess.Popen(
            [*prefix, sys.executable, str(_FILL)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, path: Path, **command: Any) -> str:
        return self.together(path, command)[0]

    def together(self, path: Path, *commands: dict[str, Any]) -> list[str]:
        """Run several at once."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([{"path": str(path), **command} for command in commands]) + "\n")
        self._server.stdin.flush()
        return [str(answer) for answer in json.loads(self._server.stdout.readline())]

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=10)


@pytest.fixture(scope="session")
def victim() -> Iterator[Victims]:
    """Run the toy harvest in children that may be killed."""
    victims = Victims()
    yield victims
    victims.close()


@pytest.fixture(scope="session")
def small_disk() -> Iterator[Callable[[Path, int], Victims]]:
    """Children that see an empty file system of so many bytes at a path; skips where it cannot be mounted."""
    opened: list[Victims] = []

    def mounted(path: Path, size: int) -> Victims:
        mount = f"mount -t tmpfs -o size={size} none '{path}'"
        if not shutil.which("unshare") or subprocess.run([*_OWN_MOUNTS, mount], check=False).returncode:
            pytest.skip("no small file system can be mounted here (unshare -Urm, tmpfs)")
        opened.append(Victims(*_OWN_MOUNTS, f'{mount} && exec "$@"', "sh"))
        return opened[-1]

    yield mounted
    for victims in opened:
        victims.close()


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a cache by relative path, without locks."""

    def read(path: Path) -> dict[str, bytes]:
        files = (file for file in path.rglob("*") if file.is_file() and file.suffix != ".lock")
        return {str(file.relative_to(path)): file.read_bytes() for file in files}

    return read
