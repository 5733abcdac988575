"""A step of the dictionaries that are trained together: gradients in one of three modes, then an update of all or none.

`cascade` is one graph through dictionaries and model. In the other modes the model's passes depend on a dictionary only
through the constants it writes, so they are cut there: each pass leaves its gradient at the constants, and one backward
pass through the dictionaries follows. Memory stays at one pass, however many sites or parts there are, and a rule that
couples the tokens of a batch sees all of them whatever `train.micro_rows` says.

In `cascade` codes of later sources follow from earlier ones of the same part, so what couples tokens of a batch would
only see its part; such dictionaries are refused parts (admission.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.cache.contracts import Target
from thresher.cache.patching import constant_edits, stream_edits
from thresher.train.dictionary.encoder import Tally
from thresher.train.dictionary.pools import shared
from thresher.train.endtoend.clean import Cached, clean
from thresher.train.endtoend.contexts import Part, Step, Text
from thresher.train.endtoend.members import Member, detached, sites_of
from thresher.train.endtoend.scores import Scored, Scores, scores
from thresher.train.fit import Fit, Gradients, lacking_room
from thresher.train.losses import Losses, Whole
from thresher.train.stages import stage
from thresher.train.views import Inputs


class _Sums:
    """What a step gathers over parts and passes."""

    def __init__(self, fits: Sequence[Fit]) -> None:
        self.tallies: list[list[list[Tally]]] = [[[] for _ in fit.coder.inputs] for fit in fits]
        self.terms: list[list[Losses]] = [[] for _ in fits]
        self.short: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.ratios: list[dict[str, tuple[Tensor, float]]] = [{} for _ in fits]
        self.inputs: list[list[Inputs]] = [[] for _ in fits]

    def take(self, members: Sequence[Member], terms: Sequence[Losses], patched: int) -> None:
        """What one part fired, of a step with so many patched positions."""
        for index, (member, term) in enumerate(zip(members, terms, strict=True)):
            self.terms[index].append(detached(term))
            for source, fired in enumerate(member.fired):
                self.tallies[index][source].append(member.fit.coder.encoder(source).tally(fired))
            self.short += lacking_room(member.fired)
            self.inputs[index].append(member.inputs())
            member.fit.hear(member.fired, patched)

    def score(self, found: Scores, scored: int, whom: Sequence[int]) -> None:
        """What one pass came to, for the dictionaries that it concerns."""
        self.losses.append(found.loss.detach())
        values = {"kl": found.kl, "ce": found.ce, "ce_clean": found.ce_clean}
        for index in whom:
            for name, value in values.items():
                if value is not None:
                    before, count = self.ratios[index].get(name, (torch.zeros_like(value), 0))
                    self.ratios[index][name] = (before + value, count + scored)


class Group(NamedTuple):
    """Dictionaries that share their passes of the model."""

    fits: list[Fit]
    """In the order of the plans."""
    target: Target
    text: Text
    cached: Cached | None
    """Where clean rows come from; None: the model's clean pass."""
    contexts: int
    """Per step."""
    part: int | None
    """Contexts in memory at once; None: all of a step."""

    @property
    def consumed(self) -> int:
        """Positions of the stream that a step takes."""
        return self.contexts * self.text.length

    def step(self) -> list[Tensor]:
        """One optimiser step of all; their gradient norms. If one is not finite on a CPU, nothing has changed."""
        with stage("task"):
            return self._step()

    def _step(self) -> list[Tensor]:
        mode, first = self.fits[0].plan.train.mode, self.fits[0]
        for fit in self.fits:
            fit.coder.at(fit.done)
        with stage("transfer"):
            step = self.text.step(first.position // self.text.length, self.contexts, self.part)
        sums = _Sums(self.fits)
        if mode == "cascade":
            self._cascade(step, sums)
        else:
            self._constant(step, sums, together=mode == "clean_input")
        finite = torch.stack([*sums.losses, *(term.total for terms in sums.terms for term in terms)]).sum().isfinite()
        for fit in self.fits:
            finite = finite & fit.optimiser.finite()
        every = [shared(t) if f.plan.spec.pool == "joint" else t for f, t in zip(self.fits, sums.tallies, strict=True)]
        short = torch.stack(sums.short).any() if sums.short else None
        return [
            fit.conclude(Gradients(tallies, terms, short), finite, inputs, self.consumed, ratios)
            for fit, tallies, terms, inputs, ratios in zip(
                self.fits, every, sums.terms, sums.inputs, sums.ratios, strict=True
            )
        ]

    def _cascade(self, step: Step, sums: _Sums) -> None:
        config, whole = self.fits[0].plan.train, Whole(step.patched) if len(step.parts) > 1 else None
        every = range(len(self.fits))
        for part in step.parts:
            with stage("target"):
                seen = clean(self.target, part, self._written(), self.cached, self._wants_clean_logits)
                members, logits = self.cascade(part)
                found = self._score(logits, seen.logits, part, step.scored)
            terms = [member.terms(seen.rows, config.local_weight, whole) for member in members]
            with stage("backward"):
                torch.stack([found.loss, *(term.total.to(found.loss) for term in terms)]).sum().backward()
            sums.take(members, terms, step.patched)
            sums.score(found, int(part.scored.shape[0]), every)

    def cascade(self, part: Part, watch: dict[str, Tensor] | None = None) -> tuple[list[Member], Tensor]:
        """One pass in which every encoder reads the stream as the earlier replacements left it, and its logits.

        `watch` receives what is read, [N, D] by site.
        """
        members = [Member(fit) for fit in self.fits]

        def encode(i: int, source: int, x_ND: Tensor) -> None:
            if watch is not None:
                sites = members[i].fit.coder.inputs[source]
                watch.update(zip(sites, x_ND.chunk(len(sites), dim=1), strict=True))
            members[i].encode(source, x_ND)

        reads = [fit.coder.inputs for fit in self.fits]
        writes = [fit.plan.spec.writes for fit in self.fits]
        edits = stream_edits(reads, writes, part.at, encode, lambda i, j: members[i].decode(j))
        return members, self.target.logits(part.tokens, edits)

    def _constant(self, step: Step, sums: _Sums, together: bool) -> None:
        """Codes of clean rows; what they write goes in at once (`together`), or site by site."""
        config, sites = self.fits[0].plan.train, sites_of(self.fits)
        single = len(step.parts) == 1  # then one clean pass gives rows and logits
        with stage("target"):
            cleans = [
                clean(self.target, part, sites, self.cached, single and self._wants_clean_logits) for part in step.parts
            ]
        rows = {site: torch.cat([one.rows[site] for one in cleans]) for site in sites}
        members = [Member(fit) for fit in self.fits]
        for member in members:
            member.encode_all(rows)
        terms = [member.terms(rows, config.local_weight, None) for member in members]
        written = [(i, j) for i, fit in enumerate(self.fits) for j in range(len(fit.plan.spec.writes))]
        values = [members[i].decode(j) for i, j in written]
        slopes = [torch.zeros_like(value) for value in values]
        first = 0
        for part in step.parts:
            last = first + part.patched.shape[0]
            with stage("target"):
                seen = cleans[0].logits if single else None
                if not single and self._wants_clean_logits:
                    seen = clean(self.target, part, (), self.cached, True).logits
            for places in [range(len(written))] if together else [range(n, n + 1) for n in range(len(written))]:
                leaves = {place: values[place][first:last].detach().requires_grad_() for place in places}
                with stage("target"):
                    named = {self._site(*written[place]): leaf for place, leaf in leaves.items()}
                    logits = self.target.logits(part.tokens, constant_edits(named, part.at))
                    found = self._score(logits, seen, part, step.scored)
                    found.loss.backward()
                for place, leaf in leaves.items():
                    if leaf.grad is not None:
                        slopes[place][first:last] = leaf.grad
                whom = range(len(self.fits)) if together else [written[places[0]][0]]
                sums.score(found, int(part.scored.shape[0]), whom)
            first = last
        with stage("backward"):
            own = [term.total for term in terms if term.total.requires_grad]
            torch.autograd.backward([*values, *own], [*slopes, *([None] * len(own))])
        sums.take(members, terms, step.patched)

    def _score(self, logits: Tensor, seen: Tensor | None, part: Part, total: int) -> Scores:
        config = self.fits[0].plan.train
        assert config.objective != "local"
        plain = config.kernels == "plain"
        return scores(logits, seen, Scored(part.scored, part.following, config.objective, total), plain)

    @property
    def _wants_clean_logits(self) -> bool:
        return self.cached is None or self.fits[0].plan.train.objective == "kl"

    def _site(self, index: int, destination: int) -> str:
        return self.fits[index].plan.spec.writes[destination]

    def _written(self) -> list[str]:
        return [site for fit in self.fits for site in fit.plan.spec.writes]

    def trained_rows(self, rows: int) -> Iterator[Mapping[str, Tensor]]:
        """[N, D] by read site, batch by batch, of about `rows` positions: what the encoders read with final weights.

        Always the same ones: those that the first steps took.
        """
        start = count = 0
        while count < rows and start < len(self.text.usable):
            size = min(self.contexts, len(self.text.usable) - start)
            step = self.text.step(start, size, self.part)
            for part in step.parts:
                watch: dict[str, Tensor] = {}
                with torch.no_grad(), ExitStack() as evaluated:
                    for fit in self.fits:
                        evaluated.enter_context(fit.optimiser.averaged())
                    self.cascade(part, watch)
                yield watch
            start, count = start + size, count + step.patched


def group(fits: Sequence[Fit], target: Target, text: Text, cached: Cached | None) -> Group:
    """Put dictionaries together, whose plans were admitted (admission.py). Raises UserError for an unknown site."""
    config = fits[0].plan.train
    contexts = contexts_per_step(config.batch_rows, text.length)
    part = None if config.micro_rows is None else max(1, config.micro_rows // text.length)
    target.sites(sites_of(fits))  # raises for what the model does not have
    return Group(list(fits), target, text, cached, contexts, part if part is not None and part < contexts else None)


def contexts_per_step(batch_rows: int, length: int) -> int:
    """Whole contexts in place of so many rows; at least one."""
    return max(1, batch_rows // length)
