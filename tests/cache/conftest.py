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


@pytest.fixture(scope="session")
def victim() -> Iterator[Callable[..., str]]:
    """Run the toy harvest in a child process and return what it said; "killed" when it died."""
    server = subprocess.Popen([sys.executable, str(_FILL)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(path: Path, **command: Any) -> str:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps({"path": str(path), **command}) + "\n")
        server.stdin.flush()
        return str(json.loads(server.stdout.readline()))

    yield run
    assert server.stdin is not None
    server.stdin.close()
    server.wait(timeout=10)


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a cache by relative path, without locks."""

    def read(path: Path) -> dict[str, bytes]:
        files = (file for file in path.rglob("*") if file.is_file() and file.suffix != ".lock")
        return {str(file.relative_to(path)): file.read_bytes() for file in files}

    return read
