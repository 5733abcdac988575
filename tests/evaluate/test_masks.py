"""Who is patched and who is scored, worked by hand."""

import numpy as np
import pytest

from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.evaluate.masks import choose_rows, patch_mask, score_mask, scored


def contexts(keep, document):
    keep, document = np.array(keep, dtype=np.uint8), np.array(document, dtype=np.int32)
    return Contexts(np.zeros(keep.shape, dtype=np.int32), document, keep)


def test_masks_by_hand():
    """Special first position, end of document 0 at position 3 (special), document 1 after it, one pad.

    Position 2 predicts the end of its document: scored. Position 3 is no source. Position 5 predicts padding: not
    scored, but patched.
    """
    found = contexts([[2, 1, 1, 2, 1, 1, 0]], [[0, 0, 0, 0, 1, 1, -1]])
    assert patch_mask(found).astype(int).tolist() == [[0, 1, 1, 0, 1, 1, 0]]
    assert score_mask(found).astype(int).tolist() == [[0, 1, 1, 0, 1, 0, 0]]


def test_a_document_boundary_is_not_predicted():
    found = contexts([[2, 1, 1, 1, 1]], [[0, 0, 0, 1, 1]])
    assert score_mask(found).astype(int).tolist() == [[0, 1, 0, 1, 0]]


def test_the_first_real_position_is_never_patched():
    """Whatever its keep code, and wherever padding puts it."""
    found = contexts([[1, 1, 1], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [-1, 1, 1], [-1, -1, -1]])
    assert patch_mask(found).astype(int).tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_rows_without_documents_are_their_own_units():
    found = scored(contexts([[2, 1, 1, 1]] * 3, [[-1] * 4] * 3), 0)
    assert not found.has_documents
    assert found.segment_row.tolist() == [0, 1, 2]
    assert found.facts["unit"] == "row"


def test_segments_part_rows_by_document():
    found = scored(contexts([[2, 1, 1, 1, 1], [2, 1, 1, 1, 1]], [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]), 0)
    assert found.segment_row.tolist() == [0, 0, 1]
    assert found.segment_document.tolist() == [0, 1, 1]
    assert found.segment.tolist() == [[-1, 0, -1, 1, -1], [-1, 2, 2, 2, -1]]


def test_a_budget_takes_evenly_spaced_rows():
    assert choose_rows(np.full(10, 5), 25).tolist() == [0, 2, 4, 6, 8]
    assert choose_rows(np.full(10, 5), 0).tolist() == list(range(10))
    assert choose_rows(np.full(10, 5), 999).tolist() == list(range(10))
    assert choose_rows(np.array([0, 5, 0, 5, 5]), 5).tolist() == [1]


def test_counts_are_recorded():
    facts = scored(contexts([[2, 1, 1, 2, 1, 1, 0], [0] * 7], [[0, 0, 0, 0, 1, 1, -1], [-1] * 7]), 0).facts
    assert (facts["rows"], facts["rows_of_split"], facts["real_tokens"]) == (1, 2, 6)
    assert (facts["patched_tokens"], facts["scored_tokens"], facts["documents"]) == (4, 3, 2)
    assert facts["excluded_share"] == pytest.approx(1 / 3)


def test_the_hash_tells_texts_apart():
    a, b = contexts([[2, 1, 1]], [[0, 0, 0]]), contexts([[2, 1, 1]], [[0, 0, 0]])
    b.token_id[0, 2] = 1
    assert scored(a, 0).facts["sha256"] != scored(b, 0).facts["sha256"]


def test_nothing_to_score_is_refused():
    with pytest.raises(UserError, match="no position that can be scored"):
        scored(contexts([[2, 1], [2, 0]], [[0, 0], [1, -1]]), 0)
