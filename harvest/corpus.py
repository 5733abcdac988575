"""Text to packed token contexts in disjoint splits.

Documents are read lazily, tokenised in batches, and each goes whole into one split, chosen by a keyed hash of its
content: equal documents land in the same split whatever their order, and adding documents moves none. Every split is
packed by itself. What stays in memory is 9 bytes a token: token id, document id and keep class.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.order import SPLITS, split_of
from thresher.harvest.documents import Document, Source, content_digest, documents, local_path
from thresher.harvest.packing import Marks, Packer
from thresher.harvest.tokenising import batches, check_range, content_key, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_CONTEXT = 1024
"""Context length when the recipe gives none and the model allows more."""

_KEEP = {"content": "position 0 and special tokens apart", "all": "every position"}
"""By what a cache is known."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and how it becomes contexts: the table [data] of a recipe."""

    source: str = "bundled:books"
    """A dataset on the hub; a .txt, .jsonl or .parquet file or a directory of them; a save_to_disk directory;
    bundled:books; or rows:N, the first N input rows of a toy model."""

    subset: str | None = None
    """Configuration name of a hub dataset, such as wikitext-103-raw-v1."""

    split: str = "train"
    """Split of a hub or saved dataset to read; Thresher makes its own train, test and validation from it."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset; left out: its main branch."""

    column: str = "text"
    """Column that holds the text, or lists of token ids."""

    streaming: bool = False
    """Read a hub dataset over the network as it goes instead of downloading it first; use it with a limit."""

    txt_documents: Literal["file", "paragraph", "line"] = "file"
    """What a document is in a .txt file: the whole file, what stands between blank lines, or a line."""

    context: int | None = None
    """Tokens per context; left out: as many as the model allows, at most 1024."""

    packing: Literal["packed", "document"] = "packed"
    """packed: documents end to end, cut into full contexts. document: one document per context, cut or padded."""

    bos: bool = True
    """Put the tokenizer's BOS (its EOS if it has none) at position 0 of every context."""

    separator: Literal["eos", "bos", "none"] = "eos"
    """Token behind (eos) or in front of (bos) every document."""

    keep: Literal["content", "all"] = "content"
    """Positions that count: for statistics, training and evaluation alike. content: all but padding, position 0 and
    special tokens, whose norms are 10 to 100 times those of others and would hide what happens at them. all: every
    position but padding, as many published runs have it; evaluation still leaves the first of a context alone."""

    max_tokens: int | None = None
    """Stop after this many tokens of documents, all splits together; the last document is cut."""

    max_documents: int | None = None
    """Stop after this many documents."""

    skip_documents: int = 0
    """Leave out so many documents at the start: those that a cache to be extended holds already."""

    test_fraction: float = 0.01
    """Share of documents held out for evaluation."""

    validation_fraction: float = 0.0
    """Share of documents held out for choosing between runs."""

    split_seed: int = 0
    """Key of the hash that decides a document's split."""

    def __post_init__(self) -> None:
        for name in ("test_fraction", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"data.{name} is {getattr(self, name)}; expected at least 0 and less than 1.")
        if self.test_fraction + self.validation_fraction >= 1:
            raise UserError(
                f"data.test_fraction + data.validation_fraction is {self.test_fraction + self.validation_fraction}; "
                "expected less than 1, so that some documents are left for training."
            )
        for name in ("max_tokens", "max_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.{name} is {value}; expected at least 1. Leave it out for no limit.")
        if self.skip_documents < 0:
            raise UserError(f"data.skip_documents is {self.skip_documents}; expected 0 or more.")
        if self.context is not None and self.context < 2:
            raise UserError(f"data.context is {self.context}; expected at least 2 tokens.")
        if not self.source or not self.column:
            raise UserError("data.source and data.column must not be empty.")

    @property
    def place(self) -> Source:
        """Where the documents come from."""
        return Source(
            self.source, self.subset, self.split, self.revision, self.column, self.streaming, self.txt_documents
        )


class Corpus(NamedTuple):
    """Packed text."""

    splits: dict[str, Contexts]
    """Those of train, test and validation that have documents."""
    facts: dict[str, Any]
    """Counts per split, what was dropped, and the token ids put in: JSON values, to stand beside the fingerprint."""


def data_identity(config: DataConfig) -> dict[str, Any]:
    """What makes these contexts these, given a tokenizer: settings, and for local files a digest of their content."""
    path = local_path(config.source)
    return {
        "source": config.source if path is None or config.source.startswith("bundled:") else path.resolve().name,
        "content": None if path is None else content_digest(path),
        "subset": config.subset,
        "split": config.split,
        "revision": config.revision,
        "column": config.column,
        "txt_documents": config.txt_documents,
        "context": config.context,
        "packing": config.packing,
        "bos": config.bos,
        "separator": config.separator,
        "max_tokens": config.max_tokens,
        "max_documents": config.max_documents,
        "skip_documents": config.skip_documents,
        "test_fraction": config.test_fraction,
        "validation_fraction": config.validation_fraction,
        "split_seed": config.split_seed,
        "keep": _KEEP[config.keep],
    }


def read_corpus(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    n_ctx: int,
    n_vocab: int,
    console: Console,
    *,
    extending: bool = False,
) -> Corpus:
    """Read, tokenise, split and pack.

    Text that is `extending` a cache may be too little for a held-out split, which is then left out: the cache has one.

    `n_ctx` and `n_vocab` are the model's limits. Raises UserError for text without a tokenizer, token ids that the
    model does not have, contexts longer than it allows, and splits that come out empty.
    """
    context = context_length(config, n_ctx)
    packers = make_packers(config, tokenizer, context)
    marks = packers["train"].marks
    read = _fill(packers, config, tokenizer, n_vocab, console)
    if not any(packer.documents for packer in packers.values()):
        raise UserError(
            f"data.source {config.source!r} gave no document with any token (column {config.column!r}, skip_documents "
            f"{config.skip_documents}); expected at least one. Check the source and the column."
        )
    splits = {name: packer.contexts() for name, packer in packers.items() if packer.documents}
    if extending:
        splits = {name: contexts for name, contexts in splits.items() if len(contexts.token_id)}
        _check_train(packers["train"], splits, context)
    else:
        _check_splits(config, packers, splits, context)
    facts = {
        "context": context,
        "documents_read": read,
        "bos": marks.bos,
        "separator": marks.before if marks.before is not None else marks.after,
        "splits": {
            name: {
                "documents": packers[name].documents,
                "tokens": packers[name].tokens,
                "contexts": len(contexts.token_id),
                "dropped_tokens": packers[name].dropped,
            }
            for name, contexts in splits.items()
        },
    }
    return Corpus(splits, facts)


def make_packers(config: DataConfig, tokenizer: "PreTrainedTokenizerBase | None", context: int) -> dict[str, Packer]:
    """An empty packer for each split. Raises UserError when the tokenizer lacks a token that is to be put in."""
    marks = _marks(config, tokenizer)
    special = np.unique([mark for mark in marks if mark is not None] + list(_special_ids(tokenizer))).astype(np.int64)
    keep_all = config.keep == "all"
    return {
        split: Packer(context=context, packing=config.packing, marks=marks, special=special, keep_all=keep_all)
        for split in SPLITS
    }


def context_length(config: DataConfig, n_ctx: int) -> int:
    """Tokens per context. Raises UserError for more than the model's `n_ctx`."""
    context = min(n_ctx, LONGEST_CONTEXT) if config.context is None else config.context
    if context > n_ctx:
        raise UserError(
            f"data.context is {context} tokens, and the model takes at most {n_ctx}. Set data.context to {n_ctx} or "
            "less, or leave it out."
        )
    return context


def _marks(config: DataConfig, tokenizer: "PreTrainedTokenizerBase | None") -> Marks:
    """The tokens to put in. Raises UserError when the tokenizer does not have them."""
    eos = getattr(tokenizer, "eos_token_id", None)
    bos = getattr(tokenizer, "bos_token_id", None)
    bos = eos if bos is None else bos
    for key, wanted, token, off in (
        ("bos", config.bos, bos, "false"),
        ("separator", config.separator == "eos", eos, '"none"'),
        ("separator", config.separator == "bos", bos, '"none"'),
    ):
        if wanted and token is None:
            have = "the model has no tokenizer" if tokenizer is None else "its tokenizer has no such token"
            raise UserError(f"data.{key} asks for a token, but {have}. Set data.{key} = {off}.")
    # One document per context needs no separator in front of it beside the BOS of the context.
    doubled = config.packing == "document" and config.bos
    return Marks(
        bos=bos if config.bos else None,
        before=bos if config.separator == "bos" and not doubled else None,
        after=eos if config.separator == "eos" else None,
    )


def _special_ids(tokenizer: "PreTrainedTokenizerBase | None") -> Iterable[int]:
    return () if tokenizer is None else tokenizer.all_special_ids


class Placed(NamedTuple):
    """A document, tokenised."""

    split: str
    """Where it goes; "" for one without any token."""
    tokens: np.ndarray
    """[n] int64."""
    read: int
    """Documents of the source up to this one, with it and with those that were left out at the start."""


def placed_documents(config: DataConfig, tokenizer: "PreTrainedTokenizerBase | None", n_vocab: int) -> Iterator[Placed]:
    """Every document from `skip_documents` on, in stored order; the limits of `config` are the caller's to keep.

    Raises UserError as `read_corpus` does for text that cannot be read or tokenised.
    """
    count, read = 0, config.skip_documents
    for batch in batches(itertools.islice(documents(config.place), config.skip_documents, None)):
        for document, tokens in zip(batch, token_ids(batch, tokenizer, config.column), strict=True):
            read += 1
            if len(tokens):
                check_range(tokens, n_vocab, count)
                count += 1
            yield Placed(document_split(document, config) if len(tokens) else "", tokens, read)


def document_split(document: Document, config: DataConfig) -> str:
    """The split that a document goes to, by its content alone."""
    return split_of(content_key(document), config.split_seed, config.test_fraction, config.validation_fraction)


def _fill(
    packers: dict[str, Packer],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    n_vocab: int,
    console: Console,
) -> int:
    """Give every document to the packer of its split, until a limit; returns how many were read, skipped ones too."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading text")
        count, read, taken = 0, config.skip_documents, 0
        for split, tokens, read in placed_documents(config, tokenizer, n_vocab):
            if not split:
                continue
            left = None if config.max_tokens is None else config.max_tokens - taken
            packers[split].add(tokens[:left], count)
            count += 1
            if count == config.max_documents or (left is not None and len(tokens) >= left):
                return read
            taken = sum(packer.tokens for packer in packers.values())
            if count % 256 == 0:
                progress.update(task, description=f"reading text: {count:,} documents, {taken:,} tokens")
        return read


def _check_splits(config: DataConfig, packers: dict[str, Packer], splits: dict[str, Contexts], context: int) -> None:
    fractions = {"train": 1.0, "test": config.test_fraction, "validation": config.validation_fraction}
    total = sum(packer.documents for packer in packers.values())
    for name, fraction in fractions.items():
        if not fraction or (name in splits and len(splits[name].token_id)):
            continue
        packer = packers[name]
        if fractions["train"] == sum(fractions.values()):
            raise UserError(
                f"data.source {config.source!r} fills no context: {packer.documents} documents have {packer.tokens} "
                f"tokens together, and a context takes {context}. Give more text, or a shorter data.context."
            )
        raise UserError(
            f"the {name} split has no full context: {packer.documents} of {total} documents went to it, with "
            f"{packer.tokens} tokens, and a context takes {context}. Give more documents (for a .txt file, "
            'txt_documents = "paragraph"), a larger share to this split (data.test_fraction, '
            "data.validation_fraction), or a shorter data.context; a fraction of 0 leaves a split out."
        )


def _check_train(packer: Packer, splits: dict[str, Contexts], context: int) -> None:
    if "train" not in splits:
        raise UserError(
            f"the text to add gives train no full context: {packer.documents} documents went to it, with "
            f"{packer.tokens} tokens, and a context takes {context}. Give more documents (data.max_documents, "
            "data.max_tokens)."
        )
