"""The rooms import in one direction only: read from the syntax tree, so that a lazy import counts too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("harvest", "train", "evaluate")
MAY_IMPORT = {
    "cache": {"cache"},
    "harvest": {"harvest", "cache"},
    "train": {"train", "cache"},
    "evaluate": {"evaluate", "cache"},
    "interop": {"interop", "train", "cache"},
    "recipes": {"recipes", "cache"},
    "sharing": {"sharing", "cache", "train"},
    "toy": {"toy", "cache", "evaluate"},
    "commands": {"commands", "toy", "interop", "sharing", "recipes", "cache", *STAGES},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_room_imports_a_room_it_may_not_know(room: str) -> None:
    assert modules(room), f"{room}/ has no modules"
    for path in modules(room):
        for name in imported(path):
            if name.startswith("thresher."):
                assert name.split(".")[1] in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {name}"


def test_sharing_knows_run_directories_and_nothing_else_of_training() -> None:
    known = {"thresher.train.files", "thresher.train.found", "thresher.train.metrics", "thresher.train.tracking"}
    for path in modules("sharing"):
        of_training = {name for name in imported(path) if name.startswith("thresher.train")}
        assert {".".join(name.split(".")[:3]) for name in of_training} <= known, path


def test_the_toy_knows_the_colours_of_the_reports_and_nothing_else_of_evaluation() -> None:
    for path in modules("toy"):
        of_evaluation = {name for name in imported(path) if name.startswith("thresher.evaluate")}
        assert {".".join(name.split(".")[:3]) for name in of_evaluation} <= {"thresher.evaluate.palette"}, path


def test_contracts_and_records_import_no_arrays_on_disk() -> None:
    low = {"errors": set(), "contracts": set(), "records": {"thresher.cache.errors"}, "interrupts": set()}
    for name, allowed in low.items():
        inside = {m for m in imported(ROOT / "cache" / f"{name}.py") if m.startswith("thresher.")}
        assert {".".join(m.split(".")[:3]) for m in inside} <= allowed


def test_only_the_names_for_python_users_the_cli_and_main_stand_at_the_root() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py", "__main__.py"}


def test_rooms_are_imported_under_the_installed_name() -> None:
    for path in [
        *ROOT.glob("*.py"),
        *(p for room in MAY_IMPORT for p in modules(room)),
        *(ROOT / "tests").rglob("*.py"),
    ]:
        for name in imported(path):
            assert name.split(".")[0] not in MAY_IMPORT, f"{path.relative_to(ROOT)} imports {name} without `thresher.`"
