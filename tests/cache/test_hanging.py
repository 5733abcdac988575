"""A rank that hangs, is stopped or dies ends its job within a bounded time, with one message that names it."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cache import hanging
from tests.ranks import on_ranks
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted, StopFlag
from thresher.cache.progress import STALL_VARIABLE, Bounds, Progress, bounds_from_environment
from thresher.cache.roster import Roster


class Ended(NamedTuple):
    """What became of a process."""

    code: int
    said: str
    seconds: float


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Ended]]:
    """Of both ranks of every job of hanging.py."""
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run(
        [sys.executable, hanging.__file__], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return {case: [Ended(*each) for each in ranks] for case, ranks in json.loads(done.stdout).items()}


AGAIN = "What was saved before is whole. Go on with --resume."
STANDS = "hangs: it has made no progress for [12] s, in sleeping"
SILENT = "has died or hangs: nothing was heard of it for 2.5 s"


@pytest.mark.parametrize(
    ("case", "words", "ends"),
    [
        ("rank 1 sleeps", rf"Rank 1 of 2 {STANDS} .* Saved at step \d+\.", (2, 130)),
        ("rank 0 sleeps", rf"Rank 0 of 2 {STANDS} .*{AGAIN}", (2, 130)),
        (
            "rank 1 sleeps in a collective",
            rf"Rank 1 of 2 {STANDS} .* Rank 0 of 2 did not come to its end \(in work .*{AGAIN}",
            (2, 130),
        ),
        ("rank 0 sleeps in a collective", rf"Rank 0 of 2 {STANDS} .*{AGAIN}", (2, 130)),
        ("rank 1 is stopped in a collective", rf"Rank 1 of 2 {SILENT}.*{AGAIN}", (2, -9)),
        ("rank 0 is stopped in a collective", rf"The job's store has not answered for 2.5 s.*{AGAIN}", (-9, 2)),
        ("rank 1 is killed in a collective", rf"Rank 1 of 2 {SILENT}.*{AGAIN}", (2, -9)),
    ],
)
def test_every_process_of_a_job_ends_in_bounded_time_and_one_says_why(
    outcomes: dict[str, list[Ended]], case: str, words: str, ends: tuple[int, int]
) -> None:
    ranks = outcomes[case]
    assert tuple(rank.code for rank in ranks) == ends, ranks
    (said,) = (rank.said for rank in ranks if rank.said)
    assert said.count("\n") == 1, said
    assert re.fullmatch(f"error: {words}", said.strip()), said
    bound = max(hanging.STALL_S, hanging.PATIENCE_S) + hanging.GRACE_S / 4
    assert all(rank.seconds < bound + 15 for rank in ranks), ranks  # forks, imports and a busy machine


def hang(roster: Roster, seconds: float) -> None:
    """Work that stands still after its first step, and ends all the same."""
    with roster.interrupts() as stop:
        assert not stop.requested
        time.sleep(seconds)
        if stop.requested:
            raise Interrupted("Saved.")


def steps(roster: Roster, seconds: float) -> None:
    """Steps for so long, or until the job ends."""
    end = time.monotonic() + seconds
    with roster.interrupts() as stop:
        while time.monotonic() < end:
            if stop.requested:
                raise Interrupted("Saved.")
            time.sleep(0.01)


def test_a_phase_that_was_declared_may_be_long() -> None:
    def work(roster: Roster) -> str:
        if roster.world.speaks:
            steps(roster, 0.8)
            roster.wait()
            return "done"
        with roster.phase("compiling"):
            hang(roster, 0.6)
        return "done"

    assert on_ranks(2, work, bounds=Bounds(0.2, 20.0)) == ["done", "done"]
    first, _ = on_ranks(2, work, bounds=Bounds(0.2, 0.3))
    assert isinstance(first, UserError)
    assert "Rank 1 of 2 hangs" in str(first)
    assert "compiling" in str(first)


def test_who_has_not_begun_yet_has_an_hour() -> None:
    def work(roster: Roster) -> str:
        time.sleep(0.5)
        return "done"

    assert on_ranks(2, work, bounds=Bounds(0.1, 20.0)) == ["done", "done"]


def test_ranks_that_stand_still_together_are_all_named() -> None:
    def work(roster: Roster) -> None:
        if roster.world.speaks:
            steps(roster, 20)
        hang(roster, 1.0)

    first, *_ = on_ranks(3, work, bounds=Bounds(0.3, 20.0))
    assert "hangs: it has made no progress for 0 s, in hang" in str(first)
    assert "So do rank" in str(first)


def test_waiting_for_data_is_no_progress_and_asking_whether_to_stop_is() -> None:
    flag, progress = StopFlag(), Progress(Bounds(0.05, 20.0))
    progress.follow(flag)
    assert not flag.requested
    progress.look(1.0)
    for _ in range(3):
        time.sleep(0.03)
        assert not flag.raised
        still = progress.look(1.0)
    assert still.over
    assert not flag.requested
    assert not progress.look(1.0).over


def test_time_in_which_the_whole_process_was_stopped_does_not_count() -> None:
    progress = Progress(Bounds(0.05, 0.05))
    progress.look(0.01)
    time.sleep(0.1)
    assert not progress.look(0.01).over


def test_who_waits_in_a_collective_is_not_to_blame(tmp_path: Path) -> None:
    """A thread whose innermost call is torch.distributed's waits, and what we call from there works."""
    place = tmp_path / "torch" / "distributed"
    place.mkdir(parents=True)
    source = "def all_reduce(event):\n    event.wait()\n"
    scope: dict[str, object] = {}
    exec(compile(source, str(place / "distributed_c10d.py"), "exec"), scope)
    event, made, ready = threading.Event(), [], threading.Event()

    def work() -> None:
        made.append(Progress(Bounds(0.02)))
        ready.set()
        scope["all_reduce"](event)  # type: ignore[operator]

    def wait_for(thread: threading.Thread) -> None:
        made.append(Progress(Bounds(0.02)))
        thread.join()

    worker = threading.Thread(target=work, daemon=True)
    main = threading.Thread(target=wait_for, args=(worker,), daemon=True)
    worker.start()
    ready.wait()
    main.start()
    time.sleep(0.05)
    still, waiting = (progress.look(1.0) for progress in made)
    event.set()
    main.join()
    assert still.waits
    assert waiting.waits
    assert waiting.where.startswith("in wait_for (tests/cache/test_hanging.py")
    assert still.where.startswith("in work (tests/cache/test_hanging.py")


def test_the_bound_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STALL_VARIABLE, "7200")
    assert bounds_from_environment() == Bounds(7200, 7200)
    monkeypatch.setenv(STALL_VARIABLE, "soon")
    with pytest.raises(UserError, match=r"THRESHER_STALL_SECONDS is 'soon'; expected a number of seconds above 0"):
        bounds_from_environment()
