"""What the program shows, and to whom: help with examples, completion, documents for scripts, plain text in pipes."""

import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import shellingham
from typer.testing import CliRunner

from tests.documents import PAGE, document, documented
from tests.pages import PROGRAM, check_command
from tests.program import environment
from tests.test_cli import commands
from thresher import cli
from thresher.cache.records import described
from thresher.commands import completion
from thresher.commands.options import out
from thresher.commands.tables import TABLES, known_tables

ESCAPE = "\x1b"


ELSEWHERE = (["recipes", "list"], ["recipes", "check"])
"""Examples that other tests run."""


def program(*words: str) -> Any:
    """What `thresher WORDS` does, in this process; standard output and error apart."""
    return CliRunner().invoke(cli.app, list(words), catch_exceptions=False, prog_name="thresher")


def examples() -> Iterator[tuple[str, list[str]]]:
    """Every example of every help: the command it stands under, and its words."""
    for words, command in commands(PROGRAM):
        for line in (command.epilog or "").splitlines():
            text = re.sub(r"(?<!\\)\[/?[a-z]*\]", "", line).replace("\\[", "[")
            if text.startswith("$ "):
                yield " ".join(words), shlex.split(text.removeprefix("$ "))


@pytest.mark.parametrize("words", [words for words, _ in commands(PROGRAM)], ids=" ".join)
def test_help_fits_the_screen_and_leaves_use_to_examples(words: list[str]) -> None:
    lines = CliRunner().invoke(cli.app, [*words, "--help"], env={"COLUMNS": "80"}).output.rstrip().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    shown = [example for under, example in examples() if under == " ".join(words)]
    assert len(shown) in range(4)
    if not hasattr(dict(commands_by_name())[" ".join(words)], "commands"):
        assert shown, "a command without an example"


def commands_by_name() -> Iterator[tuple[str, Any]]:
    for words, command in commands(PROGRAM):
        yield " ".join(words), command


@pytest.mark.parametrize(
    ("under", "words"), list(examples()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_examples_name_commands_options_recipes_and_keys_that_exist(under: str, words: list[str]) -> None:
    check_command(words, under)


@pytest.mark.parametrize(
    "words",
    [words[1:] for under, words in examples() if under.startswith("recipes ") and words[1:] not in ELSEWHERE],
    ids=lambda words: " ".join(words),
)
def test_examples_that_cost_nothing_run(words: list[str]) -> None:
    if ">" in words:
        words = words[: words.index(">")]
    done = program(*words)
    assert done.exit_code == 0, done.output
    assert done.stdout


def test_the_pipe_of_the_page_prints_what_the_page_says() -> None:
    (line,) = re.findall(r"^```bash\n(.+)\n```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ours, _, theirs = line.partition(" | python -c ")
    done = program(*shlex.split(ours)[1:])
    (code,) = shlex.split(theirs)
    told = subprocess.run([sys.executable, "-c", code], input=done.stdout, capture_output=True, text=True, check=True)
    assert f"prints {told.stdout.strip()}." in PAGE.read_text(encoding="utf-8")


# --- completion -----------------------------------------------------------------------------------------------------


def offered(line: str, folder: Path) -> list[str]:
    """What bash is offered at the end of a line, by a program that must not load PyTorch for it."""
    code = (
        "import sys; sys.argv = ['thresher']; from thresher.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    words = shlex.split(line)
    count = len(words) if line.endswith(" ") else len(words) - 1
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(count), "_THRESHER_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment() | asked, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_the_shell_is_offered_recipes_keys_runs_and_caches(tmp_path: Path) -> None:
    for run in ("runs/mine/sae-L01", "runs/mine/sae-L02", "runs/other"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.json").write_text("{}")
    (tmp_path / "caches/a.zarr").mkdir(parents=True)
    (tmp_path / "books-mine.toml").write_text("")
    assert offered("thresher harvest books-", tmp_path) == [
        "books-demo",
        "books-study",
        "books-sweep",
        "books-mine.toml",
    ]
    assert offered("thresher train x --set train.lo", tmp_path) == ["train.local_weight=", "train.log_every="]
    assert offered("thresher evaluate runs/mine/", tmp_path) == ["runs/mine/sae-L01", "runs/mine/sae-L02"]
    assert offered("thresher cache info ", tmp_path) == ["caches/a.zarr"]


def test_keys_offered_are_those_of_the_tables() -> None:
    for table, kind in known_tables().items():
        told = [(key, text) for key, _, _, text in described(kind)]
        assert sorted(completion.fields(TABLES[table])) == sorted(told)
    assert [key for key, _ in completion.keys("train.lo")] == ["train.local_weight=", "train.log_every="]
    assert len(completion.keys("")) == sum(len(list(described(kind))) for kind in known_tables().values())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_script(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever shell, if any, the tests were started from."""
    monkeypatch.setattr(shellingham, "detect_shell", lambda: (shell, f"/bin/{shell}"))
    done = program("--show-completion")
    assert done.exit_code == 0
    assert "_THRESHER_COMPLETE" in done.stdout
    assert {"bash": "complete -o", "zsh": "compdef", "fish": "complete --command"}[shell] in done.stdout


# --- documents ------------------------------------------------------------------------------------------------------


def test_every_command_that_takes_json_is_documented() -> None:
    """What they print is held to the page where the commands are tested."""
    takes = {" ".join(words) for words, command in commands(PROGRAM) if any("--json" in p.opts for p in command.params)}
    assert takes == documented().keys()


@pytest.mark.parametrize("line", ["recipes list", "recipes check gpt2-small", "recipes keys train"])
def test_recipes_are_told_as_documents(line: str) -> None:
    found = document(line.removesuffix(" gpt2-small").removesuffix(" train"), program(*line.split(), "--json").stdout)
    if line == "recipes list":
        assert {each["name"] for each in found["recipes"]} >= {"books-demo", "gpt2-small"}
    elif line == "recipes keys train":
        assert found["tables"]["train"]["lr"]["type"]
    else:
        (recipe,) = found["recipes"]
        assert recipe["dictionaries"] >= len(recipe["variants"]) > 0
        assert found["failed"] == {}


def test_people_read_the_same_lines_with_and_without_a_document() -> None:
    plain, scripted = program("recipes", "keys", "harvest"), program("recipes", "keys", "harvest", "--json")
    assert plain.stdout == scripted.stderr
    assert plain.stderr == ""
    assert json.loads(scripted.stdout)["tables"]["harvest"]["codec"]["default"] == '"int8z"'
    assert program("recipes", "keys", "harvest").stdout == plain.stdout  # and standard output is itself again


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("harvest nowhere --json", 2, "neither a file nor a bundled recipe"),
        ("harvest --json", 2, "Missing argument"),
        ("cache prune --older-than soon --json", 2, "--older-than"),
        ("recipes check --markdown --json", 2, "Give one of them"),
    ],
)
def test_errors_are_documents_too(
    line: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["thresher", *line.split()])
    monkeypatch.setattr(cli.signal, "signal", lambda *given: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capfd.readouterr()
    assert end.value.code == code
    assert words in json.loads(told.out)["error"]
    assert told.err.startswith("error: ")


# --- what a terminal can show -----------------------------------------------------------------------------------------


def on_a_terminal(words: Sequence[str], folder: Path, **variables: str) -> str:
    """All that the program writes to a terminal."""
    ours, theirs = pty.openpty()
    env = {key: value for key, value in environment().items() if key not in ("NO_COLOR", "TERM", "FORCE_COLOR")}
    command = [sys.executable, "-m", "thresher", *words]
    with subprocess.Popen(command, cwd=folder, env=env | variables, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        text = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                read = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            text += read
        process.wait(60)
    os.close(ours)
    return text.decode()


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38;[\d;]+)(?:;\d+)*m")


def test_colours_go_where_they_are_not_wanted(tmp_path: Path) -> None:
    words = ("harvest", "books-demo", "--extend")  # refused before anything is loaded
    assert COLOUR.search(on_a_terminal(words, tmp_path, TERM="xterm-256color"))
    assert not COLOUR.search(on_a_terminal(words, tmp_path, TERM="xterm-256color", NO_COLOR="1"))
    assert ESCAPE not in on_a_terminal(words, tmp_path, TERM="dumb")


def test_narrow_terminals_lose_nothing_over_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "width", 40)
    lines = program("recipes", "keys", "harvest").stdout.splitlines()
    assert max(map(len, lines)) <= 40
