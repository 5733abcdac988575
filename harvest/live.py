"""Live mode: the target feeds the trainer, and nothing is stored.

A thread runs the passes of a shard, encodes it as a harvest would, and keeps it in memory; training reads it in the
order of a ring with the same windows (`cache.windows`), so rows, order and results are those of rolling mode. It pays
for one pass over a corpus that a small model reads faster than a disk would be filled; `thresher cache estimate` tells.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from rich.console import Console
from rich.filesize import decimal

from thresher.cache.contracts import Site
from thresher.cache.memory_shards import MemoryShards, MemoryWriter
from thresher.cache.place import Place
from thresher.cache.plan import Plan, make_plan
from thresher.cache.shard import ShardData
from thresher.cache.windows import WindowedSource, Windows, merged_statistics
from thresher.harvest.corpus import Corpus, DataConfig, read_corpus
from thresher.harvest.feeder import Feeder
from thresher.harvest.fill import pass_size
from thresher.harvest.passes import Passes, shard_jobs
from thresher.harvest.settings import HarvestConfig, identity, window_bytes
from thresher.harvest.target import TargetConfig, TransformerTarget, load_target, load_tokenizer

WINDOW_GB = 4.0
"""Memory for activations when the recipe sets no harvest.window_gb."""


def with_window(config: HarvestConfig) -> HarvestConfig:
    """The settings with a bound on the activations that are in memory."""
    return config if config.window_gb is not None else replace(config, window_gb=WINDOW_GB)


def live_source(
    target: TargetConfig, data: DataConfig, config: HarvestConfig, *, path: Place, console: Console
) -> WindowedSource:
    """The target as a source; close it. `path` is only a name: nothing is written there.

    Returns once the first window is made. Raises UserError as `harvest` does.
    """
    config = with_window(config)
    with console.status("loading the model"):
        model = load_target(target)
        sites = model.sites(config.sites, config.layers)
    corpus = read_corpus(data, load_tokenizer(target), model.n_ctx, model.n_vocab, console)
    wanted = identity(target, data, config)
    bound = window_bytes(config)
    plan = make_plan(wanted, sites, corpus.splits, config.codec, config.seed, config.store, window_bytes=bound)
    maker = _Maker(model, sites, plan, corpus, config)
    shards = MemoryShards(plan, maker.produce, maker.close)
    windows = Windows.of(plan)
    console.print(
        f"Live from {model.name}: {windows.number} windows of {len(windows.shards_in(0)) * plan.shard_rows:,} rows, at "
        f"most {decimal(bound or 0)} of activations in memory."
    )
    try:
        with console.status("making the first window"):
            first = {index: shards.shard("train", index).moments for index in windows.shards_in(0)}
    except BaseException:
        shards.close()
        raise
    statistics = merged_statistics(plan, first)
    return WindowedSource(path, plan, shards, corpus.splits.__getitem__, maker.writer.calibrations, statistics)


class _Maker:
    """Makes one shard after another."""

    def __init__(
        self, model: TransformerTarget, sites: Sequence[Site], plan: Plan, corpus: Corpus, config: HarvestConfig
    ) -> None:
        self.writer = MemoryWriter(plan, corpus.splits, config.fvu_gate)
        self._contexts = corpus.splits
        self._batch = pass_size(config, model, sites, plan.splits["train"].tokens, {}).contexts
        # never entered: how memory is taken (allocation.py) is left as the training that shares the process wants it
        self._passes, self._feeder = Passes(model, sites), Feeder(model.device)

    def produce(self, split: str, index: int) -> ShardData:
        """Run the contexts of a shard and encode it."""
        shard = self.writer.shard(split, index)
        for done in self._passes.run(shard_jobs(split, index, shard.contexts, self._contexts[split], self._batch)):
            assert done is not None, "nobody else makes these shards"
            self._feeder.add(shard, done[1], partial(self._passes.give, done[1]))
        self._feeder.drain()
        shard.commit()
        return self.writer.made()

    def close(self) -> None:
        """Let go of the threads."""
        self._passes.__exit__()
        self._feeder.__exit__()
