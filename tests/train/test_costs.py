"""What training will take: counts are those of what is really built, written and kept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.conftest import FURTHER, RULES, plans_for
from tests.train.topologies import TOPOLOGIES
from thresher.cache.reader import CacheReader
from thresher.train.costs.sizes import sizes_of
from thresher.train.fit import Fit, Views, sites_of
from thresher.train.plan import RunPlan
from thresher.train.state import save_checkpoint

CASES: dict[str, dict[str, Any]] = {
    **{f"sae {rule}": {"kind": "sae", **settings} for rule, settings in RULES.items()},
    **{f"{kind} {rule}": {"kind": kind, **RULES[rule]} for kind, rule in (("transcoder", "topk"), ("clt", "jumprelu"))},
    **{f"{name}, again": dict(settings) for name, settings in FURTHER.items()},
    **{name: {"firing": "topk", "k": 3, **TOPOLOGIES[name]} for name in ("skip clt", "crosscoder", "molt")},
    "prefixes": {"kind": "sae", "firing": "batchtopk", "k": 3, "prefixes": (0.25, 1.0)},
}


def stepped(cache: CacheReader, plan: RunPlan) -> Fit:
    """A dictionary after its first step."""
    fit = Fit(plan, cache, torch.device("cpu"))
    fit.start(cache)
    acts = {site: cache.gather("train", site, torch.arange(256).numpy()).float() for site in sites_of([fit])}
    fit.step(fit.inputs(Views(acts)), 256)
    return fit


def total(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("case", "optimiser"), [(case, "adam") for case in CASES] + [("skip clt", o) for o in ("adamw", "signum", "muon")]
)
def test_what_is_counted_is_what_is_built_and_written(
    case: str, optimiser: str, cache: CacheReader, tmp_path: Path
) -> None:
    plan = plans_for(cache, "one", {"optimiser": optimiser}, **CASES[case])[0]
    found = sizes_of(plan.spec, plan.train)
    fit = stepped(cache, plan)
    coder, moments = fit.coder, fit.optimiser.moments()
    assert found.parameters == sum(p.numel() for p in coder.parameters())
    assert sum(found.weights) == total(coder.parameters())
    assert sum(found.moments) == total(moments.values())
    assert sum(found.buffers) == total(coder.state_dict().values()) - total(coder.parameters())
    save_checkpoint(tmp_path, fit.checkpoint())
    (file,) = (tmp_path / "checkpoints").glob("*.safetensors")
    assert found.checkpoint == file.stat().st_size
