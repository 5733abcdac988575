"""A trace of a few training steps, for Chrome (chrome://tracing, ui.perfetto.dev) and TensorBoard.

torch.profiler records every operator of every thread, and on CUDA every kernel, between the marks of
`train/stages.py`. The first steps are left out: they compile, take memory and fill queues. What a trace shows is slower
than the run without it, by the cost of recording; proportions between stages hold.
"""

import contextlib
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity

from thresher.train.stages import traced

_WARM_UP_STEPS, _STEPS = 5, 5
FOLDER = "profile"


class Trace:
    """Records some steps of a pass into `folder`; a context manager. Call `step` after each step."""

    def __init__(self, folder: Path, device: torch.device, steps_left: int) -> None:
        """`steps_left` is how many steps will come: of a short pass the last half is recorded."""
        self.first = min(_WARM_UP_STEPS, steps_left // 2)
        self.steps = min(_STEPS, steps_left - self.first)
        self.path = folder / FOLDER / f"steps-{self.first + 1}-{self.first + self.steps}.pt.trace.json.gz"
        self.written = False
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        every_thread = torch.profiler._ExperimentalConfig(profile_all_threads=True)
        self._profile = torch.profiler.profile(activities=activities, experimental_config=every_thread)
        self._marks = contextlib.ExitStack()
        self._done = 0

    def __enter__(self) -> "Trace":
        self._begin_if_due()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._done > self.first and not self.written:  # the pass ended early: what there is
            self._write()
        self._marks.close()

    def step(self) -> None:
        """One step of all dictionaries is done."""
        self._done += 1
        if self.written:
            return
        if self._done == self.first + self.steps:
            self._write()
        else:
            self._begin_if_due()

    def _begin_if_due(self) -> None:
        if self._done == self.first and self.steps > 0:
            self._marks.enter_context(traced())
            self._profile.start()

    def _write(self) -> None:
        self._profile.stop()
        self._marks.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.path))
        self.written = True
