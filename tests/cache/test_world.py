"""Who a process is, what it does of the work, and what becomes of a job that loses one."""

import threading
import time

import pytest
from torch.distributed import HashStore

from tests.ranks import on_ranks
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.roster import Roster, meet
from thresher.cache.world import World, divide, from_environment


def test_a_process_without_torchrun_is_alone() -> None:
    assert from_environment({}) == World()
    assert from_environment({"RANK": "", "WORLD_SIZE": "2"}).alone
    assert from_environment({"LOCAL_RANK": "3"}) == World(local_rank=3)


def test_the_place_is_what_torchrun_says() -> None:
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2"}
    world = from_environment(told)
    assert world == World(rank=5, size=8, local_rank=1, restarts=2)
    assert (world.alone, world.speaks, str(world)) == (False, False, "rank 5 of 8")


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'; expected a whole number"),
    ],
)
def test_a_place_that_cannot_be_is_refused(told: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_environment(told)


def test_the_costliest_pieces_go_first_to_who_has_least() -> None:
    assert divide([5, 4, 3, 3, 3], 2) == [0, 1, 1, 0, 1]  # 5, then 4, 3 to the 4, 3 to the 5, 3 to the 7 of 8 and 7
    assert divide([1, 1, 1], 4) == [0, 1, 2]
    assert divide([], 3) == []
    assert divide([2, 9, 2], 1) == [0, 0, 0]


def test_ranks_without_a_meeting_place_are_told_to_use_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"this is rank 1 of 2, but the ranks cannot meet .*torchrun"):
        meet("train", "")


def test_rank_0_waits_for_all_and_all_hear_what_it_tells() -> None:
    ended = []

    def work(roster: Roster) -> str:
        if roster.world.speaks:
            roster.tell("word", "go")
            roster.wait()
            return ",".join(map(str, sorted(ended)))
        word = roster.hear("word")
        time.sleep(0.05 * roster.world.rank)
        ended.append(roster.world.rank)
        return word

    assert on_ranks(4, work) == ["1,2,3", "go", "go", "go"]


def test_an_error_of_one_rank_stops_all_and_rank_0_says_it() -> None:
    def work(roster: Roster) -> None:
        with roster.interrupts() as stop:
            if roster.world.rank == 2:
                raise UserError("the disk is full.")
            while not stop.requested:
                time.sleep(0.01)
            raise Interrupted("Saved at step 7.")

    first, second, third = on_ranks(3, work)
    assert isinstance(first, UserError)
    assert str(first) == "Rank 2 of 3 ended: the disk is full. Saved at step 7."
    assert isinstance(second, Interrupted)
    assert str(third) == "the disk is full."


def work_until_stopped(roster: Roster) -> None:
    with roster.interrupts() as stop:
        while not stop.requested:
            time.sleep(0.01)
        raise Interrupted("Saved.")


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_falls_silent_ends_the_job_in_bounded_time(dead: int) -> None:
    store, patience, began = HashStore(), 0.4, time.monotonic()
    store.add(f"beat/{dead}", 3)  # and never again
    words = rf"Rank {dead} of 2 has died or hangs: nothing was heard of it for 0.4 s. Saved"
    world = World(rank=1 - dead, size=2)
    with pytest.raises(UserError, match=words), Roster(world, store, beat_s=0.02, patience_s=patience) as roster:
        work_until_stopped(roster)
    assert patience <= time.monotonic() - began < patience + 5


def test_a_rank_that_never_comes_is_not_waited_for_without_end() -> None:
    with (
        pytest.raises(
            UserError, match=r"Rank 1 of 2 has not come: nothing was heard of it for 0.2 s. What was done is"
        ),
        Roster(World(size=2), HashStore(), beat_s=0.02, arrival_s=0.2) as roster,
    ):
        roster.wait()


def test_a_store_that_is_gone_ends_the_job() -> None:
    class Gone(HashStore):
        def clone(self) -> "Gone":
            return self

        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("Connection reset by peer")

    with (
        pytest.raises(UserError, match=r"store cannot be reached any more \(Connection reset by peer\)"),
        Roster(World(rank=1, size=2), Gone(), beat_s=0.02) as roster,
    ):
        roster.hear("word")


def test_a_stop_ends_waiting() -> None:
    def work(roster: Roster) -> None:
        with roster.interrupts() as stop:
            threading.Timer(0.1, lambda: setattr(stop, "requested", True)).start()
            if roster.world.speaks:
                roster.wait()
            roster.hear("never")

    assert [type(outcome) for outcome in on_ranks(2, work)] == [Interrupted, Interrupted]
