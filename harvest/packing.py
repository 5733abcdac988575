"""Documents to contexts of T tokens, each token knowing its document.

`packed` lays the documents of a split end to end and cuts the stream; `document` gives each document one context, cut
or padded on the right. Either way position 0 can hold a BOS, which belongs to the document of the token after it.

Left out: padding the last context of a packed stream. At most T - 1 tokens of a split are dropped instead, and counted.
"""

from typing import Literal, NamedTuple

import numpy as np

from thresher.cache.layout import KEPT, SPECIAL, Contexts

PACKING_ID = "thresher-packing-1"
"""Names how documents become contexts; another way would need another name."""

_FLUSH_TOKENS = 1 << 20
"""Tokens that wait before contexts are cut from them."""


class Marks(NamedTuple):
    """The tokens that packing puts in."""

    bos: int | None
    """At position 0 of every context, if not None."""
    before: int | None
    """In front of every document."""
    after: int | None
    """Behind every document."""


class Packer:
    """Collects the documents of one split; `contexts` gives what they make."""

    def __init__(
        self,
        *,
        context: int,
        packing: Literal["packed", "document"],
        marks: Marks,
        special: np.ndarray,
        keep_all: bool = False,
    ) -> None:
        """`special` are the token ids that are marked as special wherever they stand, as position 0 is; `keep_all`:
        neither is."""
        self.context, self.packing, self.marks, self.special = context, packing, marks, special
        self.documents = 0
        self.tokens = 0
        """Taken so far, marks between documents included, BOS of contexts not."""
        self.dropped = 0
        """Cut off at the end of documents or of the stream."""
        self._keep_all = keep_all
        self._waiting: list[tuple[np.ndarray, int]] = []
        self._waiting_tokens = 0
        self._blocks: list[Contexts] = []

    def add(self, tokens: np.ndarray, document_id: int) -> None:
        """Take a document's token ids [n]."""
        before, after = (np.array([] if mark is None else [mark], np.int32) for mark in self.marks[1:])
        tokens = np.concatenate([before, tokens.astype(np.int32, copy=False), after])
        self.documents += 1
        self.tokens += len(tokens)
        self._waiting.append((tokens, document_id))
        self._waiting_tokens += len(tokens)
        if self._waiting_tokens >= _FLUSH_TOKENS:
            self._flush()

    def contexts(self) -> Contexts:
        """All contexts, [M, T]; call it once, at the end."""
        self._flush()
        if self.packing == "packed":
            self.dropped += self._waiting_tokens
        empty = np.empty((0, self.context))
        blocks = [Contexts(empty.astype(np.int32), empty.astype(np.int32), empty.astype(np.uint8)), *self._blocks]
        self._blocks = []
        return Contexts(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))

    def _flush(self) -> None:
        if not self._waiting:
            return
        body = self.context - (self.marks.bos is not None)
        if self.packing == "document":
            token_id, document_id = self._padded(body)
            self._waiting, self._waiting_tokens = [], 0
        else:
            token_id, document_id = self._cut(body)
        self._blocks.append(self._marked(token_id, document_id))

    def _cut(self, body: int) -> tuple[np.ndarray, np.ndarray]:
        """As many full rows [m, body] as the waiting tokens fill; the rest goes on waiting."""
        tokens = np.concatenate([tokens for tokens, _ in self._waiting])
        ids = np.repeat(np.array([i for _, i in self._waiting], np.int32), [len(tokens) for tokens, _ in self._waiting])
        full = len(tokens) // body * body
        # What is left belongs to the end of the last documents: keep them apart, each with its id.
        borders = np.flatnonzero(np.diff(ids[full:])) + 1
        rest = zip(np.split(tokens[full:], borders), np.split(ids[full:], borders), strict=True)
        self._waiting = [(part, int(i[0])) for part, i in rest if len(part)]
        self._waiting_tokens = len(tokens) - full
        return tokens[:full].reshape(-1, body), ids[:full].reshape(-1, body)

    def _padded(self, body: int) -> tuple[np.ndarray, np.ndarray]:
        """One row [m, body] for each waiting document, with document -1 on padding."""
        token_id = np.zeros((len(self._waiting), body), np.int32)
        document_id = np.full_like(token_id, -1)
        for row, (tokens, i) in enumerate(self._waiting):
            count = min(len(tokens), body)
            token_id[row, :count], document_id[row, :count] = tokens[:count], i
            self.dropped += len(tokens) - count
        return token_id, document_id

    def _marked(self, token_id: np.ndarray, document_id: np.ndarray) -> Contexts:
        """With BOS in front and the keep classes worked out."""
        if self.marks.bos is not None:
            bos = np.full((len(token_id), 1), self.marks.bos, np.int32)
            token_id, document_id = np.hstack([bos, token_id]), np.hstack([document_id[:, :1], document_id])
        keep = np.full(token_id.shape, KEPT, np.uint8)
        if not self._keep_all:
            keep[np.isin(token_id, self.special)] = SPECIAL
            keep[:, 0] = SPECIAL
        keep[document_id < 0] = 0
        return Contexts(token_id, document_id, keep)
