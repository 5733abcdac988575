"""What a harvest would take: its rows counted or bounded, the model and the disk timed for a few seconds.

Local text is tokenised and packed as the harvest does it, so the count is exact. Text on the hub is known only by its
limit. The model is timed on passes like the harvest's own, and the disk where the cache is to lie.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numcodecs
import torch
from rich.console import Console
from torch import Tensor

from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.estimate import Rates, Workload, disk_rates, sketched
from thresher.cache.layout import BLOSC, CODECS, Codec, Contexts, Store, row_sizes
from thresher.cache.publish import free_bytes
from thresher.harvest.corpus import DataConfig, context_length, read_corpus
from thresher.harvest.documents import local_path
from thresher.harvest.fill import memory_needed, pass_size
from thresher.harvest.passes import Passes
from thresher.harvest.settings import HarvestConfig
from thresher.harvest.target import TargetConfig, load_target, load_tokenizer
from thresher.harvest.timing import run_trial

SMALLEST_SAMPLE, LARGEST_SAMPLE = 64 << 20, 1 << 30
"""Bytes written to time the disk: no more than the cache would, but enough to tell."""
COUNTED_TOKENS = 50_000_000
"""Local text with a higher limit is not read: tokenising it would take minutes."""

COUNTED = "counted in the text"
_ANY_VOCABULARY = 1 << 31  # a limit on ids that no tokenizer meets


class Measured(NamedTuple):
    """What `cache estimate` starts from."""

    work: Workload
    rates: Rates
    device: str
    memory: dict[Codec, int]
    """By codec: bytes of host memory that the harvest takes beside the model."""
    basis: str
    """Where the number of rows comes from."""


def measure(
    target: TargetConfig,
    data: DataConfig,
    config: HarvestConfig,
    *,
    folder: Path,
    tokens: int | None,
    console: Console,
) -> Measured:
    """Load the model, count the text, time both model and disk; `tokens` stands for the text when it is given.

    Raises UserError for a dataset on the hub without data.max_tokens when `tokens` is not given, and all that harvest
    would refuse.
    """
    bound = _bound(data, tokens)  # before the model is loaded: it may be refused
    with console.status("loading the model"):
        model = load_target(target)
        sites = model.sites(config.sites, config.layers)
    context, sample = context_length(data, model.n_ctx), None
    if bound is None:
        splits = read_corpus(data, load_tokenizer(target), model.n_ctx, model.n_vocab, console).splits
        work, sample, basis = counted(sites, splits, config.store), splits["train"].token_id, COUNTED
    else:
        work, basis = bounded(sites, data, bound, context, config.store), _basis(tokens)
    with console.status("timing the model and the disk"):
        size = pass_size(config, model, sites, context, {})
        with Passes(model, sites, size.threads) as passes:
            trial = run_trial(passes, model, size, context, sample)
        bf16_bytes = sum(work.rows.values()) * 2 * sum(site.width for site in sites)
        disk = disk_rates(folder, at_most=min(LARGEST_SAMPLE, max(SMALLEST_SAMPLE, bf16_bytes)))
    rates = Rates(disk, free_bytes(folder), trial.tokens_per_s, shrinkage(trial.acts, work))
    memory = {codec: memory_needed(sketched(work, codec), model, size, trial.running) for codec in CODECS}
    return Measured(work, rates, str(model.device), memory, basis)


def expected(
    target: TargetConfig,
    data: DataConfig,
    config: HarvestConfig,
    sites: tuple[Site, ...],
    n_ctx: int,
    tokens: int | None,
    console: Console,
) -> tuple[Workload, str]:
    """The workload of a target that is not loaded, and where its number of rows comes from.

    `n_ctx`: the longest context that the target takes. Local text is packed, with the target's tokenizer, where it is
    not bounded. Raises UserError as `measure`.
    """
    bound = _bound(data, tokens)
    if bound is None:
        splits = read_corpus(data, load_tokenizer(target), n_ctx, _ANY_VOCABULARY, console).splits
        return counted(sites, splits, config.store), COUNTED
    return bounded(sites, data, bound, context_length(data, n_ctx), config.store), _basis(tokens)


def _basis(tokens: int | None) -> str:
    return "expected at most, from " + ("--tokens" if tokens is not None else "data.max_tokens")


def counted(sites: tuple[Site, ...], splits: Mapping[str, Contexts], store: Store) -> Workload:
    """The workload of packed text."""
    rows = {split: int(packed.stored(store).sum()) for split, packed in splits.items()}
    contexts = {split: len(packed.token_id) for split, packed in splits.items()}
    return Workload(sites, rows, contexts, splits["train"].token_id.shape[1], store)


def bounded(sites: tuple[Site, ...], data: DataConfig, tokens: int, context: int, store: Store) -> Workload:
    """The workload of so many tokens in full contexts, shared out as data says.

    Position 0 of every context is special; special tokens elsewhere are not known and counted as rows.
    """
    contexts = max(1, tokens // (context - data.bos))
    shares = {"test": data.test_fraction, "validation": data.validation_fraction}
    by_split = {split: round(contexts * share) for split, share in shares.items() if share}
    by_split = {"train": contexts - sum(by_split.values()), **by_split}
    stored = context - (store == "kept")
    return Workload(sites, {split: m * stored for split, m in by_split.items()}, by_split, context, store)


def shrinkage(acts: Mapping[str, Tensor], work: Workload) -> float:
    """How much smaller bf16-lz4 makes a chunk of every site, all sites together."""
    chunk, _ = row_sizes([site.width for site in work.sites], work.rows["train"])
    codec = numcodecs.Blosc(BLOSC["cname"], BLOSC["clevel"], numcodecs.Blosc.BITSHUFFLE)  # typesize from the array
    plain = packed = 0
    for acts_BTD in acts.values():
        rows = acts_BTD.flatten(0, 1)[:chunk].to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()
        plain, packed = plain + rows.nbytes, packed + len(codec.encode(rows))
    return plain / packed


def _bound(data: DataConfig, tokens: int | None) -> int | None:
    """Tokens to reckon with, or None for text that is to be counted."""
    if tokens is not None:
        return tokens
    if local_path(data.source) is None:
        if data.max_tokens is None:
            raise UserError(
                f"how many tokens {data.source!r} on the hub has cannot be known before it is read. Give the number to "
                "reckon with as --tokens N, or set data.max_tokens."
            )
        return data.max_tokens
    return data.max_tokens if data.max_tokens is not None and data.max_tokens > COUNTED_TOKENS else None
