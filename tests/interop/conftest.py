"""Dictionaries with random weights in every form that other tools know, and a small cache to bring foreign ones to."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from thresher.cache.contracts import Site
from thresher.cache.layout import Contexts
from thresher.cache.reader import CacheReader
from thresher.cache.records import to_dict
from thresher.cache.writer import CacheWriter
from thresher.interop.canonical import Canonical, Firing, Kind, Source, to_coder
from thresher.train.files import save_run

LAYERS, WIDTH, OUT, LATENTS, K, CONTEXT = 3, 16, 12, 48, 4, 32
TAPS = {"resid_post": WIDTH, "mlp_in": WIDTH, "mlp_out": WIDTH, "narrow": OUT}

Made = Callable[..., Canonical]


def make(kind: Kind, firing: Firing, *, skip: bool = False, unit: bool = False, out: int = WIDTH, seed: int = 0):
    """A canonical dictionary of random weights; every tensor differs from every other."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    layers = LAYERS if kind == "clt" else 1
    sources = []
    for layer in range(layers):
        W_dec = draw(LATENTS, layers - layer if kind == "clt" else 1, out)
        W_dec = W_dec / W_dec.flatten(1).norm(dim=1)[:, None, None] if unit else W_dec
        theta = draw(LATENTS).abs() if firing == "threshold" else torch.zeros(LATENTS, dtype=torch.float64)
        counted = firing in ("topk", "groupmax")
        sources.append(Source(draw(LATENTS, WIDTH) / 4, draw(LATENTS) / 4, None if counted else theta, W_dec))
    tap = "resid_post" if kind == "sae" else "mlp_in"
    written = {"sae": "resid_post"}.get(kind, "mlp_out" if out == WIDTH else "narrow")
    places = range(layers) if kind == "clt" else (1,)
    return Canonical(
        name=f"{kind}-{firing}",
        kind=kind,
        reads=tuple(f"L{layer:02d}.{tap}" for layer in places),
        writes=tuple(f"L{layer:02d}.{written}" for layer in places),
        layers=tuple(places),
        firing=firing,
        k=K if firing in ("topk", "groupmax") else None,
        sources=tuple(sources),
        b_dec=tuple(draw(out) for _ in range(layers)),
        W_skip=tuple(draw(out, WIDTH) / 4 for _ in range(layers)) if skip else None,
    )


@pytest.fixture
def made() -> Made:
    return make


@pytest.fixture
def facts() -> Mapping[str, Any]:
    """Provenance as export.py makes it."""
    return {
        "thresher_version": "0",
        "run": "r",
        "weights_sha256": "00",
        "target": {"model": "gpt2", "weights": "11"},
        "data": {
            "source": "books",
            "subset": None,
            "split": "train",
            "column": None,
            "context": 128,
            "bos": True,
        },
        "cache_fingerprint": "22",
        "git_commit": None,
        "dictionary": {"kind": "sae", "firing": "topk", "k": 4, "reads": [], "writes": []},
        "training_rows": 1000,
        "held_out": {},
    }


def finished(path: Path, dictionary: Canonical, facts: Mapping[str, Any], group: str = "g") -> Path:
    """A run directory of a dictionary."""
    coder = to_coder(dictionary)
    config = {
        "name": path.name,
        "group": group,
        "dictionary": to_dict(coder.spec),
        "cache": {
            "path": "none",
            "fingerprint": facts["cache_fingerprint"],
            "identity": {"target": facts["target"], "data": facts["data"]},
        },
        "training": {"finished": True, "rows": facts["training_rows"]},
    }
    save_run(path, coder, config)
    return path


@pytest.fixture
def rows() -> Tensor:
    """[64, D] rows, one of them zero and one far out."""
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x[3], x[0] = 0.0, x[0] * 100
    return x


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    """Random rows at every tap of all layers."""
    path = tmp_path_factory.mktemp("interop") / "cache.zarr"
    rng = torch.Generator().manual_seed(3)
    sites = [Site(f"L{i:02d}.{tap}", i, tap, width) for i in range(LAYERS) for tap, width in TAPS.items()]
    identity = {"target": {"model": "toy"}, "data": {"context": CONTEXT}}
    packed = {"train": _contexts(24), "validation": _contexts(12)}
    with CacheWriter.open(
        path,
        identity=identity,
        sites=sites,
        contexts=packed,
        codec="bf16",
        seed=0,
        fvu_gate=1.0,
    ) as writer:
        for split, index in writer.pending():
            shard = writer.shard(split, index)
            count = len(shard.contexts)
            shard.add({s.name: torch.randn(count, CONTEXT, s.width, generator=rng) + 0.5 for s in sites})
            shard.commit()
        writer.finalize()
    return CacheReader.open(path)


def _contexts(count: int) -> Contexts:
    keep = np.ones((count, CONTEXT), np.uint8)
    keep[:, 0] = 2
    documents = np.repeat(np.arange(count, dtype=np.int32)[:, None], CONTEXT, 1)
    return Contexts(np.zeros((count, CONTEXT), np.int32), documents, keep)


def written(path: Path) -> set[str]:
    """Names of all files below a directory."""
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
