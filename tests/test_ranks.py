"""The program as one of several processes: what it refuses, and who says what."""

import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.program import thresher
from thresher import cli
from thresher.cache import roster
from thresher.cache.interrupts import Interrupted, deferred_interrupts
from thresher.cache.roster import Roster
from thresher.cache.world import World
from thresher.commands import train as commands
from thresher.train import run
from thresher.train.run import RunResult


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "_GRACE_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("line", "sets", "why"),
    [
        (["demo"], [], "thresher demo is for one process, and this job has 2"),
        (["target", "train", "target-books-gpt2"], [], "a target is trained by one process"),
        (["train", "books-demo", "--live"], [], "every process would run the target"),
        (["train", "books-demo"], ["harvest.window_gb=1"], "a ring has one reader"),
    ],
)
def test_what_one_process_does_alone_is_refused_on_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str], sets: list[str], why: str
) -> None:
    as_rank(monkeypatch, 0)
    done = thresher(tmp_path, *line, sets=sets)
    assert done.returncode == 2
    assert why in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_other_ranks_name_themselves_and_leave_documents_and_stops_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(monkeypatch, 1)
    done = thresher(tmp_path, "train", "no-such-recipe", "--json", sets=[])
    assert done.returncode == 2
    assert done.stderr.startswith("rank 1 of 2: error: ")
    assert done.stdout == ""

    def stopped() -> None:
        raise Interrupted("Stopped at step 3.")

    monkeypatch.setattr(cli, "app", stopped)
    done = thresher(tmp_path, "train", "books-demo", sets=[])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_rank_that_is_no_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = thresher(tmp_path, "train", "books-demo", "--live", sets=[])
    assert done.returncode == 2
    assert "RANK is 'first'; expected a whole number" in done.stderr


def test_the_echo_of_a_signal_is_no_second_one() -> None:
    with deferred_interrupts(echo_s=60.0) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
    with deferred_interrupts() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("rank", "code"), [(0, 1), (1, 0)])
def test_a_run_that_was_set_aside_on_any_rank_ends_the_first_one_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, code: int
) -> None:
    """As one process ends; torchrun takes the job's exit code from it."""
    met = Roster()
    met.world = World(rank=rank, size=2)
    failed = RunResult("elsewhere", "elsewhere", tmp_path, "failed", {"failed": "the loss is nan"})
    monkeypatch.setattr(roster, "meet", lambda *given, **settings: met)
    monkeypatch.setattr(run, "train", lambda *given, **settings: [failed] if met.world.speaks else [])
    monkeypatch.setattr(commands, "open_source", lambda *given: nullcontext(SimpleNamespace(sites={}, finish=bool)))
    monkeypatch.setattr(commands, "plans_of", lambda *given: [])
    done = thresher(tmp_path, "train", "books-demo", sets=[])
    assert done.returncode == code, done.stderr
    assert ("failed: elsewhere" in done.stdout) == (rank == 0)
