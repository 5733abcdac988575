"""A small real cache with known structure: sparse features that every site carries along directions of its own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from thresher.cache.contracts import Site
from thresher.cache.layout import Contexts
from thresher.cache.reader import CacheReader
from thresher.cache.writer import CacheWriter

LAYERS, WIDTH, FEATURES, CONTEXT = 2, 16, 48, 64


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
