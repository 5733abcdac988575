"""A wheel built from the repository, installed outside the checkout, is the whole program."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = sorted({name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"] if "." in name})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what `python -m build` makes: the source distribution, and from that the wheel.

    Built from a copy, so that nothing left over in the checkout's `build/` slips in.
    """
    source = tmp_path_factory.mktemp("source") / "thresher"
    keep_out = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "demo", "caches", "runs", "reports"
    )
    shutil.copytree(ROOT, source, ignore=keep_out)
    out = tmp_path_factory.mktemp("built")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(source)], check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and nothing else; the dependencies are lent by the running one.

    A line in a .pth file lends a directory without reading the .pth files in it, so the checkout itself, which the
    running environment knows through one, stays out of sight.
    """
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(home)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    assert {path.name for path in site.iterdir() if path.name.startswith("thresher")} >= {"thresher"}
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home


def run(environment: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The console script of `environment`, started in `folder`, with no trace of the checkout in its variables."""
    variables = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "THRESHER", "VIRTUAL"))
    }
    return subprocess.run(
        [environment / "bin" / arguments[0], *arguments[1:]], cwd=folder, env=variables, capture_output=True, text=True
    )


def test_the_wheel_puts_only_thresher_at_the_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"thresher"}


def test_the_wheel_carries_every_module_and_all_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    expected = {
        f"thresher/{path.relative_to(ROOT).as_posix()}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"thresher/{path.name}" for path in ROOT.glob("*.py")}
    expected |= {"thresher/py.typed"}  # by which type checkers know that our annotations are meant for them
    assert expected == {name for name in inside if name.startswith("thresher/")}


def test_the_source_distribution_is_the_whole_project(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "Makefile", "constraints.txt", "mkdocs.yml"}
    for folder in ("tests", "docs", "benchmarks"):
        wanted |= {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
    assert wanted <= inside, wanted - inside


def test_what_was_built_may_be_uploaded(built: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_version_is_told_in_one_place_and_changed_in_the_changelog(environment: Path, tmp_path: Path) -> None:
    version = PROJECT["project"]["version"]
    assert run(environment, tmp_path, "thresher", "--version").stdout == f"thresher {version}\n"
    (newest,) = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[:1]
    assert re.fullmatch(rf"{re.escape(version)} \((unreleased|\d{{4}}-\d{{2}}-\d{{2}})\)", newest), newest


def test_an_empty_environment_runs_the_program_from_elsewhere(environment: Path, tmp_path: Path) -> None:
    where = run(environment, tmp_path, "python", "-c", "import thresher.cli as m; print(m.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(environment), where.stdout + where.stderr
    listed = run(environment, tmp_path, "thresher", "recipes", "list")
    assert listed.returncode == 0, listed.stderr
    assert "books-demo" in listed.stdout


def test_the_demo_runs_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    """The whole path on the bundled model, with few tokens and steps; `thresher demo` runs it in full.

    Training takes the plain kernels: Numba would compile its own once more for this second place on the disk, and does
    so for those of the cache.
    """
    small = [
        "data.max_tokens=24000",
        "data.test_fraction=0.25",
        "data.validation_fraction=0.15",
        "dictionary.expansion=2",
        "train.epochs=0.2",
        "train.kernels=plain",
        "evaluate.tokens=1500",
        "evaluate.resamples=100",
    ]
    arguments = [part for item in small for part in ("--set", item)]
    done = run(environment, tmp_path, "thresher", "demo", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "demo/report/report.html").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"demo"}


def test_every_imported_package_is_declared() -> None:
    project = PROJECT["project"]
    declared = {re.split(r"[<>=\[ ]", line)[0].replace("-", "_") for line in project["dependencies"]}
    declared |= {"yaml"} if "PyYAML" in declared else set()  # those whose modules are called otherwise
    declared |= {"sklearn"} if "scikit_learn" in declared else set()
    imported = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                imported |= {name.split(".")[0] for name in names}
    ours = imported - set(sys.stdlib_module_names) - {"thresher"}
    # by transformers, numba, datasets, and builds of torch for CUDA
    brought_along = {"huggingface_hub", "llvmlite", "pyarrow", "triton"}
    assert ours <= declared | brought_along, ours - declared
