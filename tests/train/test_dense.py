"""The trainer that is used takes the same steps as an independent one in the ordinary dense way, in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train.conftest import plans_for
from tests.train.dense import Dense, Rules, named, rate
from thresher.cache.reader import CacheReader
from thresher.train.fit import Fit
from thresher.train.views import Inputs, Views

STEPS, ROWS = 12, 192
FIRING: dict[str, dict[str, Any]] = {
    "topk": {"firing": "topk", "k": 3},
    "batchtopk": {"firing": "batchtopk", "k": 2.5},
    "jumprelu": {"firing": "jumprelu", "k": 4, "penalty": "target_l0", "sparsity": 0.1},
}
KINDS: dict[str, dict[str, Any]] = {
    "sae": {"kind": "sae", "layers": (1,), "pre_bias": True},
    "transcoder": {"kind": "transcoder", "layers": (1,)},
    "clt": {"kind": "clt", "decoder": "unit"},
}
WAYS = {"plain": {"kernels": "plain"}, "fast": {"kernels": "fast"}, "fast in parts": {"micro_rows": 80}}


def both(cache: CacheReader, kind: str, firing: str, way: str) -> tuple[Fit, Dense]:
    """Two trainers with the same weights in float64; a latent is dead after one batch without firing."""
    settings = {**KINDS[kind], **FIRING[firing]}
    train = {"batch_rows": ROWS, "steps": STEPS, "clip": 0.5, **WAYS[way]}
    (plan,) = plans_for(cache, "d", train, n_latents=96, aux_k=8, dead_after=ROWS, **settings)
    fit = Fit(plan, cache, torch.device("cpu"))
    fit.start(cache)
    fit.coder.double()
    spec = plan.spec
    rules = Rules(
        firing=firing,  # type: ignore[arg-type]
        k=float(spec.k or 0), sparsity=spec.sparsity, unit=spec.unit_norm, pre_bias=spec.pre_bias, aux_k=8,
        dead_after=ROWS, clip=0.5,
    )  # fmt: skip
    return fit, Dense(rules, named(fit.coder.state_dict()))


def batch(cache: CacheReader, fit: Fit, step: int) -> Inputs:
    rows = np.arange(step * ROWS, (step + 1) * ROWS)
    sites = (*fit.plan.spec.reads, *fit.plan.spec.writes)
    inputs = fit.inputs(Views({site: cache.gather("train", site, rows) for site in sites}))
    return Inputs([x.double() for x in inputs.xs], [y.double() for y in inputs.ys])


def groups(dense: Dense) -> dict[str, list[Tensor]]:
    return {"W_enc": dense.W_enc, "b_enc": dense.b_enc, "W_dec": dense.W_dec, "log_theta": dense.log_theta}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("firing", FIRING)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_dense_reference(cache: CacheReader, kind: str, firing: str, way: str) -> None:
    fit, dense = both(cache, kind, firing, way)
    revived = 0.0
    for step in range(STEPS):
        inputs = batch(cache, fit, step)
        fit.step(inputs, ROWS)
        dense.step(inputs.xs, inputs.ys, [space.total_variance for space in fit.writes], rate(3e-3, step, STEPS, 5))
        revived += dense.dead()
        torch.testing.assert_close(fit.coder.b_dec, dense.b_dec, rtol=1e-7, atol=1e-9)
        for name, tensors in groups(dense).items():
            for source, expected in enumerate(tensors):
                encoder = fit.coder.encoder(source)
                homes = {"W_dec": fit.coder.W_dec[source], "log_theta": getattr(encoder.rule, "log_theta", None)}
                found = homes[name] if name in homes else getattr(encoder, name)
                torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9, msg=f"step {step}: {name} {source}")
        for source, silent_F in enumerate(dense.silent):
            assert torch.equal(fit.coder.encoder(source).tokens_since_fired, silent_F)
    assert revived > 0  # else AuxK was not put to the test
