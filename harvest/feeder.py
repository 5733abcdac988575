"""From the model's last activations to the shard, while the next pass runs."""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from thresher.cache.writer import ShardWriter


class Feeder:
    """Hands activations to a shard.

    On a GPU that happens in a second thread and on a stream of its own: the shard has to wait for the device several
    times per batch, and the next pass is to run meanwhile. On a CPU the passes have threads of their own (passes.py),
    so it happens at once.
    """

    def __init__(self, device: torch.device, threaded: bool | None = None) -> None:
        """`threaded` None: as the device asks for."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        threaded = self._stream is not None if threaded is None else threaded
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="thresher-feed") if threaded else None
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def add(self, shard: ShardWriter, acts: Mapping[str, Tensor], done: Callable[[], None]) -> None:
        """As `shard.add`, then `done`: from then on nobody looks at the activations.

        In threads it returns with at most two batches waiting, and raises what went wrong before.
        """
        if self._thread is None:
            self._add(shard, acts, done, None)
            return
        while len(self._waiting) > 1:
            self._waiting.popleft().result()
        ready = None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()
        self._waiting.append(self._thread.submit(self._add, shard, acts, done, ready))

    def drain(self) -> None:
        """Wait until everything was added."""
        while self._waiting:
            self._waiting.popleft().result()

    def _add(self, shard: ShardWriter, acts: Mapping[str, Tensor], done: Callable[[], None], ready: Any) -> None:
        if self._stream is None:
            shard.add(acts)
        else:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                shard.add(acts)
                self._stream.synchronize()  # the activations may be freed now
        done()
