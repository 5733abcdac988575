"""Rows of text for a language model, in an order that is a function of seed and position.

Text is read in chunks of bounded size, each packed and shuffled by itself, so a corpus larger than memory is read as it
goes; the next chunk is read in a thread while the present one is trained on. A corpus of one chunk is kept, and each
epoch shuffles it anew. A row is [T + 1] token ids with -1 at padding: inputs are all but the last, targets all but the
first.

Left out: packing across chunks. At most T tokens of each are dropped.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.order import pretraining_order
from thresher.harvest.corpus import DataConfig, make_packers, placed_documents
from thresher.harvest.packing import Packer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Cursor(NamedTuple):
    """A place in the stream of training rows: all that a training needs to go on from there."""

    epoch: int = 0
    chunk: int = 0
    """Number of the present chunk within the epoch."""
    row: int = 0
    """Rows of it, in shuffled order, that were taken."""
    read: int | None = None
    """Documents of the source before the chunk, skipped ones too; None at the beginning of an epoch."""
    documents: int = 0
    """Documents with tokens before the chunk: what data.max_documents counts."""
    tokens: int = 0
    """Tokens before the chunk: what data.max_tokens counts."""


class Chunk(NamedTuple):
    """A piece of the text."""

    train: np.ndarray
    """[M, T + 1] int32."""
    held_out: np.ndarray
    """[M', T + 1] int32, never trained on."""
    first: Cursor
    """Where it begins."""
    behind: Cursor
    """Where the next one begins, if there is one."""
    last: bool
    """Of its epoch."""


class Text(NamedTuple):
    """Which text, and how it becomes rows."""

    data: DataConfig
    tokenizer: "PreTrainedTokenizerBase | None"
    n_vocab: int
    context: int
    """T."""
    chunk_tokens: int


def chunks(text: Text, start: Cursor, stop: Event) -> Iterator[Chunk]:
    """The chunks of one epoch from `start` on, which stands at the beginning of one; ends early when `stop` is set."""
    data = text.data
    if start.read is not None:
        data = replace(data, skip_documents=start.read)
    packers, here, held = make_packers(data, text.tokenizer, text.context + 1), start, None
    read, documents, tokens = start.read, start.documents, start.tokens
    for placed in placed_documents(data, text.tokenizer, text.n_vocab):
        if stop.is_set():
            return
        if held is not None:
            yield held
            held = None
        read = placed.read
        if not placed.split:
            continue
        left = None if data.max_tokens is None else data.max_tokens - tokens
        taken = placed.tokens[:left]
        packers[placed.split].add(taken, documents)
        documents, tokens = documents + 1, tokens + len(taken)
        if documents == data.max_documents or tokens == data.max_tokens:
            break
        if tokens - here.tokens >= text.chunk_tokens:
            behind = Cursor(here.epoch, here.chunk + 1, 0, read, documents, tokens)
            held = _chunk(packers, here, behind, last=False)
            packers, here = make_packers(data, text.tokenizer, text.context + 1), behind
    if held is not None:
        yield held._replace(last=True)
    else:
        yield _chunk(packers, here, Cursor(here.epoch + 1), last=True)


def _chunk(packers: dict[str, Packer], first: Cursor, behind: Cursor, *, last: bool) -> Chunk:
    held_out = packers["validation"] if packers["validation"].documents else packers["test"]
    return Chunk(_labels(packers["train"].contexts()), _labels(held_out.contexts()), first, behind, last)


def _labels(contexts: Contexts) -> np.ndarray:
    """[M, T + 1]: token ids, and -1 where there is none."""
    return np.where(contexts.document_id < 0, np.int32(-1), contexts.token_id)


class Rows:
    """The endless stream of training rows from a cursor on; close it."""

    def __init__(self, text: Text, seed: int, cursor: Cursor) -> None:
        self.cursor = cursor
        """Behind the rows that were taken."""
        self._text, self._seed = text, seed
        self._stop = Event()
        self._thread = ThreadPoolExecutor(1, "text")
        self._source = chunks(text, cursor._replace(row=0), self._stop)
        self._ahead: Future[Chunk] | None = self._thread.submit(next, self._source)
        self._enter(self._next(), cursor.row)

    def take(self, count: int) -> np.ndarray:
        """The next [count, T + 1] rows."""
        parts: list[np.ndarray] = []
        while count:
            if self.cursor.row == len(self._chunk.train):
                self._advance()
            ids = self._order[self.cursor.row : self.cursor.row + count]
            parts.append(self._chunk.train[ids])
            self.cursor = self.cursor._replace(row=self.cursor.row + len(ids))
            count -= len(ids)
        return np.concatenate(parts)

    def held_out(self, tokens: int) -> np.ndarray:
        """[M, T + 1] held-out rows of about so many tokens, from the beginning of the text."""
        chunk = self._chunk
        if chunk.first.chunk:
            chunk = next(chunks(self._text, Cursor(), Event()))
        return chunk.held_out[: -(-tokens // self._text.context)]

    def close(self) -> None:
        """Let go of the thread."""
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)

    def _advance(self) -> None:
        """To the first row of the next chunk that has rows."""
        epoch = self._chunk.first.epoch
        while self._chunk.first.epoch < epoch + 2:
            if self._chunk.last and self._chunk.first.chunk == 0:  # the whole text: it is here already
                first = Cursor(self.cursor.epoch + 1)
                self._enter(self._chunk._replace(first=first, behind=Cursor(first.epoch + 1)), 0)
            else:
                self._enter(self._next(), 0)
            if len(self._chunk.train):
                return
        raise UserError(
            f"data.source {self._text.data.source!r} gives no row to train on: a row takes {self._text.context + 1} "
            "tokens (pretrain.context and one). Give more text, or a shorter context."
        )

    def _next(self) -> Chunk:
        """The chunk that was read ahead; asks for the one behind it."""
        assert self._ahead is not None
        chunk, self._ahead = self._ahead.result(), None
        if not chunk.last:
            self._ahead = self._thread.submit(next, self._source)
        elif chunk.first.chunk:
            self._source = chunks(self._text, Cursor(chunk.first.epoch + 1), self._stop)
            self._ahead = self._thread.submit(next, self._source)
        return chunk

    def _enter(self, chunk: Chunk, row: int) -> None:
        self._chunk = chunk
        self.cursor = chunk.first._replace(row=row)
        self._order = pretraining_order(len(chunk.train), self._seed, chunk.first.epoch, chunk.first.chunk)
