"""⌊kN⌋ entries, for the k that a recipe says and not for the float just below it."""

from importlib import util
from pathlib import Path

import pytest
import torch

from thresher.cache.contracts import Site
from thresher.train.calibrate import RankSearch
from thresher.train.config import TrainConfig
from thresher.train.counting import entries
from thresher.train.dictionary.rules import BatchTopK, Global
from thresher.train.dictionary.spec import DictionaryConfig, DictionarySpec
from thresher.train.dictionary.topologies import build
from thresher.train.plan import plan_runs

SITES = {f"L0{layer}.{tap}": Site(f"L0{layer}.{tap}", layer, tap, 6) for layer in range(3) for tap in ("in", "out")}


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_the_floor_is_that_of_the_decimal(digits: int) -> None:
    unit, missed = 10**digits, 0
    for part in range(1, 5 * unit, 7 if digits == 3 else 1):
        k = float(f"{part // unit}.{part % unit:0{digits}}")
        for tokens in (1, 100, 1000, 4096, 1_000_000, 3 * 10**9):
            assert entries(k, tokens) == part * tokens // unit
            missed += int(k * tokens) != part * tokens // unit
    assert digits == 1 or missed > 0, "the floats' product is as good"
    assert entries(32, 4096) == 32 * 4096


def spec(kind: str, **settings: object) -> DictionarySpec:
    config = DictionaryConfig(kind=kind, reads="in", writes="out", n_latents=20, k=0.29, **settings)  # type: ignore[arg-type]
    return plan_runs("x", config, TrainConfig(), SITES, {})[0].spec


def test_rules_and_calibration_keep_as_many() -> None:
    assert BatchTopK(spec("transcoder", firing="batchtopk")).budget(100) == 29
    assert BatchTopK(spec("clt", firing="batchtopk", pool="joint")).budget(100) == 87
    assert Global(spec("transcoder", firing="global")).budget(100) == 29
    search, values = RankSearch(0.29), torch.arange(1.0, 101.0)[:, None]
    search.add(values)
    assert search.result() == 72.0, "the 29th largest of 1, 2, …, 100"


def test_the_dense_clt_that_is_timed_beside_ours_keeps_as_many() -> None:
    place = util.spec_from_file_location("step_dense", Path(__file__).parents[2] / "benchmarks" / "step_dense.py")
    assert place is not None
    assert place.loader is not None
    module = util.module_from_spec(place)
    place.loader.exec_module(module)
    rng = torch.Generator().manual_seed(0)
    coder = build(spec("clt", firing="batchtopk")).double()
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    xs = [torch.randn((100, 6), generator=rng).double() for _ in range(3)]
    torch.testing.assert_close(module.DenseCLT(coder)(xs), coder(xs).y)
