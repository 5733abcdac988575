"""More sites, or more text, for a cache that is finished; nothing that is there is rewritten.

What a recipe asks for beyond the cache follows from the differences between the two identities. Missing sites: the
stored contexts of every segment run through the model again, for those sites alone. Other text: a further segment, at
all sites of the cache. Both at once, or any other difference, is refused. An extension is a part of its own, written
by the same protocol as the cache itself: killed, the base stays as it was, and the same command goes on. It also writes
anew what the base or an extension lost after it was finished.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from rich.console import Console

from thresher.cache.commit import PARTS, ROOT, harvest_again
from thresher.cache.contracts import Site
from thresher.cache.directory import planning
from thresher.cache.errors import UserError
from thresher.cache.index import read_index
from thresher.cache.locks import Lock
from thresher.cache.place import Place
from thresher.cache.plan import Extends
from thresher.cache.reader import CacheReader
from thresher.cache.records import differences, fingerprint
from thresher.cache.roster import Roster
from thresher.cache.stored import Stored, parts, read_contexts
from thresher.harvest.corpus import Corpus, DataConfig, read_corpus
from thresher.harvest.fill import Filled, fill_part, note_versions, outcome
from thresher.harvest.settings import HarvestConfig, HarvestResult
from thresher.harvest.target import TargetConfig, TransformerTarget, held, load_tokenizer

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
    path: Place,
    console: Console,
    roster: Roster,
) -> HarvestResult:
    """Add to the cache at `path` what the recipe, whose identity is `wanted`, asks for beyond it."""
    started = time.perf_counter()
    asked_for: dict[str, Any] = json.loads(json.dumps(dict(wanted)))
    segments = segments_of(path)
    _check_comparable(segments[0].base, asked_for, path)
    with ExitStack() as stack:
        with console.status("loading the model"):
            model = stack.enter_context(held(target, roster))
            asked = model.sites(config.sites, config.layers)
        if model.follows:
            model.follow()
            return HarvestResult(path, False, {}, 0, 0.0, time.perf_counter() - started)
        extension = _Extension(model, config, asked_for, path, console, segments[0].base.facts, roster)
        note_versions(segments[0].base.facts, console)
        filled = extension.mend_base()
        if any(_same_text(segment, asked_for) and segment.base.complete for segment in segments_of(path)):
            filled += extension.add_sites(asked)
        else:
            filled += extension.add_text(data, target, asked)
    if not filled:
        CacheReader.open(path).close()  # raises when something else is lost
        rows = {split: sizes.rows for split, sizes in segments[0].base.plan.splits.items()}
        console.print(f"The cache {path} holds all of that already: nothing to add.", highlight=False)
        return HarvestResult(path, True, rows, 0, 0.0, time.perf_counter() - started)
    return outcome(path, filled, started, console)


def segments_of(path: Place) -> list[Segment]:
    """The segments of a cache, in order. Raises UserError when no cache was ever finished at `path`."""
    base, *extensions = parts(path)
    if not base.complete and not extensions:
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


def can_extend(path: Place, wanted: Mapping[str, Any]) -> bool:
    """Whether an extension leads from the cache at `path` to the recipe whose identity is `wanted`."""
    base, *extensions = parts(path)
    return (base.complete or bool(extensions)) and not unbridgeable(base.plan.identity, wanted)


def unbridgeable(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two identities that no extension bridges: a line for each key."""

    def fixed(identity: Mapping[str, Any]) -> dict[str, Any]:
        free = {"data": _TEXT, "harvest": ("sites", "layers")}
        return {
            table: {key: value for key, value in values.items() if key not in free.get(table, ())}
            for table, values in identity.items()
        }

    return differences(fixed(wanted), fixed(stored))


def _same_text(segment: Segment, wanted: Mapping[str, Any]) -> bool:
    return bool(segment.base.plan.identity["data"] == wanted["data"])


def _check_comparable(base: Stored, wanted: Mapping[str, Any], path: Place) -> None:
    """Raise UserError for a difference that no extension bridges."""
    lines = unbridgeable(base.plan.identity, wanted)
    if lines:
        raise UserError(
            f"{path} cannot be extended by this recipe: {'; '.join(lines)} ('expected' is this recipe's). An extension "
            "adds sites, or text packed in the same way; choose another place with --cache PATH for anything else."
        )


def _corpus(part: Stored) -> Corpus:
    """The text that a part holds."""
    return Corpus(
        {split: read_contexts(part.path, part.plan, split) for split in part.plan.splits}, part.facts["corpus"]
    )


class _Extension:
    """One command's work on a cache."""

    def __init__(
        self,
        model: TransformerTarget,
        config: HarvestConfig,
        wanted: dict[str, Any],
        path: Place,
        console: Console,
        facts: Mapping[str, Any],
        roster: Roster,
    ) -> None:
        self.model, self.config, self.wanted, self.path, self.console = model, config, wanted, path, console
        self._facts, self._roster = facts, roster

    def mend_base(self) -> list[Filled]:
        """Shards that the base has lost since it was finished, written anew; [] when it is whole."""
        create = self._lock()
        try:
            base = segments_of(self.path)[0].base
            if base.complete:
                return []
            return [self._fill(base.path, _corpus(base), base.plan.sites, base.plan.identity, None, create)]
        finally:
            create.release()

    def add_sites(self, asked: Sequence[Site]) -> list[Filled]:
        """The sites that a segment lacks, for every segment; [] when none lacks any."""
        done = []
        for number in range(len(segments_of(self.path))):
            while (filled := self._add_sites_to(number, asked)) is not None:
                done.append(filled)
        return done

    def _add_sites_to(self, number: int, asked: Sequence[Site]) -> Filled | None:
        """One part with sites that a segment lacks: the rest of one that was begun, or a new one; None: it has all."""
        create = self._lock()
        try:
            segment = segments_of(self.path)[number]
            plan = segment.base.plan
            begun = next((p for p in segment.more if not p.complete and _names(p.plan.sites) <= _names(asked)), None)
            if begun is not None:
                sites, identity, folder = begun.plan.sites, begun.plan.identity, begun.path
            else:
                self._refuse_unfinished([segment])
                sites = tuple(site for site in asked if site.name not in segment.sites)
                if not sites:
                    return None
                identity = {**plan.identity, "harvest": self.wanted["harvest"]}
                folder = self._folder("sites", identity)
            extends = Extends("sites", plan.fingerprint)
            return self._fill(folder, _corpus(segment.base), sites, identity, extends, create)
        finally:
            create.release()

    def add_text(self, data: DataConfig, target: TargetConfig, asked: Sequence[Site]) -> list[Filled]:
        """A further segment, or the rest of one that was begun or has lost something since."""
        create = self._lock()
        try:
            segments = segments_of(self.path)
            begun = next((s.base for s in segments[1:] if _same_text(s, self.wanted)), None)
            if begun is not None:
                if begun.complete:
                    return []
                sites, identity, folder, corpus = begun.plan.sites, begun.plan.identity, begun.path, _corpus(begun)
            else:
                self._refuse_unfinished(segments)
                sites, identity = self._text(segments[0], asked)
                folder = self._folder("tokens", identity)
                self._refuse_overlap(segments, data)
                tokenizer = load_tokenizer(target)
                corpus = read_corpus(
                    data, tokenizer, self.model.n_ctx, self.model.n_vocab, self.console, extending=True
                )
                self._check_shape(corpus, segments[0].base)
            extends = Extends("tokens", segments[0].base.plan.fingerprint)
            return [self._fill(folder, corpus, sites, identity, extends, create)]
        finally:
            create.release()

    def _text(self, base: Segment, asked: Sequence[Site]) -> tuple[tuple[Site, ...], dict[str, Any]]:
        """Sites and identity of the segment of text to add: at all sites of the cache.

        One that was lost as a whole is written as it was, at the sites that the cache had then.
        """
        lost, held = self._lost(), [base.base, *base.more]
        choices = []
        for count in range(len(held), 0, -1):
            sites = tuple(self.model.sites([site.name for part in held[:count] for site in part.plan.sites]))
            harvest = {**self.wanted["harvest"], "sites": [site.name for site in sites], "layers": None}
            choices.append((sites, {**self.wanted, "harvest": harvest}))
            if ("tokens", fingerprint(choices[-1][1])) in lost:
                return choices[-1]
        self._refuse_lost(lost.values())
        sites, identity = choices[0]
        lacking = [site.name for site in asked if site.name not in _names(sites)]
        if lacking:
            raise UserError(
                f"this recipe asks {self.path} for other text and for more sites at once ({', '.join(lacking)}). "
                "Extend it twice: by the sites with the stored [data], then by the text."
            )
        return sites, identity

    def _fill(
        self,
        folder: Place,
        corpus: Corpus,
        sites: tuple[Site, ...],
        identity: Mapping[str, Any],
        extends: Extends | None,
        create: Lock,
    ) -> Filled:
        """Fill one part; the cache's lock is held until the part's plan is published. No `extends`: it is the base."""
        return fill_part(
            self.model,
            corpus,
            sites,
            self.config,
            identity,
            path=folder,
            console=self.console,
            begun=self._facts,
            extends=extends,
            create=create if extends is None else None,
            planned=create.release,
            roster=self._roster,
        )

    def _lock(self) -> Lock:
        return planning(self.path, lambda line: self.console.print(line, highlight=False))

    def _refuse_unfinished(self, segments: Sequence[Segment]) -> None:
        """Raise UserError for a part that another command began and did not finish."""
        for part in (part for segment in segments for part in segment.unfinished):
            raise UserError(
                f"{part.path} is an extension that was not finished, or has lost something since. Run "
                f"`{harvest_again(self.path, extend=True)}` with the recipe that it was begun with (one that never was "
                "finished may also be removed); then extend the cache further."
            )

    def _lost(self) -> dict[tuple[str, str], str]:
        """Names of parts that were finished and are gone, by kind and fingerprint."""
        listed = read_index(self.path, lost_is_empty=True)
        return {
            (entry.kind, entry.fingerprint): name
            for name, entry in listed.items()
            if not (self.path / PARTS / name / ROOT).exists()
        }

    def _refuse_lost(self, names: Iterable[str]) -> None:
        """Raise UserError for a part that is gone and is not the one to be written now."""
        for name in names:
            raise UserError(
                f"{self.path / PARTS / name} was finished and is gone. Restore it from a copy, or run "
                f"`{harvest_again(self.path, extend=True)}` with the recipe that added it; then extend the cache "
                "further."
            )

    def _folder(self, kind: str, identity: Mapping[str, Any]) -> Place:
        """Where the next part goes: to the place of a lost one with the same content, or behind those that are there.

        One whose plan was never published is begun anew. Raises UserError as long as another one is lost.
        """
        lost = self._lost()
        if (kind, fingerprint(identity)) in lost:
            return self.path / PARTS / lost[kind, fingerprint(identity)]
        self._refuse_lost(lost.values())
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


def _names(sites: Iterable[Site]) -> set[str]:
    return {site.name for site in sites}
