"""Text from every kind of source, its splits, and what is refused."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from rich.console import Console

from thresher.cache.errors import UserError
from thresher.harvest.corpus import Corpus, DataConfig, data_identity, read_corpus
from thresher.harvest.documents import Source, content_digest, documents

TEXTS = [f"It was the {i}th morning, and the {'sea' * (i % 5)} lay still as glass.\nNobody spoke." for i in range(60)]


def read(config: DataConfig, tokenizer: Any, n_ctx: int = 256, n_vocab: int = 4096) -> Corpus:
    return read_corpus(config, tokenizer, n_ctx, n_vocab, Console(quiet=True))


def texts_of(path: Path, **changes: Any) -> list[Any]:
    fields = {"subset": None, "split": "train", "revision": None, "column": "text", "streaming": False, "txt": "file"}
    return list(documents(Source(source=str(path), **(fields | changes))))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "texts.jsonl", ({"text": text, "n": 1} for text in TEXTS))


def test_every_kind_of_source_gives_the_same_documents(tmp_path: Path, jsonl: Path) -> None:
    assert texts_of(jsonl) == TEXTS
    parquet.write_table(pyarrow.table({"text": TEXTS, "n": list(range(60))}), tmp_path / "texts.parquet")
    assert texts_of(tmp_path / "texts.parquet") == TEXTS
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "dev": table}).save_to_disk(tmp_path / "both")
    assert texts_of(tmp_path / "saved") == TEXTS
    assert texts_of(tmp_path / "both", split="dev") == TEXTS
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / "deep" / f"{i:03d}.txt").write_text(text)
    assert texts_of(folder) == TEXTS


def test_a_txt_file_is_a_document_or_its_paragraphs_or_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\n\nthree\n")
    assert texts_of(file) == ["one\ntwo\n\n\nthree\n"]
    assert texts_of(file, txt="paragraph") == ["one\ntwo\n", "three\n"]
    assert texts_of(file, txt="line") == ["one", "two", "three"]


def test_token_ids_are_the_tokenizers_own(jsonl: Path, tokenizer: Any) -> None:
    config = DataConfig(source=str(jsonl), test_fraction=0, context=32, packing="document")
    corpus = read(config, tokenizer)
    for row, document_id, text in zip(*corpus.splits["train"][:2], TEXTS, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [0]
        assert row[document_id >= 0].tolist() == [0, *ids][:32]


def test_token_columns_equal_the_text_they_came_from(tmp_path: Path, jsonl: Path, tokenizer: Any) -> None:
    ids = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    write_jsonl(tmp_path / "ids.jsonl", ({"input_ids": row} for row in ids))
    config = {"test_fraction": 0.0, "context": 16}
    text = read(DataConfig(source=str(jsonl), **config), tokenizer)
    tokens = read(DataConfig(source=str(tmp_path / "ids.jsonl"), column="input_ids", **config), tokenizer)
    assert all(map(np.array_equal, text.splits["train"], tokens.splits["train"]))
    bare = {"bos": False, "separator": "none"}
    alone = read(DataConfig(source=str(tmp_path / "ids.jsonl"), column="input_ids", **config, **bare), None)
    flat = [token for row in ids for token in row]
    assert alone.splits["train"].token_id.ravel().tolist() == flat[: len(flat) // 16 * 16]


def texts_in(corpus: Corpus, split: str, order: list[str]) -> set[str]:
    ids = corpus.splits[split].document_id
    return {order[i] for i in np.unique(ids[ids >= 0])}


def test_splits_share_no_document_and_forget_the_order(tmp_path: Path, tokenizer: Any) -> None:
    doubled = TEXTS + TEXTS[::-1]
    settings: dict[str, Any] = {
        "test_fraction": 0.2,
        "validation_fraction": 0.2,
        "context": 256,
        "packing": "document",
    }
    first = write_jsonl(tmp_path / "a.jsonl", ({"text": text} for text in doubled))
    corpus = read(DataConfig(source=str(first), **settings), tokenizer)
    found = {split: texts_in(corpus, split, doubled) for split in ("train", "test", "validation")}
    assert set.union(*found.values()) == set(TEXTS)
    assert sum(map(len, found.values())) == len(TEXTS), "a document met twice stays in one split"
    assert 4 <= len(found["test"]) <= 22
    some = [text for text in reversed(TEXTS) if text[11] != "3"]
    second = write_jsonl(tmp_path / "b.jsonl", ({"text": text} for text in some))
    fewer = read(DataConfig(source=str(second), **settings), tokenizer)
    for split in found:
        assert texts_in(fewer, split, some) == found[split] & set(some)
    other = read(DataConfig(source=str(first), split_seed=1, **settings), tokenizer)
    assert texts_in(other, "test", doubled) != found["test"]


def test_limits_stop_reading(jsonl: Path, tokenizer: Any) -> None:
    base: dict[str, Any] = {"source": str(jsonl), "test_fraction": 0.0, "context": 8}
    corpus = read(DataConfig(max_documents=7, **base), tokenizer)
    assert corpus.facts["splits"]["train"]["documents"] == 7
    whole = read(DataConfig(**base), tokenizer).splits["train"]
    cut = read(DataConfig(max_tokens=100, **base), tokenizer)
    assert 100 <= cut.facts["splits"]["train"]["tokens"] <= 101, "the limit, and the EOS of the document it cuts"
    assert np.array_equal(cut.splits["train"].token_id[:14], whole.token_id[:14])


def test_facts_account_for_every_token(tokenizer: Any) -> None:
    corpus = read(DataConfig(test_fraction=0.1, max_documents=40), tokenizer)
    for split, counts in corpus.facts["splits"].items():
        contexts = corpus.splits[split]
        assert contexts.token_id.shape == (counts["contexts"], 256)
        assert counts["tokens"] == counts["contexts"] * 255 + counts["dropped_tokens"]
        assert (contexts.token_id[:, 0] == 0).all()
        assert (contexts.keep[:, 0] == 2).all()
        assert ((contexts.keep == 2) == (contexts.token_id == 0))[:, 1:].all()
    assert json.loads(json.dumps(corpus.facts)) == corpus.facts


def test_identity_follows_content_and_settings(tmp_path: Path, jsonl: Path) -> None:
    config = DataConfig(source=str(jsonl))
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "texts.jsonl").write_bytes(jsonl.read_bytes())
    assert data_identity(config) == data_identity(DataConfig(source=str(other / "texts.jsonl"), streaming=True))
    assert data_identity(config) != data_identity(DataConfig(source=str(jsonl), split_seed=1))
    assert data_identity(config) != data_identity(DataConfig(source=str(jsonl), keep="all"))
    before = content_digest(jsonl)
    jsonl.write_text(jsonl.read_text().replace("59th", "58th"))
    assert content_digest(jsonl) != before
    assert json.loads(json.dumps(data_identity(config))) == data_identity(config)
    assert data_identity(DataConfig(source="owner/name"))["content"] is None, "nothing is asked of the hub"


def test_large_files_are_told_apart_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.harvest.documents._WHOLE_BYTES", 4 << 20)
    file = tmp_path / "a.txt"
    file.write_bytes(b"a" * (9 << 20))
    first = content_digest(file)
    file.write_bytes(b"a" * ((9 << 20) - 1) + b"b")
    assert content_digest(file) != first


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": "no/such/file.jsonl"}, "is not there"),
        ({"source": "./gone"}, "is not there"),
        ({"source": "bundled:book"}, "Did you mean 'bundled:books'"),
        ({"column": "txt"}, "Did you mean 'text'"),
        ({"column": "n"}, "holds a int '1'.*expected text, or a list of token ids"),
        ({"context": 257}, "at most 256"),
        ({"test_fraction": 0.0001}, "test split has no full context: 0 of 60 documents"),
        ({"context": 256, "validation_fraction": 0.01}, "validation split has no full context"),
    ],
)
def test_bad_data_is_one_paragraph(changes: dict[str, Any], says: str, jsonl: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read(DataConfig(**({"source": str(jsonl), "test_fraction": 0.2, "context": 32} | changes)), tokenizer)
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n{"text": null}\n\n')
    for name, says in (
        ("empty", "without any"),
        ("bad.jsonl", "line 2 is no JSON"),
        ("list.jsonl", "line 1 is a list"),
        ("bad.parquet", "no parquet file"),
        ("latin.txt", "no UTF-8"),
        ("a.csv", r"a \.csv file"),
        ("none.jsonl", "no document with any token"),
    ):
        with pytest.raises(UserError, match=says):
            read(DataConfig(source=str(tmp_path / name), test_fraction=0), tokenizer)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="Did you mean 'train'"):
        read(DataConfig(source=str(tmp_path / "saved"), split="trian"), tokenizer)


def test_token_ids_must_be_the_models(tmp_path: Path) -> None:
    bare: dict[str, Any] = {"column": "ids", "test_fraction": 0.0, "context": 2, "bos": False, "separator": "none"}
    for ids, bad in (([1, 2, 4096], 4096), ([3, -1], -1)):
        file = write_jsonl(tmp_path / "ids.jsonl", [{"ids": [1, 2]}, {"ids": ids}])
        with pytest.raises(UserError, match=rf"document 1 holds the token id {bad}; expected 0 to 4095"):
            read(DataConfig(source=str(file), **bare), None)


def test_text_without_a_tokenizer_is_refused(jsonl: Path) -> None:
    with pytest.raises(UserError, match=r"data\.bos asks for a token, but the model has no tokenizer"):
        read(DataConfig(source=str(jsonl)), None)
    with pytest.raises(UserError, match="no tokenizer files"):
        read(DataConfig(source=str(jsonl), bos=False, separator="none"), None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test_fraction": 1.0}, "less than 1"),
        ({"test_fraction": -0.1}, "at least 0"),
        ({"test_fraction": 0.5, "validation_fraction": 0.5}, "left for training"),
        ({"max_tokens": 0}, "at least 1"),
        ({"context": 1}, "at least 2"),
        ({"source": ""}, "must not be empty"),
    ],
)
def test_settings_are_checked_at_once(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        DataConfig(**changes)
