"""A dictionary that counts its latents gets the threshold that as many exceed, and says what that cost."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from tests.interop.conftest import LATENTS, LAYERS, K, Made
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted, StopFlag
from thresher.cache.reader import CacheReader
from thresher.cache.records import to_dict
from thresher.interop.adapting import Thresholds
from thresher.interop.canonical import Canonical, to_coder
from thresher.interop.export import export
from thresher.interop.readings import ROWS, rows_of
from thresher.interop.thresholds import thresholded
from thresher.train.files import save_run


def whole(cache: CacheReader, site: str) -> Tensor:
    """All training rows of a site, float64."""
    return cache.gather("train", site, np.arange(cache.rows("train"))).double()


def pre(dictionary: Canonical, source: int, x: Tensor) -> Tensor:
    part = dictionary.sources[source]
    return x @ part.W_enc.T + part.b_enc


@pytest.mark.parametrize(("kind", "firing"), [("sae", "topk"), ("sae", "groupmax"), ("clt", "topk")])
def test_the_threshold_is_the_value_of_its_rank(kind, firing, made: Made, cache: CacheReader) -> None:
    dictionary = made(kind, firing)
    after, facts = thresholded(dictionary, cache)
    assert (after.firing, after.k, facts["was"], facts["k"]) == ("threshold", None, firing, K)
    assert facts["rows"] == cache.rows("train")
    for source, site in enumerate(dictionary.reads):
        scores = pre(dictionary, source, whole(cache, site)).flatten()
        rank = K * facts["rows"]
        expected = float(scores[scores > 0].sort(descending=True).values[rank - 1])
        assert facts["thresholds"][source] == pytest.approx(expected, rel=1e-6)
        theta = after.sources[source].threshold
        assert theta is not None
        assert theta.tolist() == [facts["thresholds"][source]] * LATENTS
        assert abs(int((scores > theta[0]).sum()) - rank) <= 2, "ties and rounding aside"
    assert len(set(facts["thresholds"])) == len(dictionary.sources)
    json.dumps(facts, allow_nan=False)


def test_what_it_costs_is_measured_on_held_out_rows(made: Made, cache: CacheReader) -> None:
    dictionary = made("transcoder", "topk", skip=True)
    after, facts = thresholded(dictionary, cache)
    [read], [write] = dictionary.reads, dictionary.writes
    acts = rows_of(cache, [read, write], ROWS)
    x, y = acts[read].double(), acts[write].double()
    a = pre(dictionary, 0, x).relu()
    kept = torch.where(a >= a.topk(K, dim=1).values[:, -1:], a, 0.0)
    above = torch.where(a > facts["thresholds"][0], a, 0.0)
    mean = torch.from_numpy(cache.statistics(write).mean.copy()).double()
    assert dictionary.W_skip is not None
    for name, z in (("before", kept), ("after", above)):
        guess = z @ dictionary.sources[0].W_dec[:, 0] + dictionary.b_dec[0] + x @ dictionary.W_skip[0].T
        fvu = float((y - guess).square().sum() / (y - mean).square().sum())
        assert facts[name]["fvu"] == pytest.approx(fvu, rel=1e-9)
        assert facts[name]["l0"] == pytest.approx(float((z > 0).sum(1).double().mean()))
    assert facts["before"]["l0"] == pytest.approx(K, rel=0.01)
    assert facts["after"]["l0"] == pytest.approx(K, rel=0.15)
    assert facts["after"]["fvu"] != facts["before"]["fvu"]
    assert after.W_skip is dictionary.W_skip


def test_more_latents_than_are_ever_positive_is_a_relu(made: Made, cache: CacheReader) -> None:
    dictionary = made("sae", "topk")._replace(k=LATENTS)
    after, facts = thresholded(dictionary, cache)
    assert (after.firing, facts["thresholds"]) == ("relu", [0.0])
    assert facts["after"] == pytest.approx(facts["before"])


def test_fewer_rows_are_read_where_fewer_are_asked_for(made: Made, cache: CacheReader) -> None:
    assert thresholded(made("sae", "topk"), cache, rows=100).facts["rows"] == 100


def test_nothing_to_calibrate_is_an_error(made: Made, cache: CacheReader) -> None:
    with pytest.raises(UserError, match="fires by threshold, so --thresholds has nothing to calibrate"):
        thresholded(made("sae", "threshold"), cache)
    with pytest.raises(UserError, match="--thresholds is 0 rows"):
        thresholded(made("sae", "topk"), cache, rows=0)
    with pytest.raises(UserError, match=r"L09\.resid_post"):
        thresholded(made("sae", "topk")._replace(reads=("L09.resid_post",)), cache)
    with pytest.raises(Interrupted):
        thresholded(made("sae", "topk"), cache, stop=StopFlag(requested=True))


def saved(folder: Path, dictionary: Canonical, cache: CacheReader, **changes: Any) -> Path:
    """A run directory of that cache."""
    coder, path = to_coder(dictionary), folder / dictionary.name
    of = {"path": str(cache.path), "fingerprint": cache.fingerprint, "identity": IDENTITY}
    save_run(
        path,
        coder,
        {
            "name": dictionary.name,
            "group": dictionary.name,
            "dictionary": to_dict(coder.spec),
            "cache": of | changes,
            "training": {"finished": True},
        },
    )
    return path


IDENTITY: Mapping[str, Any] = {"target": {"model": "gpt2"}, "data": {"context": 128}}


@pytest.mark.parametrize("to", ["circuit-tracer", "saelens"])
def test_an_export_with_thresholds_carries_what_they_came_to(
    to: str, made: Made, cache: CacheReader, tmp_path: Path
) -> None:
    dictionary = made("clt", "topk") if to == "circuit-tracer" else made("transcoder", "topk")
    run = saved(tmp_path, dictionary, cache)
    with pytest.raises(UserError, match="--thresholds"):
        export([run], to, tmp_path / "out")
    [done] = export([run], to, tmp_path / "out", thresholds=Thresholds(1 << 18))
    facts = done.thresholds[dictionary.name]
    if to == "circuit-tracer":
        assert yaml.safe_load((done.path / "config.yaml").read_text())["thresher"][0]["thresholds"] == facts
        thetas = [
            safetensors.torch.load_file(done.path / f"W_enc_{i}.safetensors")[f"threshold_{i}"] for i in range(LAYERS)
        ]
    else:
        config = json.loads((done.path / "cfg.json").read_text())
        assert config["architecture"] == "jumprelu_transcoder"
        assert config["metadata"]["thresher"]["thresholds"] == facts
        thetas = [safetensors.torch.load_file(done.path / "sae_weights.safetensors")["threshold"]]
    assert [float(theta[0]) for theta in thetas] == facts["thresholds"]


def test_a_sweep_keeps_those_that_have_thresholds(made: Made, cache: CacheReader, tmp_path: Path) -> None:
    runs = [saved(tmp_path, made("sae", firing), cache) for firing in ("topk", "threshold")]
    done = export(runs, "saelens", tmp_path / "out", thresholds=Thresholds(500))
    assert [set(each.thresholds) for each in done] == [{"sae-topk"}, set()]
    with pytest.raises(UserError, match="sae-threshold fire by thresholds already"):
        export(runs[1:], "saelens", tmp_path / "more", thresholds=Thresholds(500))


def test_the_cache_has_to_be_there_and_the_runs_own(made: Made, cache: CacheReader, tmp_path: Path) -> None:
    gone = saved(tmp_path / "gone", made("sae", "topk"), cache, path=str(tmp_path / "none.zarr"))
    other = saved(tmp_path / "other", made("sae", "topk"), cache, fingerprint="0" * 32)
    with pytest.raises(UserError, match=r"none\.zarr does not exist\. Harvest it again"):
        export([gone], "saelens", tmp_path / "out", thresholds=Thresholds(500))
    with pytest.raises(UserError, match="was trained on another cache"):
        export([other], "saelens", tmp_path / "out", thresholds=Thresholds(500))
    assert not (tmp_path / "out").exists()
    [done] = export([gone], "saelens", tmp_path / "out", thresholds=Thresholds(500, cache.path))
    assert done.thresholds["sae-topk"]["rows"] == 500


def test_what_cannot_be_written_is_said_before_anything_is_calibrated(
    made: Made, cache: CacheReader, tmp_path: Path
) -> None:
    """The cache is gone too, which would be said first if it were opened."""
    gone = str(tmp_path / "none.zarr")
    run = saved(tmp_path / "a", made("sae", "topk"), cache, path=gone)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="is there already"):
        export([run], "saelens", tmp_path / "out", thresholds=Thresholds(500))
    skip = saved(tmp_path / "b", made("clt", "topk", skip=True), cache, path=gone)
    with pytest.raises(UserError, match="applied transposed"):
        export([skip], "circuit-tracer", tmp_path / "new", thresholds=Thresholds(500))
