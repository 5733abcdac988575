"""Documents to token ids, and what is asked of each."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from thresher.cache.errors import UserError
from thresher.harvest.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_DOCUMENTS, _BATCH_CHARS = 1024, 4 << 20


def batches(rows: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups that are worth a tokenizer's threads and bounded in size."""
    batch: list[Document] = []
    chars = 0
    for row in rows:
        batch.append(row)
        chars += len(row)
        if len(batch) == _BATCH_DOCUMENTS or chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def token_ids(batch: list[Document], tokenizer: "PreTrainedTokenizerBase | None", column: str) -> list[np.ndarray]:
    """Token ids [n], int64, of every document; those in `column` that are ids already stay as they are.

    Raises UserError for text without a tokenizer.
    """
    texts = [document for document in batch if isinstance(document, str)]
    if texts and tokenizer is None:
        raise UserError(
            f"data.column {column!r} holds text, but the model has no tokenizer files. Add its tokenizer to the "
            "model directory, or give a column of token ids."
        )
    encoded = iter(_encode(tokenizer, texts) if texts else [])
    return [np.asarray(next(encoded) if isinstance(document, str) else document, dtype=np.int64) for document in batch]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens. Fast tokenizers skip the offsets, which we do not need."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "encode_batch_fast"):
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def content_key(document: Document) -> int:
    """64 bits of a document's content: of the text, or of the token ids as little-endian int32."""
    if isinstance(document, str):
        content = document.encode("utf-8", "surrogatepass")
    else:
        content = np.asarray(document, dtype="<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def check_range(tokens: np.ndarray, n_vocab: int, document: int) -> None:
    """Raise UserError for ids [n], n > 0, of which the model has no embedding."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= n_vocab:
        raise UserError(
            f"data.source: document {document} holds the token id {low if low < 0 else high}; expected 0 to "
            f"{n_vocab - 1}, since the model has {n_vocab} token embeddings. The text was tokenised for another model: "
            "give the text itself, or the matching model."
        )
