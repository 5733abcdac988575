"""Rows that are normalised each by itself: in training, in what is served, and not where that could not be undone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.train.conftest import WIDTH, plans_for
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.train.dictionary.coder import Coder
from thresher.train.files import load_run
from thresher.train.fit import Fit
from thresher.train.run import RunResult, train
from thresher.train.views import Views


def run(cache: CacheReader, out: Path, console: Console, **settings: Any) -> tuple[Coder, RunResult]:
    (plan, *_) = plans_for(cache, "t", {"steps": 60}, firing="batchtopk", k=3, **settings)
    (result,) = train([plan], cache, out=out, device="cpu", console=console)
    return load_run(result.path).dictionary, result


@pytest.mark.parametrize("pre_bias", [False, True])
def test_an_sae_served_raw_rows_does_what_it_learned_on_normalised_ones(
    cache: CacheReader, tmp_path: Path, console: Console, pre_bias: bool
) -> None:
    coder, result = run(cache, tmp_path, console, kind="sae", normalise="per_token", pre_bias=pre_bias)
    x_ND = cache.gather("train", coder.reads[0], np.arange(300))
    mean, scale = x_ND.mean(1, keepdim=True), x_ND.std(1, keepdim=True) + 1e-5
    encoder = coder.encoder(0)
    a_NF = (x_ND - mean) / scale @ encoder.W_enc.T + encoder.b_enc
    z_NF = a_NF * (a_NF > encoder.rule.thresholds())
    codes = coder.encode(0, x_ND)
    torch.testing.assert_close(codes.dense(), z_NF, rtol=1e-4, atol=1e-5)
    expected = (z_NF @ coder.W_dec[0][:, 0] + coder.b_dec[0]) * scale + mean
    torch.testing.assert_close(coder.decode(0, [codes]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(coder.means[coder.writes[0]].mean(), x_ND.mean(), rtol=0.1, atol=0.02)
    held_out = result.metrics["held_out"]
    assert held_out["fvu"][0] < 0.8
    assert held_out["l0"] == pytest.approx([3.0], rel=0.1)
    assert held_out["note"] is None


def test_training_rows_and_their_variance_are_those_of_the_normalised_space(cache: CacheReader) -> None:
    (plan, *_) = plans_for(cache, "t", kind="sae", normalise="per_token", firing="topk", k=3)
    made = Fit(plan, cache, torch.device("cpu"))
    site = plan.spec.reads[0]
    raw_ND = cache.gather("train", site, np.arange(5000))
    given = made.inputs(Views({site: raw_ND}))
    assert torch.equal(given.xs[0], given.ys[0])
    torch.testing.assert_close(given.xs[0].mean(1), torch.zeros(5000), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(given.xs[0].std(1), torch.ones(5000), atol=1e-3, rtol=0.0)
    assert made.writes[0].total_variance == pytest.approx(given.xs[0].var(0).sum().item(), rel=0.05)
    assert made.writes[0].total_variance < WIDTH - 1


@pytest.mark.parametrize("kind", ["transcoder", "clt"])
def test_what_a_transcoder_writes_stays_raw(kind: str, cache: CacheReader, tmp_path: Path, console: Console) -> None:
    coder, result = run(cache, tmp_path, console, kind=kind, normalise="per_token_in")
    xs = [cache.gather("train", site, np.arange(100)) for site in coder.reads]
    codes = [coder.encode(source, x) for source, x in enumerate(xs)]
    assert all(part.frame is None for part in codes)
    scaled = [coder.encode(source, 7 * x + 3) for source, x in enumerate(xs)]
    for left, right in zip(codes, scaled, strict=True):
        torch.testing.assert_close(right.dense(), left.dense(), rtol=1e-3, atol=1e-3)
    by_hand = coder.b_dec[0] + codes[0].dense() @ coder.W_dec[0][:, 0]
    torch.testing.assert_close(coder.decode(0, [codes[0]]), by_hand)
    assert max(result.metrics["held_out"]["fvu"]) < 1.0


def test_what_could_not_be_undone_is_refused(cache: CacheReader) -> None:
    with pytest.raises(UserError, match=r"nobody knows.*per_token_in"):
        plans_for(cache, "t", kind="transcoder", normalise="per_token", firing="topk", k=3)
    with pytest.raises(UserError, match="writes what it reads"):
        plans_for(cache, "t", kind="sae", normalise="per_token_in", firing="topk", k=3)
