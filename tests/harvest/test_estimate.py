"""The estimate against what a harvest then writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from thresher.cache.contracts import UserError
from thresher.cache.estimate import outlook
from thresher.harvest.corpus import DataConfig
from thresher.harvest.estimate import bounded, measure
from thresher.harvest.run import harvest
from thresher.harvest.settings import HarvestConfig
from thresher.harvest.target import TargetConfig, TransformerTarget
from thresher.harvest.timing import foreseen, forward_rate

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


def test_the_timed_passes_are_those_of_the_harvest(books: TransformerTarget) -> None:
    sites, sample = books.sites(["mlp_in"]), np.arange(64, dtype=np.int32).reshape(2, 32)
    rate, acts = forward_rate(books, sites, 4, 32, sample)
    assert rate > 0
    expected = books.record(torch.from_numpy(np.resize(sample, (4, 32)).astype(np.int64)), sites)
    torch.testing.assert_close(acts, expected)


def test_a_long_harvest_is_foreseen_in_a_line_and_a_short_one_not(books: TransformerTarget, tmp_path: Path) -> None:
    sites = books.sites(["mlp_in"])
    assert foreseen(books, sites, 4, 32, tokens=4 * 32 * 8, size=10**6, path=tmp_path / "new") is None
    line = foreseen(books, sites, 4, 32, tokens=10**9, size=10**6, path=tmp_path / "new")
    assert line is not None
    assert "tokens/s" in line
    assert "pays from 1.00 passes of training on" in line
    assert list(tmp_path.iterdir()) == []
