"""A tiny random GPT-2, contexts for it, and a cache of its activations: what training end to end is tested on."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from thresher.cache.layout import Contexts
from thresher.cache.reader import CacheReader
from thresher.cache.writer import CacheWriter
from thresher.harvest.target import TransformerTarget
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.plan import RunPlan, plan_runs

WIDTH, LAYERS, VOCABULARY, CONTEXT = 8, 2, 31, 10
SITES = [f"L{layer:02d}.{tap}" for layer in range(LAYERS) for tap in ("mlp_in", "mlp_out")]


def gpt2(dtype: torch.dtype = torch.float32) -> TransformerTarget:
    """Two layers, everything random, also the norms' gains."""
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_head=2, n_layer=LAYERS, vocab_size=VOCABULARY, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    rng = torch.Generator().manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=rng) * 0.4)
    return TransformerTarget(model.eval(), name="tiny")


def contexts(rows: int, seed: int = 0) -> Contexts:
    """Random tokens; first positions special, a special one inside, two documents in a row, every third row padded."""
    rng = np.random.default_rng(seed)
    token = rng.integers(3, VOCABULARY, (rows, CONTEXT)).astype(np.int32)
    keep = np.ones((rows, CONTEXT), np.uint8)
    keep[:, 0] = keep[1::4, 4] = 2
    document = np.repeat(2 * np.arange(rows, dtype=np.int32)[:, None], CONTEXT, 1)
    document[::2, 6:] += 1
    keep[::3, -2:], document[::3, -2:], token[::3, -2:] = 0, -1, 0
    return Contexts(token, document, keep)


def make_cache(path: Path, target: TransformerTarget, rows: int = 120, codec: str = "bf16") -> CacheReader:
    """Activations of random contexts at the MLPs' inputs and outputs."""
    sites = target.sites(SITES)
    packed = {"train": contexts(rows), "validation": contexts(rows // 4, seed=1)}
    made_of: Mapping[str, Any] = {"model": "tiny"}
    with CacheWriter.open(
        path, identity=made_of, sites=sites, contexts=packed, codec=codec, seed=0, fvu_gate=1.0
    ) as writer:
        for split, index in writer.pending():
            shard = writer.shard(split, index)
            tokens = torch.from_numpy(packed[split].token_id[shard.contexts].astype(np.int64))
            shard.add({name: x.clone() for name, x in target.record(tokens, sites).items()})
            shard.commit()
        writer.finalize()
    return CacheReader.open(path)


class Statistics:
    """A source as far as a dictionary needs one to be built: uneven statistics of every site."""

    def rows(self, split: str) -> int:
        return 1000

    def statistics(self, site: str) -> SimpleNamespace:
        rng = np.random.default_rng(len(site) + int(site[1:3]))
        variance = rng.uniform(0.3, 2.0, WIDTH)
        return SimpleNamespace(mean=rng.normal(size=WIDTH), variance=variance, mean_norm=2.5)

    def sample(self, split: str, count: int) -> np.ndarray:
        return np.arange(50)

    def gather(self, split: str, site: str, rows: np.ndarray) -> Tensor:
        return torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(0))


def plans_for(
    target: TransformerTarget, label: str, train: Mapping[str, Any] | None = None, **settings: Any
) -> list[RunPlan]:
    config = DictionaryConfig(**({"n_latents": 24, "dead_after": 2000, "aux_k": 3} | settings))
    base = {"objective": "kl", "batch_rows": 80, "steps": 12, "lr": 3e-3, "warmup": 2, "log_every": 4}
    base |= {"checkpoint_every": 5, "calibrate_rows": 200, "heldout_rows": 200}
    sites = {site.name: site for site in target.sites(SITES)}
    return plan_runs(label, config, TrainConfig(**(base | dict(train or {}))), sites, {"from": "test"})


def randomised(tensor: Tensor, rng: torch.Generator, scale: float) -> Tensor:
    return torch.randn(tensor.shape, generator=rng, dtype=torch.float64) * scale
