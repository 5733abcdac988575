"""A trace of some steps, as Chrome and TensorBoard read it."""

import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.train.conftest import plans_for
from thresher.cache.reader import CacheReader
from thresher.train.run import train
from thresher.train.stages import STAGES


def traces(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        f"{file.parent.parent.name}/{file.name}": json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        for file in sorted(out.glob("*/profile/*.pt.trace.json.gz"))
    }


def test_a_trace_names_every_stage_of_every_dictionary_of_the_pass(cache: CacheReader, tmp_path: Path) -> None:
    plans = plans_for(cache, "t", {"steps": 14}, kind="transcoder", firing="batchtopk", k=2, dead_after=256)
    console = Console(record=True, file=io.StringIO(), width=300)
    train(plans, cache, out=tmp_path, device="cpu", profile=True, console=console)
    ((name, events),) = traces(tmp_path).items()
    assert name == "t-L00/steps-6-10.pt.trace.json.gz"
    assert "t-L00/profile/steps-6-10.pt.trace.json.gz" in console.export_text()
    spans = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    assert set(spans) >= set(STAGES) - {"target"}  # no model takes part
    assert spans["encode"] == spans["backward"] == spans["update"] == 2 * 5
    assert any(event["name"].startswith("aten::") for event in events if "name" in event)


def test_a_short_pass_is_traced_in_its_last_half_and_changes_nothing(cache: CacheReader, tmp_path: Path) -> None:
    plans = plans_for(cache, "t", {"steps": 4}, kind="transcoder", firing="topk", k=2, layers=(0,))
    quiet = Console(quiet=True)
    train(plans, cache, out=tmp_path / "traced", device="cpu", profile=True, console=quiet)
    train(plans, cache, out=tmp_path / "plain", device="cpu", console=quiet)
    assert list(traces(tmp_path / "traced")) == ["t-L00/steps-3-4.pt.trace.json.gz"]
    assert not traces(tmp_path / "plain")
    left, right = (tmp_path / side / "t-L00/weights.safetensors" for side in ("traced", "plain"))
    assert left.read_bytes() == right.read_bytes()
