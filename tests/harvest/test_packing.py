"""Packing against the plain definition, token by token."""

import numpy as np
import pytest

from thresher.harvest import packing
from thresher.harvest.packing import Marks, Packer

BOS, EOS = 1, 2


def pack(documents: list[list[int]], context: int, kind: str, marks: Marks) -> Packer:
    packer = Packer(context=context, packing=kind, marks=marks, special=np.array([BOS, EOS]))  # type: ignore[arg-type]
    for i, document in enumerate(documents):
        packer.add(np.array(document), i)
    return packer


def test_packed_contexts_by_hand() -> None:
    packer = pack([[10, 11, 12], [20, 21], [30, 31, 32]], 5, "packed", Marks(BOS, None, EOS))
    contexts = packer.contexts()
    # Stream: 10 11 12 EOS | 20 21 EOS 30 | 31 32 EOS is cut off.
    assert contexts.token_id.tolist() == [[BOS, 10, 11, 12, EOS], [BOS, 20, 21, EOS, 30]]
    assert contexts.document_id.tolist() == [[0, 0, 0, 0, 0], [1, 1, 1, 1, 2]]
    assert contexts.keep.tolist() == [[2, 1, 1, 1, 2], [2, 1, 1, 2, 1]]
    assert (packer.documents, packer.tokens, packer.dropped) == (3, 11, 3)
    assert [part.dtype for part in contexts] == [np.int32, np.int32, np.uint8]


def test_one_document_per_context_by_hand() -> None:
    packer = pack([[10, 11, 12, 13, 14], [20]], 4, "document", Marks(BOS, None, EOS))
    contexts = packer.contexts()
    assert contexts.token_id.tolist() == [[BOS, 10, 11, 12], [BOS, 20, EOS, 0]]
    assert contexts.document_id.tolist() == [[0, 0, 0, 0], [1, 1, 1, -1]]
    assert contexts.keep.tolist() == [[2, 1, 1, 1], [2, 1, 2, 0]]
    assert packer.dropped == 3


def test_a_bos_between_documents_belongs_to_the_one_it_begins() -> None:
    contexts = pack([[10], [20, 21]], 2, "packed", Marks(None, BOS, None)).contexts()
    assert contexts.token_id.tolist() == [[BOS, 10], [BOS, 20]]
    assert contexts.document_id.tolist() == [[0, 0], [1, 1]]
    assert contexts.keep.tolist() == [[2, 1], [2, 1]], "position 0 is special with or without a BOS"


def test_keeping_all_marks_nothing_but_padding_as_left_out() -> None:
    packer = Packer(
        context=4, packing="document", marks=Marks(BOS, None, EOS), special=np.array([BOS, EOS]), keep_all=True
    )
    packer.add(np.array([20]), 0)
    contexts = packer.contexts()
    assert contexts.token_id.tolist() == [[BOS, 20, EOS, 0]]
    assert contexts.keep.tolist() == [[1, 1, 1, 0]]


@pytest.mark.parametrize("flush", [1, 7, 1 << 20])
def test_flushing_changes_nothing(flush: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_FLUSH_TOKENS", flush)
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 50, size=n).tolist() for n in rng.integers(1, 40, size=60)]
    packer = pack(documents, 9, "packed", Marks(BOS, None, EOS))
    contexts = packer.contexts()
    stream = [(token, i) for i, document in enumerate(documents) for token in [*document, EOS]]
    full = len(stream) // 8
    for row in range(full):
        part = stream[row * 8 : row * 8 + 8]
        assert contexts.token_id[row].tolist() == [BOS] + [token for token, _ in part]
        assert contexts.document_id[row].tolist() == [part[0][1]] + [i for _, i in part]
    assert len(contexts.token_id) == full
    assert packer.dropped == len(stream) - full * 8


def test_no_documents_make_no_contexts() -> None:
    assert pack([], 8, "packed", Marks(None, None, None)).contexts().token_id.shape == (0, 8)
