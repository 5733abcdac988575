"""Several ranks of one job as threads of the test's process, which meet in a store in memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed import HashStore

from thresher.cache.roster import Roster
from thresher.cache.world import World


def on_ranks(size: int, work: Callable[[Roster], Any], **settings: Any) -> list[Any]:
    """What `work` returns on every rank, or the exception that it ended with."""
    store = HashStore()

    def one(rank: int) -> Any:
        given = {"beat_s": 0.02, "patience_s": 20.0, "arrival_s": 20.0, "end": lambda code: None} | settings
        try:
            with Roster(World(rank=rank, size=size), store, **given) as roster:
                return work(roster)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
