"""The program as a user calls it, run in this process, where PyTorch and transformers are imported once for all tests.

What needs a process of its own (a signal, a kill, what is loaded at the start) starts one with `environment`.
"""

import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from thresher import cli
from thresher.commands import options
from thresher.evaluate import plots

WIDTH = 200
SMALL = (
    "data.max_tokens=24000",
    "data.context=128",
    "data.test_fraction=0.25",
    "data.validation_fraction=0.15",
    "dictionary.expansion=2",
    "train.batch_rows=1024",
    "train.epochs=0.4",
    "train.log_every=2",
    "evaluate.tokens=1500",
    "evaluate.resamples=100",
)
"""Overrides that make the demo recipe a matter of seconds."""


def line_of(arguments: Sequence[str], sets: Sequence[str]) -> list[str]:
    """`ARGUMENTS --set … --set …`."""
    return [*arguments, *(part for item in sets for part in ("--set", item))]


def environment() -> dict[str, str]:
    """Variables of a process that is started: no network, no GPU, no cache directory of the user's."""
    ours = {"COLUMNS": str(WIDTH), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {key: value for key, value in os.environ.items() if key != "THRESHER_CACHE"} | ours


def thresher(
    folder: Path, *arguments: str, sets: Sequence[str] = SMALL, pictures: bool = False
) -> CompletedProcess[str]:
    """`thresher ARGUMENTS --set …` in `folder`, with its exit code and what it printed, and no GPU.

    Reports are written without the files for papers, which take seconds to draw, unless `pictures` are wanted.
    """
    told, complained = io.StringIO(), io.StringIO()
    line, code = ["thresher", *line_of(arguments, sets)], 0
    with _as_a_process(folder, line, pictures), redirect_stdout(told), redirect_stderr(complained):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return CompletedProcess(line, code, told.getvalue(), complained.getvalue())


@contextmanager
def _as_a_process(folder: Path, line: Sequence[str], pictures: bool) -> Iterator[None]:
    """What a new process would start from, and nothing left of it behind."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("THRESHER_CACHE", raising=False)
        patch.setenv("TQDM_DISABLE", "1")  # as the program does, and not for the tests that follow
        patch.setattr(sys, "argv", line)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for console in (options.out, options.err):
            patch.setattr(console, "width", WIDTH)
        if not pictures:
            patch.setattr(plots, "write_plots", lambda results, folder: ())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, handler)
