"""More sites, or more text, for a cache that is finished; nothing that is there is rewritten.

What a recipe asks for beyond the cache follows from the differences between the two identities. Missing sites: the
stored contexts of every segment run through the model again, for those sites alone. Other text: a further segment, at
all sites of the cache. Both at once, or any other difference, is refused. An extension is a part of its own, written
by the same protocol as the cache itself: killed, the base stays as it was, and the same command goes on.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from thresher.cache.commit import ROOT
from thresher.cache.contracts import Site, UserError
from thresher.cache.locks import Lock
from thresher.cache.plan import Extends
from thresher.cache.records import differences
from thresher.cache.stored import PARTS, Stored, parts, read_contexts
from thresher.cache.writer import planning
from thresher.harvest.corpus import Corpus, DataConfig, read_corpus
from thresher.harvest.fill import Filled, batch_contexts, fill_part, note_versions, outcome
from thresher.harvest.settings import HarvestConfig, HarvestResult
from thresher.harvest.target import TargetConfig, TransformerTarget, load_target, load_tokenizer

_TEXT = (
    "source",
    "content",
    "subset",
    "split",
    "revision",
    "column",
    "txt_documents",
    "max_tokens",
    "max_documents",
    "skip_documents",
)
"""Keys of [data] in which a further segment may differ: which text, not how it becomes contexts."""


class Segment(NamedTuple):
    """The base or a part of kind tokens, with the parts that add sites to it."""

    base: Stored
    more: tuple[Stored, ...]

    @property
    def sites(self) -> dict[str, Site]:
        """Every site of it that is complete or in the making, by name."""
        return {site.name: site for part in (self.base, *self.more) for site in part.plan.sites}

    @property
    def unfinished(self) -> list[Stored]:
        """Parts of it that were begun and not declared complete."""
        return [part for part in (self.base, *self.more) if not part.complete]


def extend_cache(
    target: TargetConfig,
    data: DataConfig,
    config: HarvestConfig,
    wanted: Mapping[str, Any],
    *,
    path: Path,
    console: Console,
) -> HarvestResult:
    """Add to the cache at `path` what the recipe, whose identity is `wanted`, asks for beyond it."""
    started = time.perf_counter()
    asked_for: dict[str, Any] = json.loads(json.dumps(dict(wanted)))
    segments = segments_of(path)
    _check_comparable(segments, asked_for, path)
    with console.status("loading the model"):
        model = load_target(target)
        asked = model.sites(config.sites, config.layers)
    extension = _Extension(model, config, asked_for, path, console, segments[0].base.facts)
    note_versions(segments[0].base.facts, console)
    same_text = any(segment.base.plan.identity["data"] == asked_for["data"] for segment in segments)
    if not same_text or not segments[-1].base.complete:
        filled = extension.add_text(data, target, asked)
    else:
        filled = extension.add_sites(asked)
    if not filled:
        rows = {split: sizes.rows for split, sizes in segments[0].base.plan.splits.items()}
        console.print(f"The cache {path} holds all of that already: nothing to add.", highlight=False)
        return HarvestResult(path, True, rows, 0, 0.0, time.perf_counter() - started)
    return outcome(path, filled, started, console)


def segments_of(path: Path) -> list[Segment]:
    """The segments of a cache, in order. Raises UserError when there is no finished cache at `path`."""
    base, *extensions = parts(path)
    if not base.complete:
        raise UserError(
            f"the cache {path} is not finished, so it cannot be extended yet. Run the harvest that it was begun with "
            "again; it goes on where it stopped."
        )
    heads = [base, *(part for part in extensions if not part.plan.rows_stored_elsewhere)]
    return [
        Segment(
            head,
            tuple(
                part
                for part in extensions
                if part.plan.rows_stored_elsewhere
                and part.plan.extends is not None
                and part.plan.extends.base == head.plan.fingerprint
            ),
        )
        for head in heads
    ]


def _check_comparable(segments: Sequence[Segment], wanted: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for a difference that no extension bridges."""
    stored = segments[0].base.plan.identity

    def fixed(identity: Mapping[str, Any]) -> dict[str, Any]:
        free = {"data": _TEXT, "harvest": ("sites", "layers")}
        return {
            table: {key: value for key, value in values.items() if key not in free.get(table, ())}
            for table, values in identity.items()
        }

    lines = differences(fixed(wanted), fixed(stored))
    if lines:
        raise UserError(
            f"{path} cannot be extended by this recipe: {'; '.join(lines)} ('expected' is this recipe's). An extension "
            "adds sites, or text packed in the same way; choose another place with --cache PATH for anything else."
        )


class _Extension:
    """One command's work on a cache."""

    def __init__(
        self,
        model: TransformerTarget,
        config: HarvestConfig,
        wanted: dict[str, Any],
        path: Path,
        console: Console,
        facts: Mapping[str, Any],
    ) -> None:
        self.model, self.config, self.wanted, self.path, self.console = model, config, wanted, path, console
        self._facts = facts

    def add_sites(self, asked: Sequence[Site]) -> list[Filled]:
        """The sites that a segment lacks, for every segment; [] when none lacks any."""
        done = []
        for number in range(len(segments_of(self.path))):
            create = self._lock()
            try:
                segment = segments_of(self.path)[number]
                identity = {**segment.base.plan.identity, "harvest": self.wanted["harvest"]}
                begun = self._begun(segment, identity)
                if begun is None:
                    missing = tuple(site for site in asked if site.name not in segment.sites)
                else:
                    missing = tuple(site for site in asked if site in begun.plan.sites)
                if not missing:
                    continue
                plan = segment.base.plan
                contexts = {split: read_contexts(segment.base.path, plan, split) for split in plan.splits}
                corpus = Corpus(contexts, segment.base.facts["corpus"])
                folder = begun.path if begun is not None else self._folder("sites")
                done.append(self._fill(folder, corpus, missing, identity, Extends("sites", plan.fingerprint), create))
            finally:
                create.release()
        return done

    def add_text(self, data: DataConfig, target: TargetConfig, asked: Sequence[Site]) -> list[Filled]:
        """A further segment, or the rest of one that was begun."""
        create = self._lock()
        try:
            segments = segments_of(self.path)
            sites = tuple(self.model.sites(list(segments[0].sites)))
            names = [site.name for site in sites]
            lacking = [site.name for site in asked if site.name not in names]
            if lacking:
                raise UserError(
                    f"this recipe asks {self.path} for other text and for more sites at once ({', '.join(lacking)}). "
                    "Extend it twice: by the sites with the stored [data], then by the text."
                )
            identity = {**self.wanted, "harvest": {**self.wanted["harvest"], "sites": names, "layers": None}}
            begun = next((s.base for s in segments[1:] if s.base.plan.identity == identity), None)
            if begun is not None and begun.complete:
                return []
            self._refuse_unfinished(segments, begun)
            if begun is not None:
                contexts = {split: read_contexts(begun.path, begun.plan, split) for split in begun.plan.splits}
                corpus, folder = Corpus(contexts, begun.facts["corpus"]), begun.path
            else:
                self._refuse_overlap(segments, data)
                tokenizer = load_tokenizer(target)
                corpus = read_corpus(data, tokenizer, self.model.n_ctx, self.model.n_vocab, self.console)
                self._check_shape(corpus, segments[0].base)
                folder = self._folder("tokens")
            base = segments[0].base.plan.fingerprint
            return [self._fill(folder, corpus, sites, identity, Extends("tokens", base), create)]
        finally:
            create.release()

    def _fill(
        self,
        folder: Path,
        corpus: Corpus,
        sites: tuple[Site, ...],
        identity: Mapping[str, Any],
        extends: Extends,
        create: Lock,
    ) -> Filled:
        """Fill one part; the cache's lock is held until the part's plan is published."""
        batch = batch_contexts(self.config, self.model, sites, corpus.splits["train"].token_id.shape[1], self._facts)
        return fill_part(
            self.model,
            corpus,
            sites,
            self.config,
            identity,
            path=folder,
            console=self.console,
            batch=batch,
            extends=extends,
            planned=create.release,
        )

    def _lock(self) -> Lock:
        return planning(self.path, lambda line: self.console.print(line, highlight=False))

    def _begun(self, segment: Segment, identity: Mapping[str, Any]) -> Stored | None:
        """The part that this command began earlier and has to finish, if there is one."""
        begun = next((part for part in segment.more if part.plan.identity == identity and not part.complete), None)
        self._refuse_unfinished([segment], begun)
        return begun

    def _refuse_unfinished(self, segments: Sequence[Segment], begun: Stored | None) -> None:
        """Raise UserError for a part that another command began and did not finish."""
        for part in (part for segment in segments for part in segment.unfinished):
            if begun is None or part.path != begun.path:
                raise UserError(
                    f"{part.path} is an extension that was not finished. Run the recipe that it was begun with again, "
                    "or remove that directory if it is no longer wanted; then extend the cache further."
                )

    def _folder(self, kind: str) -> Path:
        """Where the next part goes; one whose plan was never published is begun anew."""
        there = sorted((self.path / PARTS).glob("*-*"))
        if there and there[-1].name.endswith(kind) and not (there[-1] / ROOT).exists():
            return there[-1]
        number = 1 + max((int(folder.name.split("-")[0]) for folder in there), default=0)
        return self.path / PARTS / f"{number:02d}-{kind}"

    def _refuse_overlap(self, segments: Sequence[Segment], data: DataConfig) -> None:
        """Raise UserError when documents of the new text are stored already."""
        here = self.wanted["data"]
        source = ("source", "content", "subset", "split", "revision", "column", "txt_documents")
        for segment in segments:
            there = segment.base.plan.identity["data"]
            if any(there[key] != here[key] for key in source):
                continue
            end = int(segment.base.facts["corpus"]["documents_read"])
            last = None if data.max_documents is None else data.skip_documents + data.max_documents
            if data.skip_documents < end and (last is None or last > there["skip_documents"]):
                raise UserError(
                    f"data.skip_documents is {data.skip_documents}, and {self.path} holds the documents "
                    f"{there['skip_documents']} to {end - 1} of {data.source!r} already. Set data.skip_documents to "
                    f"{end} (--set data.skip_documents={end}) to go on behind them."
                )

    def _check_shape(self, corpus: Corpus, base: Stored) -> None:
        context, stored = corpus.splits["train"].token_id.shape[1], base.plan.splits["train"].tokens
        if context != stored:
            raise UserError(f"data.context gives contexts of {context} tokens; expected {stored}, as {self.path} has.")
