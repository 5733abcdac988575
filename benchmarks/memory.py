"""Whether a harvest takes the memory that it says it will.

Every run is a `thresher harvest` of its own, watched from outside. What it says ("memory beside the model",
`cache.plan.estimate_memory`) is set against the growth of the process's resident memory, files left out, from the line
before ("Harvesting ...") to its peak. The contexts, 9 bytes a token, are in memory by then and part of what is said, so
they are added. Medians of several runs.

    python benchmarks/memory.py                  # on a CPU, about ten minutes
    python benchmarks/memory.py --case bundled-int8z --runs 5
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

BAR = 0.10
_UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}

CASES = {
    "bundled-int8z": (),
    "bundled-bf16": ("harvest.codec=bf16",),
    "bundled-bf16-lz4": ("harvest.codec=bf16-lz4",),
    "bundled-large-passes": ("harvest.batch_contexts=32",),
    "gpt2-shape-int8z": ("data.max_tokens=80000", "harvest.fvu_gate=1"),
    "gpt2-shape-bf16": ("data.max_tokens=80000", "harvest.codec=bf16"),
}
"""Settings beside those of the recipe `books-demo`; the shapes are GPT-2 small's with two layers and random weights."""


class Run(NamedTuple):
    """One harvest, in bytes."""

    said: float
    taken: int


def measure(settings: tuple[str, ...], folder: Path) -> Run:
    """Harvest in a process of its own."""
    command = [sys.executable, "-m", "thresher", "harvest", "books-demo", "--cache", str(folder / "cache")]
    for setting in ("target.device=cpu", *settings):
        command += ["--set", setting]
    # one line is one line, whatever the width of the terminal
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "1000"})
    said, tokens, growth, watch = 0.0, 0, 0, Watch(process.pid)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Harvesting "):
            watch.begin()
        if found := re.search(r"needs about ([\d.,]+) (\w+) of memory", line):
            said = float(found[1].replace(",", "")) * _UNITS[found[2]]
        if found := re.search(r"^Harvested .*: ([\d,]+) tokens in", line):
            growth, tokens = watch.end(), int(found[1].replace(",", ""))
    if process.wait() or not said or not growth:
        sys.exit(f"{' '.join(command)} failed")
    shutil.rmtree(folder / "cache")
    return Run(said, growth + 9 * tokens)


class Watch:
    """The memory of a process, looked at every 2 ms, so that what it was when a line was written is known."""

    def __init__(self, pid: int) -> None:
        self._pid, self._over = pid, threading.Event()
        self._now = self._first = self._peak = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Growth counts from the last look on."""
        with self._lock:
            self._first = self._peak = self._now

    def end(self) -> int:
        """Bytes by which it grew at most."""
        self._over.set()
        self._thread.join()
        return self._peak - self._first

    def _look(self) -> None:
        while not self._over.wait(0.002):
            try:
                now = self._own()
            except (OSError, KeyError):  # the process has ended
                return
            with self._lock:
                self._now, self._peak = now, max(self._peak, now)

    def _own(self) -> int:
        """Bytes that are resident and no file's."""
        text = Path(f"/proc/{self._pid}/status").read_text()
        found = dict(re.findall(r"^(VmRSS|RssFile):\s+(\d+) kB", text, re.MULTILINE))
        return 1024 * (int(found["VmRSS"]) - int(found["RssFile"]))


def random_model(folder: Path) -> None:
    """Save GPT-2 small's shape with two layers and random weights, and the bundled tokenizer beside it."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    from thresher.harvest.checkpoint import locate, tokenizer_files

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GPT2Config(n_layer=2)).save_pretrained(folder)
    for file in tokenizer_files(locate("bundled:books-128", None)):
        shutil.copy(file, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="may be given several times (default: all)")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    table = Table(title=f"Memory of a harvest beside the model, in MB; medians of {options.runs} runs")
    for column in ("case", "said", "taken", "lowest", "highest", "error", f"bar {BAR:.0%}"):
        table.add_column(column, justify="left" if column == "case" else "right")
    missed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(folder / "gpt2")
        for case in options.case or CASES:
            model = (f"target.model={folder / 'gpt2'}",) if case.startswith("gpt2") else ()
            runs = [measure((*model, *CASES[case]), folder) for _ in range(options.runs)]
            taken = [run.taken for run in runs]
            error = statistics.median(run.said / run.taken for run in runs) - 1
            missed |= abs(error) > BAR
            figures = (statistics.median(run.said for run in runs), statistics.median(taken), min(taken), max(taken))
            verdict = "MISSED" if abs(error) > BAR else "met"
            table.add_row(case, *(f"{figure / 1e6:,.0f}" for figure in figures), f"{error:+.1%}", verdict)
    Console().print(table)
    sys.exit(missed)


if __name__ == "__main__":
    main()
