"""Where the time of a run goes: divided by a fake clock, and said by a stage whose source is slow."""

import io
import time
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.train.conftest import plans_for
from thresher.cache.batches import Batches
from thresher.cache.reader import CacheReader
from thresher.train import bounds
from thresher.train.bounds import Bounds, Shares, shares
from thresher.train.run import train
from thresher.train.stages import STAGES, Clock, Seconds, stage, timed_by, unwatch

CPU = torch.device("cpu")


class Ticks:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_clock_adds_the_seconds_of_every_mark_and_nothing_is_marked_unwatched() -> None:
    ticks = Ticks()
    clock = Clock(CPU, ticks)
    with timed_by(clock):
        for _ in range(2):
            with stage("encode"):
                ticks.now += 1.5
            with stage("loss"), stage("auxk"):
                ticks.now += 0.25
        assert clock.seconds().host == {"encode": 3.0, "loss": 0.5, "auxk": 0.5}
        unwatch(clock)
        with stage("encode"):
            ticks.now += 1.0
    assert clock.seconds().host["encode"] == 3.0
    assert clock.elapsed == 4.5
    assert stage("encode") is stage("update")  # one object that does nothing


def test_an_unlisted_stage_is_refused() -> None:
    with pytest.raises(AssertionError, match="not listed"):
        stage("encoding")
    assert "encode" in STAGES


def test_on_a_cpu_steps_are_divided_as_the_threads_divide_theirs() -> None:
    two_threads = {"read": 1.0, "transfer": 0.5, "task": 10.0, "encode": 4.0, "update": 2.0}
    found = shares(10.0, 6.0, Seconds(two_threads, two_threads), cuda=False)
    assert found == pytest.approx(Shares(0.1, 0.05, 0.24, 0.24, 0.12, 0.25))
    assert found.bound == "other"


def test_on_cuda_a_gap_that_the_host_did_not_wait_through_is_transfer() -> None:
    device = {"read": 4.0, "task": 5.0, "encode": 2.0, "update": 2.5}
    found = shares(10.0, 0.1, Seconds({"read": 1.0, "transfer": 0.1}, device), cuda=True)
    assert found == pytest.approx(Shares(0.1, 0.3, 0.2, 0.05, 0.25, 0.1))
    assert found.bound == "transfer"
    ahead = shares(10.0, 0.1, Seconds({"read": 9.0}, device | {"read": 0.0}), cuda=True)
    assert ahead.reading == 0  # the host waits for rows while the device still has work: no loss


def test_the_line_comes_once_after_a_minute_without_the_first_steps() -> None:
    ticks = Ticks()
    watch = Bounds(CPU, Clock(CPU, ticks))
    said = []
    with timed_by(watch.clock):
        for step in range(80):
            with stage("read"):
                ticks.now += 100.0 if step == 0 else 0.1
            with stage("task"), stage("encode"):
                ticks.now += 0.9
            said.append(watch.stepped(0.9))
    lines = [line for line in said if line is not None]
    assert len(lines) == 1
    assert said.index(lines[0]) == 3 + 60 - 1
    assert lines[0].startswith("Time over 60 s: 90 % encoder matmul, 10 % waiting for rows, 0 % ")
    assert lines[0].endswith("Bound by the encoders' matrix products, which cannot be left out.")
    assert watch.line() is None


def test_a_run_of_a_few_steps_says_nothing() -> None:
    watch = Bounds(CPU)
    assert [watch.stepped(0.1) for _ in range(3)] == [None] * 3
    assert watch.line() is None


def test_a_short_run_from_a_slow_source_is_bound_by_reading(
    cache: CacheReader, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Batches.__iter__

    def slow(self: Batches) -> Any:
        for batch in real(self):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(Batches, "__iter__", slow)
    console = Console(record=True, file=io.StringIO(), width=200)
    plans = plans_for(cache, "t", {"steps": 12}, kind="transcoder", firing="topk", k=2, layers=(0,))
    train(plans, cache, out=tmp_path, device="cpu", console=console)
    text = console.export_text()
    assert "% waiting for rows" in text
    assert "Bound by reading" in text


def test_shares_are_those_of_the_words() -> None:
    assert set(bounds._WORDS) == set(Shares._fields)
