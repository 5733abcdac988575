"""Which positions are patched, which are scored, and which document each score belongs to.

One patch mask P and one scoring mask S (cache/patching.py) serve every arm, protocol and replacement, so that no two
numbers of a report differ in what they were measured on.

Scores are summed per segment, the part of one document that lies in one row: the finest unit that a bootstrap over
documents or over rows can be built from later, without running the model again.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.patching import PATCH_RULE, SCORE_RULE, patch_mask, score_mask

FIRST, SPECIAL = 1, 2
EXACT_BUCKETS = 8
"""Positions up to here have a bucket of their own; from there on four share an octave."""


class Scored(NamedTuple):
    """The rows of a split that are evaluated, with both masks and the segment of every position."""

    token_id: np.ndarray
    """[M, T] int64."""
    patch: np.ndarray
    """[M, T] bool: P."""
    score: np.ndarray
    """[M, T] bool: S, over source positions t."""
    outside: np.ndarray
    """[M, T] uint8: real positions that P leaves out: `FIRST` of their row, or another `SPECIAL` one; else 0."""
    segment: np.ndarray
    """[M, T] int64: segment of each position, -1 off S."""
    segment_row: np.ndarray
    """[G] int64: row of the split that a segment lies in."""
    segment_document: np.ndarray
    """[G] int64: its document, -1 where the split has none."""
    bucket_edges: np.ndarray
    """[P] int64: first source position of every bucket."""
    rows: np.ndarray
    """[M] int64: the rows of the split, ascending."""
    has_documents: bool
    """Whether units of the bootstrap are documents; otherwise they are rows."""
    facts: dict[str, object]
    """Rules, counts and hash, as they go into the results."""


def outside_mask(contexts: Contexts) -> np.ndarray:
    """Real positions outside P, [M, T] uint8: `FIRST` for the first real one of a row, `SPECIAL` for others."""
    real = contexts.keep > 0
    out = np.where(real & ~patch_mask(contexts), SPECIAL, 0).astype(np.uint8)
    out[real & (np.cumsum(real, axis=1) == 1)] = FIRST
    return out


def bucket_edges(length: int) -> np.ndarray:
    """First position of every bucket of source positions, ascending from 0; the last bucket ends at `length` - 1.

    Means over single late positions would be noise, and what happens early is what differs.
    """
    octaves = np.arange(max(0, 4 * int(np.ceil(np.log2(max(length, 1) / EXACT_BUCKETS))) + 1))
    edges = np.concatenate([np.arange(EXACT_BUCKETS), np.ceil(EXACT_BUCKETS * 2 ** (octaves / 4)).astype(np.int64)])
    return np.unique(edges[edges < length])


def choose_rows(scored_per_row: np.ndarray, tokens: int) -> np.ndarray:
    """The fewest evenly spaced rows that hold about `tokens` scored tokens; all rows for 0 or a larger budget.

    Even spacing reaches documents from the whole split, where the first rows might all come from one book. Rows
    without a scored token are left out.
    """
    rows, total = np.flatnonzero(scored_per_row), int(scored_per_row.sum())
    if tokens == 0 or tokens >= total:
        return rows
    return rows[spread(len(rows), -(-tokens * len(rows) // total))]


def spread(rows: int, wanted: int) -> np.ndarray:
    """`wanted` of `rows` indices at even distances, ascending; all of them if fewer exist."""
    wanted = max(1, min(wanted, rows))
    return np.arange(wanted) * rows // wanted


def scored(contexts: Contexts, tokens: int) -> Scored:
    """Choose the rows and lay out masks and segments. Raises UserError when nothing can be scored."""
    per_row = score_mask(contexts).sum(axis=1)
    if per_row.sum() == 0:
        raise UserError(
            f"The held-out contexts ({contexts.token_id.shape[0]} rows of {contexts.token_id.shape[1]} tokens) hold no "
            "position that can be scored: expected at least one kept token followed by a real token of the same "
            "document. Evaluate on more text, or on longer contexts."
        )
    rows = choose_rows(per_row, tokens)
    chosen = Contexts(contexts.token_id[rows], contexts.document_id[rows], contexts.keep[rows])
    patch, score = patch_mask(chosen), score_mask(chosen)
    documents = chosen.document_id.astype(np.int64)
    has_documents = bool((documents[score] >= 0).all())
    if not has_documents:
        documents = np.full_like(documents, -1)
    pairs = np.stack([np.broadcast_to(rows[:, None], score.shape)[score], documents[score]], axis=1)
    kinds, inverse = np.unique(pairs, axis=0, return_inverse=True)
    segment = np.full(score.shape, -1, dtype=np.int64)
    segment[score] = inverse.reshape(-1)
    real = int((chosen.keep > 0).sum())
    facts: dict[str, object] = {
        "patch_rule": PATCH_RULE,
        "score_rule": SCORE_RULE,
        "rows": len(rows),
        "rows_of_split": len(per_row),
        "row_rule": "every row with a scored token"
        if len(rows) == int((per_row > 0).sum())
        else "evenly spaced among the rows with a scored token",
        "real_tokens": real,
        "patched_tokens": int(patch.sum()),
        "scored_tokens": int(score.sum()),
        "excluded_share": 1 - int(patch.sum()) / real,
        "first_positions": int((outside_mask(chosen) == FIRST).sum()),
        "special_positions": int((outside_mask(chosen) == SPECIAL).sum()),
        "documents": len(np.unique(kinds[:, 1])) if has_documents else None,
        "unit": "document" if has_documents else "row",
        "sha256": text_hash(chosen),
    }
    return Scored(
        chosen.token_id.astype(np.int64),
        patch,
        score,
        outside_mask(chosen),
        segment,
        kinds[:, 0],
        kinds[:, 1],
        bucket_edges(score.shape[1]),
        rows,
        has_documents,
        facts,
    )


def text_hash(contexts: Contexts) -> str:
    """SHA-256 over the shape, token ids, document ids and keep codes."""
    digest = hashlib.sha256(repr(contexts.token_id.shape).encode())
    digest.update(np.ascontiguousarray(contexts.token_id, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(contexts.document_id, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(contexts.keep, dtype="u1").tobytes())
    return digest.hexdigest()
