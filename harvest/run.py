"""The harvest: text through the target into a cache, once.

1. A finished cache that serves this recipe is reused, before anything is loaded.
2. The model is loaded, its sites resolved. Text is tokenised and packed and the plan written by one process under a
   lock; whoever comes later, or again after a kill, takes the contexts from the cache and needs neither text nor
   tokenizer.
3. The passes run (fill.py): a kill loses at most two shards, one being filled and one on its way to the disk, and the
   same command goes on. Ctrl-C or SIGTERM stops after the current pass.

With `extend`, a cache that is there gets more sites or more text instead (extend.py).
"""

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from thresher.cache.commit import ROOT, harvest_again
from thresher.cache.contracts import Site
from thresher.cache.directory import forget_plan, planning
from thresher.cache.errors import UserError
from thresher.cache.place import Place, local
from thresher.cache.reader import find_complete
from thresher.cache.records import differences
from thresher.cache.roster import Roster
from thresher.cache.stored import read_contexts, read_root
from thresher.harvest.corpus import Corpus, DataConfig, read_corpus
from thresher.harvest.extend import can_extend, extend_cache
from thresher.harvest.fill import fill_part, note_versions, outcome, shown
from thresher.harvest.settings import HarvestConfig, HarvestResult, identity
from thresher.harvest.target import TargetConfig, TransformerTarget, held, load_tokenizer


def harvest(
    target: TargetConfig,
    data: DataConfig,
    config: HarvestConfig,
    *,
    path: Place,
    console: Console,
    extend: bool = False,
    roster: Roster | None = None,
) -> HarvestResult:
    """Fill the cache at `path`, go on with it, or find it finished; with `extend`, add what it lacks to a finished one.

    Raises UserError for anything the user can mend, and Interrupted after Ctrl-C or SIGTERM, with all full shards kept.
    `roster`, entered: the ranks of a job, of which each fills its share and the first one speaks.
    """
    started = time.perf_counter()
    roster = roster or Roster()
    if not roster.world.speaks:
        console = Console(quiet=True)
    wanted = identity(target, data, config)
    if config.window_gb is not None:
        local(path, "A ring (harvest.window_gb)")
    if extend:
        return extend_cache(target, data, config, wanted, path=path, console=console, roster=roster)
    finished = find_complete(path, wanted)
    if finished is not None:
        rows = {split: finished.rows(split) for split in read_root(path).plan.splits}
        console.print(f"[bold]Reusing[/bold] the cache {path}: {shown(rows)}, made with the same settings.")
        return HarvestResult(path, True, rows, 0, 0.0, time.perf_counter() - started)
    _refuse_other(path, wanted)
    with ExitStack() as stack:
        with console.status("loading the model"):
            model = stack.enter_context(held(target, roster))
            sites = model.sites(config.sites, config.layers)
        if model.follows:
            model.follow()
            return HarvestResult(path, False, {}, 0, 0.0, time.perf_counter() - started)
        create = planning(path, lambda line: console.print(line, highlight=False))
        try:
            _refuse_other(path, wanted)
            corpus, facts = _stored_corpus(path, console)
            if corpus is None:
                corpus = read_corpus(data, load_tokenizer(target), model.n_ctx, model.n_vocab, console)
        except BaseException:
            forget_plan(path, create)
            raise
        filled = fill_part(
            model, corpus, sites, config, wanted, path=path, console=console, begun=facts, create=create, roster=roster
        )
        return outcome(path, [filled], started, console)


def harvest_corpus(
    model: TransformerTarget,
    corpus: Corpus,
    sites: tuple[Site, ...],
    config: HarvestConfig,
    wanted: Mapping[str, Any],
    *,
    path: Place,
    console: Console,
) -> HarvestResult:
    """The harvest proper, on a loaded model and packed text; `wanted` is the cache's identity."""
    started = time.perf_counter()
    filled = fill_part(model, corpus, sites, config, wanted, path=path, console=console)
    return outcome(path, [filled], started, console)


def _refuse_other(path: Place, wanted: Mapping[str, Any]) -> None:
    """Raise UserError for a cache of something else, finished or not, before anything is loaded."""
    if not (path / ROOT).exists():
        return
    lines = differences(json.loads(json.dumps(dict(wanted))), read_root(path).plan.identity)
    if lines:
        bridged = can_extend(path, json.loads(json.dumps(dict(wanted))))
        extension = f"add what is missing to this one with `{harvest_again(path, extend=True)}`, " if bridged else ""
        raise UserError(
            f"{path} holds another cache: {'; '.join(lines)} ('expected' is this recipe's). Choose another place with "
            f"--cache PATH, {extension}or remove that directory if it is no longer wanted."
        )


def _stored_corpus(path: Place, console: Console) -> tuple[Corpus | None, dict[str, Any]]:
    """The contexts and facts of a cache that was begun at `path`; None and nothing when there is none."""
    if not (path / ROOT).exists():
        return None, {}
    plan, facts = read_root(path)
    note_versions(facts, console)
    return Corpus({split: read_contexts(path, plan, split) for split in plan.splits}, facts["corpus"]), facts
