from pathlib import Path

import pytest

from thresher.cache.contracts import Site
from thresher.cache.estimate import DiskRates, Rates, Training, Workload, disk_rates, duration, outlook, verdict
from thresher.cache.layout import CODECS

PAIR = (Site("L05.mlp_in", 5, "mlp_in", 768), Site("L05.mlp_out", 5, "mlp_out", 768))
ROWS = 3815 * 262144  # a billion, in whole shards


def billion(store: str = "kept") -> Workload:
    return Workload(PAIR, {"train": ROWS}, {"train": ROWS // 1023}, 1024, store)  # type: ignore[arg-type]


def rates(write: float = 5e9, read: float = 7e9, forward: float = 1e6, free: int = 10**13) -> Rates:
    return Rates(DiskRates(write, read), free, forward, 1.25)


@pytest.mark.parametrize(("codec", "row"), [("int8z", 770), ("bf16", 1536), ("bf16-lz4", 1536 / 1.25)])
def test_sizes_are_those_of_the_format(codec: str, row: float) -> None:
    """A site takes d + 2 or 2d bytes a row, provenance 17, a packed token 9, a shard 16 P (cache.md, section 9)."""
    found = outlook(billion(), rates(), codec)  # type: ignore[arg-type]
    tokens, sums = ROWS // 1023 * 1024, 1 + 2 * (2 * 768 + 2)
    assert found.site_bytes == pytest.approx({site.name: ROWS * row for site in PAIR}, rel=1e-9)
    assert found.bytes == pytest.approx(ROWS * (2 * row + 17) + 9 * tokens + 16 * sums * 3815, rel=1e-9)
    assert found.needed == pytest.approx(1.02 * found.bytes + 262144 * 2 * row, rel=1e-9)


def test_times_are_worked_out_from_the_rates() -> None:
    found = outlook(billion(), rates(write=1e9, read=2e9, forward=1e6), "bf16")
    assert found.write_s == pytest.approx(found.bytes / 1e9)
    assert found.forward_s == pytest.approx(ROWS // 1023 * 1024 / 1e6)
    assert found.harvest_s == found.write_s > found.forward_s
    assert found.rows_per_s == pytest.approx(2e9 / 3072)
    assert found.read_s == pytest.approx(ROWS * 3072 / 2e9)
    assert found.break_even == float("inf")  # 1,536 s to read a pass, 1,001 s to compute it
    faster = outlook(billion(), rates(write=1e9, read=7e9, forward=1e6), "bf16")
    assert faster.break_even == pytest.approx(faster.write_s / faster.forward_s)


@pytest.mark.parametrize(
    ("passes", "measured", "words"),
    [
        (4.0, rates(), ["Caching pays", "4.0 times the rows", "break-even at 1.00"]),
        (1.0, rates(), ["Live activations are cheaper", "--live", "pays from 1.00 passes on"]),
        (0.3, rates(), ["Live activations are cheaper", "0.3 times the rows"]),
        (2.0, rates(write=5e8), ["Live activations are cheaper", "pays from 3.13 passes on"]),
        (4.0, rates(write=5e8), ["Caching pays", "break-even at 3.13"]),
        (4.0, rates(read=1e9), ["Live activations are cheaper", "reading a pass would take"]),
        (4.0, rates(free=10**12), ["Caching pays", "too small", "1.0 TB are free", "harvest.window_gb = 500"]),
    ],
)
def test_the_verdict_follows_from_passes_rates_and_room(passes: float, measured: Rates, words: list[str]) -> None:
    outlooks = {codec: outlook(billion(), measured, codec) for codec in CODECS}
    text = verdict(outlooks["int8z"], list(outlooks.values()), measured, Training(2, 1, passes))
    assert [word for word in words if word not in text] == [], text


def test_a_codec_that_would_fit_is_named() -> None:
    measured = rates(free=2 * 10**12)
    outlooks = {codec: outlook(billion(), measured, codec) for codec in CODECS}
    text = verdict(outlooks["bf16"], list(outlooks.values()), measured, Training(2, 1, 9.0))
    assert "harvest.codec = 'int8z' would fit" in text


def test_a_disk_is_timed_without_leaving_anything(tmp_path: Path) -> None:
    found = disk_rates(tmp_path / "not" / "yet", 32 << 20)
    assert found.write > 0
    assert found.read > 0
    assert list(tmp_path.iterdir()) == []


def test_durations_are_short() -> None:
    seconds = (0.04, 12.4, 119.9, 300, 7199, 7300, 180000, 1e7)
    shown = ["0.0 s", "12 s", "120 s", "5.0 min", "120 min", "2.0 h", "2.1 days", "116 days"]
    assert [duration(value) for value in seconds] == shown
