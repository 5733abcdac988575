"""The estimate against what a harvest then writes."""

import io
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from thresher.cache.errors import UserError
from thresher.cache.estimate import outlook
from thresher.cache.layout import Contexts
from thresher.cache.writer import CacheWriter
from thresher.harvest import fill, timing
from thresher.harvest.corpus import DataConfig
from thresher.harvest.estimate import bounded, measure
from thresher.harvest.footprint import Running
from thresher.harvest.passes import Passes, PassSize
from thresher.harvest.resident import resident
from thresher.harvest.run import harvest
from thresher.harvest.settings import HarvestConfig
from thresher.harvest.target import TargetConfig, TransformerTarget
from thresher.harvest.timing import Trial, counted, foretold, run_trial

TARGET = TargetConfig(device="cpu")
DATA = DataConfig(max_tokens=40_000, context=128, test_fraction=0.25)


@pytest.mark.parametrize("codec", ["int8z", "bf16-lz4"])
def test_the_estimate_is_what_the_harvest_writes(codec: str, tmp_path: Path, console: Console) -> None:
    config = HarvestConfig(codec=codec)  # type: ignore[arg-type]
    found = measure(TARGET, DATA, config, folder=tmp_path, tokens=None, console=console)
    assert list(tmp_path.iterdir()) == []
    expected = outlook(found.work, found.rates, config.codec)
    done = harvest(TARGET, DATA, config, path=tmp_path / "cache.zarr", console=console)
    written = sum(file.stat().st_size for file in done.path.rglob("*") if file.is_file())
    assert written == pytest.approx(expected.bytes, rel=0.02 if codec == "int8z" else 0.06)
    cut = {split: count - done.rows[split] for split, count in found.work.rows.items()}
    assert all(0 <= rows < 1024 for rows in cut.values())
    assert done.tokens == pytest.approx(found.work.tokens, rel=0.03)  # contexts across shards run twice
    assert found.rates.forward > 0


def test_a_limit_bounds_what_is_not_read(books: TransformerTarget, console: Console) -> None:
    sites = books.sites(["mlp_out"])
    data = DataConfig(test_fraction=0.1, validation_fraction=0.05)
    work = bounded(sites, data, 1_000_000, 128, "kept")
    assert sum(work.contexts.values()) == 1_000_000 // 127
    assert work.rows == {"train": 6693 * 127, "test": 787 * 127, "validation": 394 * 127}
    assert bounded(sites, data, 1_000_000, 128, "all").rows["train"] == 6693 * 128


def test_text_on_the_hub_needs_a_number(tmp_path: Path, console: Console) -> None:
    data = DataConfig(source="someone/something", streaming=True)
    with pytest.raises(UserError, match=r"--tokens N, or set data\.max_tokens"):
        measure(TARGET, data, HarvestConfig(), folder=tmp_path, tokens=None, console=console)
    for given, tokens in ((data, 20_000), (DataConfig(source="someone/something", max_tokens=20_000), None)):
        found = measure(TARGET, given, HarvestConfig(), folder=tmp_path, tokens=tokens, console=console)
        assert sum(found.work.rows.values()) <= 20_000
        assert found.basis.endswith("--tokens" if tokens else "data.max_tokens")


def test_trial_passes_are_those_of_the_harvest(books: TransformerTarget) -> None:
    sites, sample = books.sites(["mlp_in"]), np.arange(64, dtype=np.int32).reshape(2, 32)
    with Passes(books, sites) as passes:
        trial = run_trial(passes, books, PassSize(4, 1), 32, sample)
    assert trial.tokens_per_s > 0
    expected = books.record(torch.from_numpy(np.resize(sample, (4, 32)).astype(np.int64)), sites)
    torch.testing.assert_close(dict(trial.acts), expected)


TRIED = """
import torch
from thresher.harvest.passes import Passes, PassSize
from thresher.harvest.target import TargetConfig, load_target
from thresher.harvest.timing import counted, run_trial

torch.set_num_threads(2)
model = load_target(TargetConfig(device="cpu"))
sites, size = model.sites(["mlp_in", "mlp_out"]), PassSize(32, 1)
with Passes(model, sites, 1) as passes:
    kept, passing = run_trial(passes, model, size, 256, most_rounds=5).running
print(kept + passing, sum(counted(model, sites, size, 256)))
"""


@pytest.mark.skipif(resident() is None, reason="needs Linux")
def test_a_trial_tells_what_passes_take() -> None:
    """In a process of its own: what other tests leave behind would be given back meanwhile."""
    done = subprocess.run([sys.executable, "-c", TRIED], capture_output=True, text=True, check=True)
    taken, needed = map(int, done.stdout.split())
    assert needed > 100_000_000
    assert taken == pytest.approx(needed, rel=0.4)  # the two passes need not be at their peaks together


STAYED = """
import torch
from thresher.harvest.allocation import heaps_that_stay
from thresher.harvest.resident import resident

def freed():
    blocks = [torch.ones(1 << 18) for _ in range(100)]
    before = resident().own
    del blocks
    return before - resident().own

with heaps_that_stay():
    within, before = freed(), resident().own
print(within, before - resident().own)
"""


@pytest.mark.skipif(resident() is None or "glibc" not in platform.libc_ver(), reason="needs Linux with glibc")
def test_small_tensors_stay_in_memory_within_the_block_and_go_back_at_its_end() -> None:
    done = subprocess.run([sys.executable, "-c", STAYED], capture_output=True, text=True, check=True)
    within, after = map(int, done.stdout.split())
    assert within < 10_000_000
    assert after > 80_000_000


@pytest.mark.parametrize(
    ("tokens", "window", "timed"), [(3_000, None, False), (60_000, None, True), (60_000, 1, False)]
)
def test_what_is_said_before_the_first_pass(
    books: TransformerTarget, tmp_path: Path, tokens: int, window: int | None, timed: bool
) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    contexts = np.zeros((tokens // 32, 32), np.int32)
    keep = np.ones(contexts.shape, np.uint8)
    packed = {"train": Contexts(contexts, np.zeros_like(contexts), keep)}
    sites = books.sites(["mlp_in"])
    bound = None if window is None else 30 * sites[0].width * tokens
    with (
        CacheWriter.open(
            tmp_path / "cache", identity={}, sites=sites, contexts=packed, codec="bf16", seed=0, window_bytes=bound
        ) as writer,
        Passes(books, sites) as passes,
    ):
        fill._try(passes, writer, books, PassSize(4, 1), console)
    told = console.export_text()
    assert "of memory beside the model." in told
    assert ("tokens/s, the disk" in told) == timed


def test_without_numbers_from_the_kernel_tensors_are_counted(
    books: TransformerTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "resident", lambda: None)
    sites, size = books.sites(["mlp_in"]), PassSize(4, 1)
    with Passes(books, sites) as passes:
        trial = run_trial(passes, books, size, 32, most_rounds=1)
    assert trial.running == counted(books, sites, size, 32)
    assert trial.tokens_per_s > 0


def test_a_harvest_is_foretold_in_a_line(books: TransformerTarget, tmp_path: Path) -> None:
    trial = Trial(1e6, {}, Running(0, 0))
    line = foretold(trial, tokens=10**9, size=10**6, path=tmp_path / "new")
    assert "the model needs 17 min at 1,000,000 tokens/s" in line
    assert "pays from 1.00 passes of training on" in line
    assert list(tmp_path.iterdir()) == []
