"""Batches are nearly as good as a perfect shuffle, by the order alone and in a cache that was really written."""

import numpy as np
import pytest
import torch

from thresher.cache.batches import default_group
from thresher.cache.contracts import Site
from thresher.cache.layout import Contexts
from thresher.cache.mixing import expected_pairs, measured
from thresher.cache.order import ReadOrder, context_order, shard_order
from thresher.cache.reader import CacheReader
from thresher.cache.writer import CacheWriter


def stored_contexts(contexts: int, per_context: int, shard_rows: int, seed: int) -> np.ndarray:
    """[N] context of every stored row of a harvest whose contexts are all full."""
    stream = np.repeat(context_order(contexts, seed, "train"), per_context)
    shards = stream.reshape(-1, shard_rows)
    return np.concatenate([rows[shard_order(shard_rows, seed, "train", i)] for i, rows in enumerate(shards)])


def test_an_order_of_default_sizes_is_nearly_a_perfect_shuffle() -> None:
    """4.2 million rows in contexts of 1024, C = 1024, S = 262,144, B = 4096, G = 64: all batches of an epoch."""
    n, k, b, c, s = 1 << 22, 1024, 4096, 1024, 1 << 18
    g = default_group(b)
    assert g == 64
    context_N = stored_contexts(n // k, k, s, seed=0)
    mixing = measured(ReadOrder(n // c, c, 1, "train", g), context_N, b, n // b)
    assert mixing.ideal == pytest.approx(0.5 * b * (b - 1) * (k - 1) / (n - 1))
    assert 1.0 < mixing.excess < 1.3
    assert mixing.pairs == pytest.approx(expected_pairs(n, k, b, g, c, s), rel=0.02)


def test_without_the_harvest_permutation_it_is_not() -> None:
    n, k, b, c = 1 << 20, 1024, 4096, 1024
    mixing = measured(ReadOrder(n // c, c, 1, "train", 64), np.repeat(np.arange(n // k), k), b, 64)
    assert mixing.excess > 15


@pytest.mark.parametrize("batch_rows", [1024, 4096, 8192])
def test_a_cache_of_its_own_default_sizes_is_nearly_a_perfect_shuffle(batch_rows: int, written: CacheReader) -> None:
    n, c, s = written.rows("train"), written.chunk_rows, written.plan.shard_rows
    g = default_group(batch_rows)
    context_N = written.provenance("train").context
    for start in (0, n):  # two epochs
        order = written.order("train", 3, g)
        mixing = measured(order, context_N, batch_rows, n // batch_rows, start)
        assert mixing.excess < 1.3
        assert mixing.pairs == pytest.approx(expected_pairs(n, 255, batch_rows, min(g, n // c), c, s), rel=0.03)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    """131,000 rows of contexts of 256 tokens at a site two numbers wide."""
    path, m, t = tmp_path_factory.mktemp("mixing") / "c.zarr", 514, 256
    keep = np.ones((m, t), np.uint8)
    keep[:, 0] = 2
    zeros, site = np.zeros((m, t), np.int32), Site("L00.x", 0, "x", 2)
    packed = {"train": Contexts(zeros, zeros, keep)}
    with CacheWriter.open(path, identity={}, sites=[site], contexts=packed, codec="bf16", seed=0, fvu_gate=1) as writer:
        while (claimed := writer.claim()) is not None:
            shard = writer.shard(*claimed)
            shard.add({site.name: torch.randn(len(shard.contexts), t, 2)})
            shard.commit()
        writer.finalize()
    return CacheReader.open(path)
