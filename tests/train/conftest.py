"""A small real cache with known structure: sparse features that every site carries along directions of its own.

And what tests of the stage share: plans of every kind and rule, and a signal at a given step.
"""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from rich.console import Console

from thresher.cache.contracts import Site
from thresher.cache.layout import Contexts
from thresher.cache.reader import CacheReader
from thresher.cache.writer import CacheWriter
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.fit import Fit
from thresher.train.plan import RunPlan, plan_runs
from thresher.train.run import RunResult, train
from thresher.train.views import Inputs, Views

if TYPE_CHECKING:
    from thresher.harvest.target import TransformerTarget

LAYERS, WIDTH, FEATURES, CONTEXT = 2, 16, 48, 64
ROWS = 200
"""Of a step that a test takes by hand."""

RULES: dict[str, dict[str, Any]] = {
    "relu": {"firing": "relu", "sparsity": 3e-3},
    "topk": {"firing": "topk", "k": 3},
    "batchtopk": {"firing": "batchtopk", "k": 2.5},
    "jumprelu": {"firing": "jumprelu", "sparsity": 3e-3, "preact": 1e-4},
}
FURTHER: dict[str, dict[str, Any]] = {
    "groupmax": {"kind": "transcoder", "firing": "groupmax", "k": 4, "k_anneal": 20, "k_start": 16},
    "gated": {"kind": "sae", "firing": "gated", "sparsity": 3e-3, "pre_bias": True},
    "global": {"kind": "sae", "firing": "global", "k": 3},
    "joint": {"kind": "clt", "firing": "batchtopk", "k": 2.5, "pool": "joint", "rank_by": "norm", "k_anneal": 20},
}
"""Rules that one topology each is enough for where runs take long."""
KINDS = ("sae", "transcoder", "clt")


def make_cache(path: Path, *, contexts: int = 96, poison: bool = False, identity: str = "toy") -> CacheReader:
    """Train and validation rows of two layers; `poison` makes one site's rows huge, so that training overflows."""
    rng = torch.Generator().manual_seed(3)
    taps = ("mlp_in", "mlp_out")
    sites = [Site(f"L{layer:02d}.{tap}", layer, tap, WIDTH) for layer in range(LAYERS) for tap in taps]
    directions = {site.name: torch.randn(FEATURES, WIDTH, generator=rng) for site in sites}
    packed = {name: _contexts(count) for name, count in (("train", contexts), ("validation", contexts // 4))}
    with CacheWriter.open(
        path, identity={"model": identity}, sites=sites, contexts=packed, codec="bf16", seed=0, fvu_gate=1.0
    ) as writer:
        for split, index in writer.pending():
            shard = writer.shard(split, index)
            count = len(shard.contexts)
            shape = (count, CONTEXT, FEATURES)
            code = (torch.rand(shape, generator=rng) < 0.06) * torch.rand(shape, generator=rng)
            noise = torch.randn((count, CONTEXT, WIDTH), generator=rng)
            acts = {name: code @ rows + 0.05 * noise + 0.5 for name, rows in directions.items()}
            if poison:
                acts["L01.mlp_in"] = acts["L01.mlp_in"] * 1e30
            shard.add(acts)
            shard.commit()
        writer.finalize()
    return CacheReader.open(path)


def _contexts(count: int) -> Contexts:
    keep = np.ones((count, CONTEXT), np.uint8)
    keep[:, 0] = 2
    documents = np.repeat(np.arange(count, dtype=np.int32)[:, None], CONTEXT, 1)
    return Contexts(np.zeros((count, CONTEXT), np.int32), documents, keep)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return make_cache(tmp_path_factory.mktemp("cache") / "cache.zarr")


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="session")
def tiny_target() -> "TransformerTarget":
    """What training end to end is tested on."""
    from tests.train import tiny

    return tiny.gpt2()


@pytest.fixture(scope="session")
def tiny_cache(tiny_target: "TransformerTarget", tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    from tests.train import tiny

    return tiny.make_cache(tmp_path_factory.mktemp("tiny") / "cache.zarr", tiny_target)


@pytest.fixture
def go(tiny_target: "TransformerTarget", tiny_cache: CacheReader, console: Console) -> Any:
    """`train` of plans into a directory, through the tiny model."""

    def run(plans: list[RunPlan], out: Path, **settings: Any) -> list[RunResult]:
        return train(plans, tiny_cache, out=out, device="cpu", console=console, target=tiny_target, **settings)

    return run


def plans_for(
    cache: CacheReader, label: str, train_settings: dict[str, Any] | None = None, **settings: Any
) -> list[RunPlan]:
    config = DictionaryConfig(**({"n_latents": 64, "dead_after": 2000, "aux_k": 8} | settings))
    base = {"batch_rows": 256, "steps": 40, "lr": 3e-3, "warmup": 5, "log_every": 10, "checkpoint_every": 15}
    return plan_runs(label, config, TrainConfig(**(base | (train_settings or {}))), cache.sites, {"from": "test"})


def inputs(cache: CacheReader, of: Fit, first: int = 0) -> Inputs:
    """`ROWS` training rows from `first` on, in float64 in a dictionary's training space."""
    rows = np.arange(first, first + ROWS)
    acts = {site: cache.gather("train", site, rows) for site in (*of.plan.spec.reads, *of.plan.spec.writes)}
    made = of.inputs(Views(acts))
    return Inputs([x.double() for x in made.xs], [y.double() for y in made.ys])


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a SIGTERM when the first dictionary has done that many steps."""
    real, sent = Fit.step, []

    def interrupted(self: Fit, *arguments: Any) -> torch.Tensor:
        norm = real(self, *arguments)
        if self.done == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    monkeypatch.setattr(Fit, "step", interrupted)
