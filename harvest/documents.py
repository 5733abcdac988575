"""Documents one after another from wherever text lies: local files, a saved dataset, or the hub.

A document is a string, or a sequence of token ids when the column is already tokenised. Reading is lazy throughout: a
file is never held whole, except that a .txt file taken as one document is.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from thresher.cache.errors import UserError
from thresher.cache.records import fingerprint, nearest
from thresher.harvest.checkpoint import bundled, looks_like_path
from thresher.harvest.hub import check_on_hub

Document = str | Sequence[int]

SUFFIXES = (".txt", ".jsonl", ".parquet")
ROWS = "rows:"
ROWS_OF_A_DOCUMENT = 64
"""So a full context of a toy model."""
_ROWS = 1000
"""Rows taken from a table at a time."""
_WHOLE_BYTES = 256 << 20
"""Files up to this size are hashed whole."""


class Source(NamedTuple):
    """Where documents come from; the fields mean what `DataConfig` says."""

    source: str
    subset: str | None
    split: str
    revision: str | None
    column: str
    streaming: bool
    txt: Literal["file", "paragraph", "line"]


def documents(source: Source) -> Iterator[Document]:
    """Every non-empty document, in stored order. Raises UserError where the source is not what it is taken for."""
    if is_rows(source.source):
        return iter(_row_numbers(source.source))
    path = local_path(source.source)
    if path is None:
        rows = _table(_from_hub(source), source, f"{source.source} on the hub")
    elif is_saved_dataset(path):
        rows = _table(_from_disk(path, source), source, str(path))
    else:
        rows = (document for file in text_files(path) for document in _READERS[file.suffix](file, source))
    return (document for document in rows if len(document))


def is_rows(source: str) -> bool:
    """Whether a source is `rows:N`, the first N input rows of a toy model."""
    return source.startswith(ROWS)


def _row_numbers(source: str) -> Iterator[Sequence[int]]:
    """Documents of 64 row numbers."""
    count = source.removeprefix(ROWS).replace("_", "")
    if not count.isdecimal() or not 0 < int(count) <= 1 << 31:
        raise UserError(
            f"data.source is {source!r}; expected rows:N with N from 1 to 2147483648, the number of input rows of a "
            "toy model."
        )
    return (range(low, min(low + ROWS_OF_A_DOCUMENT, int(count))) for low in range(0, int(count), ROWS_OF_A_DOCUMENT))


def local_path(source: str) -> Path | None:
    """The local path that a source means, None for a name on the hub and for rows of a toy model.

    Raises UserError for one that is not there.
    """
    if is_rows(source):
        return None
    if source.startswith("bundled:"):
        return bundled(source, ".jsonl", "data.source")
    path = Path(source).expanduser()
    if path.exists():
        return path
    if looks_like_path(source) or path.suffix in SUFFIXES:
        raise UserError(
            f"data.source is {source!r}, which is not there; expected a .txt, .jsonl or .parquet file, a directory of "
            "them, a directory written by save_to_disk, the name of a dataset on the hub, or bundled:books. Check the "
            "path."
        )
    return None


def is_saved_dataset(path: Path) -> bool:
    """Whether a directory was written by `save_to_disk` of the datasets library."""
    return path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def text_files(path: Path) -> list[Path]:
    """The files of text that a local source stands for, by path. Raises UserError when there are none."""
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or files[0].suffix not in SUFFIXES:
        what = "a directory without any" if path.is_dir() else f"a {path.suffix or 'suffixless'} file"
        raise UserError(
            f"data.source is {str(path)!r}, {what}; expected {', '.join(SUFFIXES)}. Convert it, or save it with "
            "`datasets` and save_to_disk."
        )
    return files


def content_digest(path: Path) -> str:
    """SHA-256 over names and contents of a local source's files.

    Of a file above 256 MiB its size and 256 blocks of 1 MiB, evenly spaced from first to last, stand for the whole.
    """
    if is_saved_dataset(path):
        files = sorted(file for file in path.rglob("*") if file.suffix in (".arrow", ".json"))
        root = path
    else:
        files, root = text_files(path), path if path.is_dir() else path.parent
    return fingerprint({str(file.relative_to(root)): _file_digest(file) for file in files})


def _file_digest(file: Path) -> str:
    size, block = file.stat().st_size, 1 << 20
    with file.open("rb") as opened:
        if size <= _WHOLE_BYTES:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        count = _WHOLE_BYTES // block
        for i in range(count):
            opened.seek((size - block) * i // (count - 1))
            digest.update(opened.read(block))
        return digest.hexdigest()


def _txt(file: Path, source: Source) -> Iterator[Document]:
    """The file, its paragraphs (separated by blank lines), or its lines, as documents."""
    try:
        with file.open(encoding="utf-8") as lines:
            if source.txt == "file":
                yield lines.read()
            elif source.txt == "line":
                yield from (line.rstrip("\n") for line in lines)
            else:
                paragraph: list[str] = []
                for line in lines:
                    if line.strip():
                        paragraph.append(line)
                    elif paragraph:
                        yield "".join(paragraph)
                        paragraph = []
                yield "".join(paragraph)
    except UnicodeDecodeError as error:
        raise UserError(f"data.source: {file} is no UTF-8 text ({error.reason} at byte {error.start}).") from error


def _jsonl(file: Path, source: Source) -> Iterator[Document]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"data.source: {where} is no JSON ({error.msg}); expected one object a line."
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"data.source: {where} is a {type(row).__name__}; expected one JSON object a line.")
            _require(source.column, row, where)
            yield _document(row[source.column], source.column, where)


def _parquet(file: Path, source: Source) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data.source: {file} is no parquet file ({str(error)[:200]}).") from error
    with table:
        _require(source.column, table.schema_arrow.names, str(file))
        for batch in table.iter_batches(batch_size=_ROWS, columns=[source.column]):
            for value in batch.column(0).to_pylist():
                yield _document(value, source.column, str(file))


_READERS = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}


def _table(table: Any, source: Source, where: str) -> Iterator[Document]:
    """Rows of a `datasets` table, streamed or not."""
    if table.column_names is not None:
        _require(source.column, table.column_names, where)
        table = table.select_columns([source.column])
    for batch in table.iter(batch_size=_ROWS):
        _require(source.column, batch, where)
        for value in batch[source.column]:
            yield _document(value, source.column, where)


def _from_disk(path: Path, source: Source) -> Any:
    import datasets

    table = datasets.load_from_disk(str(path))
    if not isinstance(table, datasets.DatasetDict):
        return table
    if source.split not in table:
        raise UserError(
            f"data.split is {source.split!r}, which {path} does not have.{nearest(source.split, table)} It has: "
            f"{', '.join(table)}."
        )
    return table[source.split]


def _from_hub(source: Source) -> Any:
    import transformers.utils  # noqa: F401, I001 - first, or huggingface_hub 2.4 prints a failed import of its own
    import datasets
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:  # offline, the library looks only into its own cache, and at once
        check_on_hub("dataset", source.source, source.revision, "data.source")
    try:
        return datasets.load_dataset(
            source.source, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(
            f"data.source is {source.source!r} (subset {source.subset!r}, split {source.split!r}, revision "
            f"{source.revision!r}), which cannot be read from the hub: {type(error).__name__}: {reason} Check `subset` "
            "and `split` on the dataset's page; datasets that run their own code are not supported."
        ) from error


def _require(column: str, columns: Mapping[str, Any] | Sequence[str], where: str) -> None:
    if column not in columns:
        raise UserError(
            f"data.column is {column!r}, which {where} does not have.{nearest(column, columns)} It has: "
            f"{', '.join(columns)}."
        )


def _document(value: Any, column: str, where: str) -> Document:
    """The value if it is text or a sequence of integers; null is an empty document."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return value
    shown = f"{type(value).__name__} {str(value)[:60]!r}"
    raise UserError(
        f"data.column {column!r} holds a {shown} in {where}; expected text, or a list of token ids. Choose another "
        "column."
    )
