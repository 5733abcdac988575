"""Jobs of two processes of which one comes to harm, all at once: `python hanging.py`, which prints a JSON document.

Every process is forked from this one, which has imported PyTorch, and meets the other as ranks do without torchrun.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed

from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.progress import Bounds
from thresher.cache.roster import Roster, meet

STALL_S, PATIENCE_S, GRACE_S, BEAT_S = 1.5, 2.5, 8.0, 0.1
HURT_AT = 3


def hurt_in(harm: Callable[[Roster], None], victim: int, *, together: bool) -> Callable[[Roster], None]:
    """Steps without end, `together` with an exchange in each, of which the victim comes to harm in the fourth."""

    def work(roster: Roster) -> None:
        if together:
            distributed.init_process_group(
                "gloo", store=roster.meeting_place("group"), rank=roster.world.rank, world_size=2
            )
        step = 0
        with roster.interrupts() as stop:
            while not stop.requested:
                if step == HURT_AT and roster.world.rank == victim:
                    harm(roster)
                if together:
                    distributed.all_reduce(torch.ones(4))
                time.sleep(0.01)
                step += 1
            raise Interrupted(f"Saved at step {step}.")

    return work


def sleeping(roster: Roster) -> None:
    time.sleep(1000)


def silenced(roster: Roster) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def killed(roster: Roster) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


CASES: dict[str, Callable[[Roster], None]] = {
    "rank 1 sleeps": hurt_in(sleeping, 1, together=False),
    "rank 0 sleeps": hurt_in(sleeping, 0, together=False),
    "rank 1 sleeps in a collective": hurt_in(sleeping, 1, together=True),
    "rank 0 sleeps in a collective": hurt_in(sleeping, 0, together=True),
    "rank 1 is stopped in a collective": hurt_in(silenced, 1, together=True),
    "rank 0 is stopped in a collective": hurt_in(silenced, 0, together=True),
    "rank 1 is killed in a collective": hurt_in(killed, 1, together=True),
}


def one(case: str, rank: int, port: int, told: Path) -> int:
    """A process's life; its exit code."""
    sys.stderr = told.open("w")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        met = meet("test", "")
        roster = Roster(
            met.world, met._store, beat_s=BEAT_S, patience_s=PATIENCE_S,
            grace_s=GRACE_S, bounds=Bounds(STALL_S, 60.0), again="Go on with --resume.",
        )  # fmt: skip
        with roster:
            CASES[case](roster)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Interrupted:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    folder, running = Path(tempfile.mkdtemp()), {}
    began = time.monotonic()
    for case in CASES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in (0, 1):
            told = folder / f"{case} {rank}"
            told.touch()
            pid = os.fork()
            if pid == 0:
                os._exit(one(case, rank, port, told))
            running[pid] = (case, rank, told)
    results: dict[str, list[tuple[int, str, float]]] = {case: [(0, "", 0.0)] * 2 for case in CASES}
    while running and time.monotonic() - began < 40:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.02)
            for stopped, (case, rank, _) in running.items():  # as torchrun would in the end
                if f"rank {rank} is stopped" in case and not any(
                    case == other for still, (other, _, _) in running.items() if still != stopped
                ):
                    os.kill(stopped, signal.SIGKILL)
            continue
        case, rank, told = running.pop(pid)
        results[case][rank] = (os.waitstatus_to_exitcode(status), told.read_text(), time.monotonic() - began)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
