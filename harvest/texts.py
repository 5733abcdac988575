"""Which text trained dictionaries are judged on, and which their baselines are fitted to.

Judged on is a split that the runs' own text holds out, or text of the user's own. Fitted to are rows of the training
split. Both come from the runs' cache if it is still there, and are tokenised again if it is not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.place import Place, place_at
from thresher.cache.reader import CacheReader, find_complete
from thresher.cache.records import differences, from_dict
from thresher.harvest.corpus import Corpus, DataConfig, data_identity

TRAINING_TOKENS = 1 << 18
"""About as many tokens of the training split are kept."""
READING = (
    "subset", "split", "revision", "column", "streaming", "txt_documents", "max_tokens", "max_documents",
    "skip_documents",
)  # fmt: skip
"""Keys of [data] that say how documents are read; what makes contexts of them stays as the runs' text had it."""

Read = Callable[[DataConfig], Corpus]
"""Reads, tokenises and packs a text for the runs' target."""


class Texts(NamedTuple):
    """What an evaluation runs on."""

    contexts: Contexts
    """Judged on."""
    training: Contexts | None
    """Evenly spaced rows of the runs' training split; None where it is gone."""
    source: str
    """Where `contexts` come from, in words."""
    facts: dict[str, Any]
    """For the provenance, JSON values: of the user's own text, as `text`, how it was read and what it holds."""
    notes: tuple[str, ...]
    """What a reader of the numbers must know of the text."""


class _Found(NamedTuple):
    splits: Mapping[str, Contexts]
    where: str


def held_out(run: Mapping[str, Any], data: DataConfig, split: str, cache: Place | None, read: Read) -> Texts:
    """A split of the text that a run was trained on; `run` is its config.json, `data` the table of its recipe.

    Raises UserError when the cache is gone and the text has changed since, and for a split that was not made.
    """
    found = _found(run, data, (split, "train"), cache, read)
    return Texts(found.splits[split], evenly(found.splits["train"]), f"split {split} of {found.where}", {}, ())


def own_config(data: DataConfig, source: str, changed: Mapping[str, Any]) -> DataConfig:
    """How text of the user's own is read: like a run's `data`, but all of it, in one split.

    `changed` are keys of [data] to read it by. Raises UserError for one that would make other contexts.
    """
    for key in changed:
        if key not in READING:
            raise UserError(
                f"--set data.{key}: the text of --text is made into contexts as that of the runs was, so that numbers "
                f"compare; expected one of {', '.join(READING)}."
            )
    kept = ("context", "packing", "bos", "separator", "column", "txt_documents")
    table = {key: getattr(data, key) for key in kept} | {"source": source}
    return from_dict(DataConfig, {**table, "test_fraction": 0, "validation_fraction": 0, **changed}, "data")


def own_text(run: Mapping[str, Any], data: DataConfig, text: DataConfig, cache: Place | None, read: Read) -> Texts:
    """All documents of the user's own text, beside training rows of the run's.

    Raises UserError for text that cannot be read or fills no context.
    """
    try:
        corpus = read(text)
    except UserError as error:
        raise UserError(f"--text: {error}") from error
    [(_, contexts)], [counts] = corpus.splits.items(), corpus.facts["splits"].values()
    identity = data_identity(text)
    notes = [_origin(run, text.source, identity)]
    training = None
    try:
        training = evenly(_found(run, data, ("train",), cache, read).splits["train"])
    except UserError as error:
        if cache is not None:
            raise
        notes.append(f"Without training text no baseline was fitted: {error}")
    facts = {"data": identity, **{key: fact for key, fact in corpus.facts.items() if key != "splits"}, **counts}
    return Texts(contexts, training, f"all of {text.source}", {"text": facts}, tuple(notes))


def evenly(contexts: Contexts, tokens: int = TRAINING_TOKENS) -> Contexts:
    """At most about `tokens` tokens of contexts, in rows at even distances."""
    rows, length = contexts.token_id.shape
    wanted = min(rows, -(-tokens // length))
    chosen = np.arange(wanted) * rows // max(wanted, 1)
    return Contexts(*(array[chosen] for array in contexts))


def _found(run: Mapping[str, Any], data: DataConfig, splits: Sequence[str], cache: Place | None, read: Read) -> _Found:
    """Splits of the run's text: from its cache, from one that serves as well, or from the text itself."""
    stored = run["cache"]
    path = cache or place_at(stored["path"])
    if cache is not None and cache.is_dir() and stored["identity"]["harvest"]["window_gb"] is None:
        CacheReader.open(cache, identity=stored["identity"]).close()  # says what differs where find_complete says None
    reader = find_complete(path, stored["identity"])
    if reader is not None:
        with reader:
            return _Found({split: reader.contexts(split) for split in splits}, str(path))
    changed = differences(stored["identity"]["data"], data_identity(data))
    if changed:
        raise UserError(
            f"The cache {path} of run {run['name']} is gone, and its text has changed: {'; '.join(changed)}. Bring "
            "back the text or the cache, so that the held-out documents are those the run never saw."
        )
    made = read(data).splits
    for split in splits:
        if split not in made:
            raise UserError(
                f"evaluate.split is {split!r}, which the text of run {run['name']} was not divided into; it has "
                f"{', '.join(made)}."
            )
    return _Found(made, data.source)


def _origin(run: Mapping[str, Any], source: str, identity: Mapping[str, Any]) -> str:
    """What the user's own text has to do with the text of a run, as far as can be known."""
    theirs = run["cache"]["identity"]["data"]
    keys = ("content",) if identity["content"] is not None else ("content", "source", "subset", "split")
    if all(identity[key] == theirs[key] for key in keys):
        return (
            f"The text, {source}, is the one that the runs were trained on: most of it was seen in training, and the "
            "numbers are no held-out ones."
        )
    return (
        f"The text, {source}, was given with --text: it is not the held-out split of the runs' own text, and whether "
        "they have seen parts of it in training is not known."
    )
