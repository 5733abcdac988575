"""Every block of every page is run here, or checked with the reason beside it, or run by a test that is named."""

import ast
import fnmatch
import inspect
import json
import re
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import thresher as package
from tests.pages import DOCS, ROOT, Block, blocks, check_command, lines, pages
from tests.program import thresher
from thresher.cache.reader import CacheReader
from thresher.commands.tables import known_tables
from thresher.commands.wiring import read_recipe

BLOCKS = [block for page in pages() for block in blocks(page)]
REASONS = {
    "network": "needs the hub, a model that is no part of the repository, or an account",
    "gpu": "needs a GPU",
    "long": "takes minutes",
    "slurm": "is a script for Slurm; the shell reads it",
    "processes": "starts several processes, as tests/train/test_ranks.py does",
    "installs": "changes the machine it runs on, outside its folder",
    "together": "two commands that run side by side; tests/test_cli_rolling.py runs them",
}
"""Why a block of commands is only checked: they, their options, recipes and keys have to exist."""
PACKAGES = {"saelens": "needs SAELens, which is no dependency; tests/interop/test_objects.py has one of its surface"}
"""Why a block of Python is only checked: what it takes of ours has to exist and to take what it is given."""
ELSEWHERE = {("extending", "*"): "test_extending.py", ("training", "thresher harvest*"): "test_training_page.py"}
"""By page and first line: the test that runs a block."""
SMALL = (
    *("data.max_tokens=8000", "data.context=64", "data.test_fraction=0.3", "data.validation_fraction=0.3"),
    *("dictionary.expansion=0.5", "train.batch_rows=256", "train.epochs=0.2", "train.calibrate_rows=2000"),
    *("evaluate.tokens=300", "evaluate.resamples=100", "evaluate.training_tokens=1000", "evaluate.neurons=[32]"),
)
"""What makes the commands of the pages a matter of seconds: added behind them."""
MAKES = {"make demo": "thresher demo"}
"""Targets of the Makefile that run one command in an environment of their own; here, in this one."""
OTHERS = {"python", "hf", "wandb", "rm"}
"""Programs beside ours that pages may call, in blocks that are checked."""


def elsewhere(block: Block) -> str | None:
    """The test that runs a block."""
    first = block.text.splitlines()[0]
    found = [test for (page, line), test in ELSEWHERE.items() if page == block.page and fnmatch.fnmatch(first, line)]
    return found[0] if found else None


def way(block: Block) -> str:
    """What is done with a block; a KeyError or AssertionError for one that fits nowhere."""
    reasons = PACKAGES if block.language == "python" else REASONS
    assert block.flags <= reasons.keys(), f"{block.where}: {set(block.flags)} is none of {', '.join(reasons)}"
    if elsewhere(block):
        return "elsewhere"
    if block.language == "bash":
        plain = all(words[0] in ("make", "pip") for words in lines(block))
        return "checked" if block.flags or (plain and block.text.strip() not in MAKES) else "run"
    if block.language == "python" and block.flags:
        return "checked"
    assert not block.flags, f"{block.where}: only commands and Python can be left for another place"
    assert block.language in ("python", "toml", "json", "yaml", "text"), f"{block.where}: say what it is"
    return {"python": "run", "text": "shown"}.get(block.language, "read")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_every_block_is_run_read_or_checked(block: Block) -> None:
    """And what is only shown is no command and no code."""
    if way(block) == "shown":
        assert not re.search(r"^(\$|>>>|thresher|make|pip|python|import|from|def) ?", block.text, re.MULTILINE)
    if test := elsewhere(block):
        assert f"docs/{block.page}.md" in (ROOT / "tests" / test).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("language", "flags", "text"),
    [
        ("", "", "thresher demo"),
        ("text", "", "$ thresher demo"),
        ("bash", "soon", "thresher demo"),
        ("python", "network", "import thresher"),
        ("python", "saelens", "thresher.to_saelense('runs/mine')"),
        ("python", "saelens", "thresher.to_saelens('runs/mine', dtype=1)"),
        ("python", "saelens", "print('hello')"),
        ("bash", "network", "thresher harvest gpt3-small"),
        ("bash", "network", "thresher harvest gpt2-small --sett data.max_tokens=1"),
        ("bash", "network", "thresher harvest gpt2-small --set data.tokens=1"),
        ("bash", "long", "python benchmarks/nothing.py"),
        ("bash", "processes", "torchrun --nproc-per-node 2 -m thresher tain books-demo"),
        ("bash", "slurm", "srun torchrun -m thresher tain mine.toml &"),
        ("bash", "slurm", "if srun thresher train mine.toml"),
        ("bash", "", "make dinner"),
    ],
)
def test_a_block_that_fits_nowhere_or_is_wrong_is_noticed(language: str, flags: str, text: str) -> None:
    block = Block("page", 1, language, frozenset(flags.split()), f"{text}\n")
    noticed: list[Exception] = []
    for test in (test_every_block_is_run_read_or_checked, test_commands_that_cannot_run_here_exist):
        try:
            test(block)
        except Exception as error:
            noticed.append(error)
    assert noticed
    assert not any(isinstance(error, (TypeError, AttributeError, IndexError)) for error in noticed)


@pytest.mark.parametrize("block", [b for b in BLOCKS if way(b) == "checked"], ids=lambda block: block.where)
def test_commands_that_cannot_run_here_exist(block: Block) -> None:
    if block.language == "python":
        check_code(block)
        return
    if "slurm" in block.flags:
        check_script(block)
        return
    for words in lines(block):
        if words[0] in ("thresher", "torchrun"):
            check_command(words[words.index("-m") + 1 :] if words[0] == "torchrun" else words)
        elif words[0] == "make":
            assert set(words[1:]) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        elif words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).is_file()
        elif words[0] == "pip":
            assert words[1] == "install"
        else:
            assert Path(words[0]).name in OTHERS


def check_script(block: Block) -> None:
    """Raise unless a shell can read a script, and the commands of ours in it can be called so."""
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    ours = [words for words in lines(block) if "thresher" in words]
    assert ours, f"{block.where}: nothing of ours is in it"
    for words in ours:
        if "torchrun" in words:
            assert words[words.index("thresher") - 1] == "-m"
        check_command([word for word in words[words.index("thresher") :] if word != "&"])


def check_code(block: Block) -> None:
    """Raise unless a block takes something of `thresher`, and calls it as it can be called."""
    tree = ast.parse(block.text)
    taken = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "thresher"
    ]
    assert taken, f"{block.where}: nothing of ours is in it, so nothing can be checked"
    assert {node.attr for node in taken} <= set(package.__all__), f"{block.where}: thresher has no such name"
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and call.func in taken:
            assert isinstance(call.func, ast.Attribute)
            given = {word.arg or "": word.value for word in call.keywords}
            try:
                inspect.signature(getattr(package, call.func.attr)).bind(*call.args, **given)
            except TypeError as error:
                raise AssertionError(f"{block.where}: {error}") from error


@pytest.mark.parametrize("block", [b for b in BLOCKS if way(b) == "read"], ids=lambda block: block.where)
def test_recipes_and_documents_of_the_pages_can_be_read(block: Block, tmp_path: Path) -> None:
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    else:
        read_tables(block.text, tmp_path / "page.toml")


def read_tables(text: str, path: Path) -> None:
    """A recipe, or a part of one: with the bundled recipe's tables in the places of those it leaves out."""
    given = tomllib.loads(text)
    assert given.keys() <= known_tables().keys() | {"sweep", "about"}
    missing = [f"[{table}]\n" for table in ("target", "data", "harvest", "dictionary") if table not in given]
    path.write_text(text + "\n" + "".join(missing), encoding="utf-8")
    fill = ["target.model=bundled:books-128", "data.source=bundled:books"]
    read_recipe(str(path), [line for line in fill if line.split(".")[0] not in given])


def test_every_block_of_the_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder, page after page as the site has them, as a reader would who tries everything once."""
    folder = tmp_path
    monkeypatch.chdir(folder)
    done: dict[str, str] = {}
    scopes: dict[str, dict[str, Any]] = {}
    for block in BLOCKS:
        name = re.match(r"# ([\w-]+\.(?:toml|yaml))\b", block.text)
        if name and way(block) == "read":
            (folder / name[1]).write_text(block.text, encoding="utf-8")
        if way(block) != "run":
            continue
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            if block.language == "python":
                scope = scopes.setdefault(block.page, {"__name__": block.page})
                exec(compile(block.text, block.where, "exec"), scope)
            else:
                for words in lines(block):
                    obey(words, block, folder, done)
    rows = scopes["formats"]["rows"]
    with CacheReader.open(folder / "demo/cache.zarr") as reader:
        expected = reader.gather("test", "L02.mlp_in", np.arange(len(rows)))
        assert len(rows) == reader.rows("test")
    np.testing.assert_array_equal(rows, expected.numpy())
    an_import_is_judged_as_the_original(folder / "reports/both/results.json")


def an_import_is_judged_as_the_original(results: Path) -> None:
    """Of the page of other tools: a run, and itself on the way back from another tool's files, in one report."""
    judged: dict[str, dict[str, Any]] = {"sae-topk": {}, "back": {}}
    for row in json.loads(results.read_text(encoding="utf-8"))["rows"]:
        if row["name"] in judged:
            judged[row["name"]][row["protocol"]] = row
    original, imported = judged.values()
    assert len(original) == 3, "protocols"
    assert original.keys() == imported.keys()
    for protocol, row in original.items():
        for part in ("metrics", "intervals", "cost"):
            assert row[part].keys() == imported[protocol][part].keys()
            for name, number in row[part].items():
                assert imported[protocol][part][name] == pytest.approx(number, rel=1e-5, abs=1e-9), (protocol, name)
        assert row["metrics"]["l0"] > 0, "it does something"


def obey(words: list[str], block: Block, folder: Path, done: dict[str, str]) -> None:
    """One line of a shell. What ran before with the same words is not run again, unless files were removed since."""
    line = " ".join(words)
    if line in MAKES:
        assert MAKES[line] in (ROOT / "Makefile").read_text(encoding="utf-8")
        words = MAKES[line].split()
    if words[0] != "thresher":
        done.clear()
        subprocess.run(line, shell=True, cwd=folder, check=True)
        return
    mark = next((at for at, word in enumerate(words) if word in ("|", ">")), len(words))
    command, rest = words[1:mark], words[mark:]
    command = [found for word in command for found in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    check_command(["thresher", *command])
    key = " ".join(command)
    if key not in done:
        result = thresher(folder, *command, sets=shrunk(command))
        assert result.returncode == 0, f"{block.where}: {line}\n{result.stdout}{result.stderr}"
        done[key] = result.stdout
    if rest[:1] == [">"]:
        (folder / rest[1]).write_text(done[key], encoding="utf-8")
    elif rest:
        assert rest[1] == "python", f"{block.where}: a pipe into {rest[1]}"
        subprocess.run([sys.executable, *rest[2:]], input=done[key], text=True, stdout=subprocess.PIPE, check=True)


def shrunk(command: list[str]) -> list[str]:
    """Overrides for a command that takes them; of runs that were named only how much is judged."""
    if command[0] not in ("harvest", "train", "evaluate", "demo", "import") and command[:2] != ["cache", "estimate"]:
        return []
    named = command[0] == "evaluate" and Path(command[1]).is_dir()
    return [item for item in SMALL if not named or item.startswith("evaluate.")]


def test_the_pages_are_all_there() -> None:
    assert {page.stem for page in DOCS.glob("*.md")} | {"README"} == {page.stem for page in pages()}
