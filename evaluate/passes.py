"""The forward passes of an evaluation: which arms are run on a batch of rows, and what is summed from each.

Per batch the clean pass runs once and leaves behind the patched positions of every site, the clean next-token
distribution and the argmax; all replacements share them, and so they share the zero and mean ablations of the sites
they write. Clean inputs are encoded once per replacement, for the reconstruction metrics, for `clean_input` and for
`single_site`, and for what a cascade does before its first write. Logits live for one pass; nothing of the size tokens
× latents or tokens × vocabulary outlives a batch.

`single_site` needs a pass per written site, so it is run on an evenly spaced part of the rows, its share recorded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.contracts import Codes, Edit, Target
from thresher.cache.errors import UserError
from thresher.evaluate import splice
from thresher.evaluate.arms import (
    CLEAN,
    CLEAN_SINGLE,
    Plan,
    error_label,
    has_error_arm,
    means_of,
    patched_label,
    protocols_of,
)
from thresher.evaluate.checks import Replacement
from thresher.evaluate.compat import BatchTruth, batch_truth, compat
from thresher.evaluate.ledger import BESIDE, FIRST, OUTLIERS, PATCHED, SPECIAL, Ledger
from thresher.evaluate.masks import FIRST as FIRST_POSITION
from thresher.evaluate.masks import Scored
from thresher.evaluate.metrics import (
    CleanScores,
    CodeSums,
    ReconstructionSums,
    TargetSums,
    clean_scores,
    score_tokens,
)
from thresher.evaluate.tally import Tally, single_rows

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits scored at a time."""


class Batch(NamedTuple):
    """Some rows of the text on the target's device."""

    rows: np.ndarray
    """[B] rows of the split, for messages."""
    token: Tensor
    """[B, T]"""
    patch: Tensor
    """[B, T] bool: P."""
    score: Tensor
    """[B, T] bool: S."""
    outside: Tensor
    """[B, T] bool: real positions that P leaves out."""
    first: Tensor
    """[M] bool: which of those are the first of their row."""
    following: Tensor
    """[N] next tokens at the scored positions."""
    segment: Tensor
    """[N] their segments."""
    bucket: Tensor
    """[N] their position buckets."""
    single: bool
    """Whether `single_site` is run on these rows."""


class Clean(NamedTuple):
    """What the clean pass leaves behind, by site in forward order."""

    patched: dict[str, Tensor]
    """[N, D] at P."""
    outside: dict[str, Tensor]
    """[M, D] at the other real positions."""


# --- batches --------------------------------------------------------------------------------------------------------


def cuts(scored: Scored, plan: Plan) -> list[tuple[np.ndarray, bool]]:
    """Indices of the evaluated rows by batch, and whether `single_site` runs on them: its rows come first."""
    single = single_rows(scored, plan)
    rest = np.setdiff1d(np.arange(len(scored.rows)), single)
    size = plan.batch_contexts
    return [
        (part[start : start + size], is_single)
        for part, is_single in ((single, True), (rest, False))
        for start in range(0, len(part), size)
    ]


def make_batch(scored: Scored, index: np.ndarray, single: bool, device: torch.device) -> Batch:
    """Lay out some of the evaluated rows."""
    score, outside = scored.score[index], scored.outside[index]
    following = np.roll(scored.token_id[index], -1, axis=1)
    position = np.broadcast_to(np.arange(score.shape[1]), score.shape)[score]
    bucket = np.searchsorted(scored.bucket_edges, position, side="right") - 1

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Batch(
        scored.rows[index],
        on_device(scored.token_id[index]),
        on_device(scored.patch[index]),
        on_device(score),
        on_device(outside > 0),
        on_device(outside[outside > 0] == FIRST_POSITION),
        on_device(following[score]),
        on_device(scored.segment[index][score]),
        on_device(bucket),
        single,
    )


def rows_by_batch(scored: Scored, plan: Plan, device: torch.device) -> Iterator[Batch]:
    """All batches, laid out one at a time."""
    for index, single in cuts(scored, plan):
        yield make_batch(scored, index, single, device)


# --- one batch ------------------------------------------------------------------------------------------------------


def runs(places_N: Tensor, most: int) -> list[tuple[int, int]]:
    """Ascending places as runs [first, stop) of neighbours, at most `most` in each, so that rows need no gathering."""
    places = places_N.cpu().numpy()
    starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    stops = np.append(starts[1:], len(places))
    return [
        (int(places[at]), int(places[at]) + min(most, stop - at))
        for start, stop in zip(starts, stops, strict=True)
        for at in range(start, stop, most)
    ]


class BatchRunner:
    """Runs the arms of one batch and sums their scores."""

    def __init__(self, target: Target, batch: Batch, tally: Tally, advance: Callable[[], None]) -> None:
        self.target, self.batch, self.tally, self.advance = target, batch, tally, advance
        budget = CHUNK_ELEMENTS.get(target.device.type, CHUNK_ELEMENTS["cpu"])
        # places once per batch: a boolean mask would be searched again in every pass
        places = runs(batch.score.flatten().nonzero()[:, 0], max(1, budget // target.n_vocab))
        self.chunks = list(zip(places, batch.following.split([stop - first for first, stop in places]), strict=True))
        self.clean_scores: list[CleanScores] = []
        self._truth: dict[str, BatchTruth] = {}

    def run_clean(self, sites: Sequence[str], ledger: Ledger | None) -> Clean:
        """The clean pass, summed into `ledger` if it is given."""
        clean, batch = Clean({}, {}), self.batch
        at_P = splice.recording_edits(sites, batch.patch, clean.patched)
        beside = splice.recording_edits(sites, batch.outside, clean.outside)
        logits_BTV = self.target.logits(batch.token, {site: _both(at_P[site], beside[site]) for site in sites})
        logits_NV = logits_BTV.flatten(0, 1)
        self.clean_scores = [clean_scores(logits_NV[first:stop]) for (first, stop), _ in self.chunks]
        scores_N4 = self._scored(logits_BTV, "the target itself, nothing patched,")
        if ledger is not None:
            self._add(ledger, CLEAN, scores_N4)
            if self.batch.single:
                ledger.add_positions(CLEAN_SINGLE, scores_N4, self.batch.bucket, self.tally.buckets)
        return clean

    def run(self, ledger: Ledger, label: str, edits: Mapping[str, Edit], who: str) -> Tensor:
        """One patched pass, summed under `label`; returns the scores [N, 4]."""
        scores_N4 = self._scored(self.target.logits(self.batch.token, edits), who)
        self._add(ledger, label, scores_N4)
        return scores_N4

    def _add(self, ledger: Ledger, label: str, scores_N4: Tensor) -> None:
        batch, tally = self.batch, self.tally
        ledger.add_scores(label, scores_N4, batch.segment, tally.segments, batch.bucket, tally.buckets)

    def _scored(self, logits_BTV: Tensor, who: str) -> Tensor:
        logits_NV = logits_BTV.flatten(0, 1)
        scores_N4 = torch.cat(
            [
                score_tokens(logits_NV[first:stop], following, clean).stacked()
                for ((first, stop), following), clean in zip(self.chunks, self.clean_scores, strict=True)
            ]
        )
        self._refuse_nan(scores_N4, self.batch.score, who, "a loss")
        self.advance()
        return scores_N4

    def _refuse_nan(self, values: Tensor, mask_BT: Tensor, who: str, what: str) -> None:
        finite_N = values.isfinite().flatten(1).all(1)
        if bool(finite_N.all()):
            return
        b, t = mask_BT.nonzero()[~finite_N][0].tolist()
        raise UserError(
            f"{who} gives {what} that is not a finite number in held-out row {int(self.batch.rows[b])} at position "
            f"{t}. A number computed from it would be meaningless, so nothing is reported. Check the run's weights "
            "for NaN, or evaluate the target in float32 if its dtype overflows."
        )

    # Reconstruction and codes on clean inputs.

    def groups(self, site: str, clean: Clean) -> dict[str, Tensor | None]:
        """Which rows belong to each group: of the patched ones, for groups in `BESIDE` of the others; None: all."""
        y_NE, limit, first_M = clean.patched[site], self.tally.norms.get(site), self.batch.first
        out: dict[str, Tensor | None] = {PATCHED: None, FIRST: first_M, SPECIAL: ~first_M}
        if limit is not None:
            out[OUTLIERS] = torch.linalg.vector_norm(y_NE, dim=1) > limit
        return out

    def add_truth(self, ledger: Ledger, site: str, clean: Clean) -> None:
        """Moments of a site's true values."""
        for group, which in self.groups(site, clean).items():
            y_NE = clean.outside[site] if group in BESIDE else clean.patched[site]
            ledger.truth.setdefault((site, group), TargetSums()).add(y_NE if which is None else y_NE[which])

    def measure(
        self, ledger: Ledger, replacement: Replacement, clean: Clean
    ) -> tuple[dict[str, Tensor], splice.Settled]:
        """Encode and decode the clean values, sum their statistics; returns reconstructions [N, E] by written site, and
        what of it a cascade need not compute again."""
        codes = splice.encode_clean(replacement.dictionaries, clean.patched)
        yhats = splice.decode_all(replacement.dictionaries, codes)
        beside: dict[str, Tensor] = {}
        if len(self.batch.first) and not replacement.stands_for_others:
            others = splice.encode_clean(replacement.dictionaries, clean.outside)
            beside = splice.decode_all(replacement.dictionaries, others)
        for site, yhat_NE in yhats.items():
            self._refuse_nan(
                yhat_NE, self.batch.patch, f"The replacement {replacement.name!r}", f"a value for {site!r}"
            )
            if not replacement.stands_for_others:
                self._add_errors(ledger, site, clean, yhat_NE, beside.get(site))
        if not replacement.baseline:
            self._add_codes(ledger, codes)
        return yhats, splice.settled(replacement.dictionaries, list(clean.patched), codes, yhats)

    def _add_errors(
        self, ledger: Ledger, site: str, clean: Clean, yhat_NE: Tensor, beside_ME: Tensor | None = None
    ) -> None:
        """Errors of reconstructions at P, and at the other real positions if they are known."""
        for group, which in self.groups(site, clean).items():
            y_NE, own_NE = clean.patched[site], yhat_NE
            if group in BESIDE:
                if beside_ME is None:
                    continue
                y_NE, own_NE = clean.outside[site], beside_ME
            if which is not None:
                y_NE, own_NE = y_NE[which], own_NE[which]
            if not y_NE.shape[0]:
                continue
            errors = ledger.reconstruction.setdefault((site, group), ReconstructionSums()).add(y_NE, own_NE)
            if group == PATCHED:
                if site not in self._truth:
                    self._truth[site] = batch_truth(y_NE)
                found_3 = compat(self._truth[site], errors)
                ledger.count(f"compat|{site}", torch.cat([found_3, torch.ones_like(found_3[:1])]))

    def _add_codes(self, ledger: Ledger, codes: Sequence[Sequence[Codes]]) -> None:
        batch, tally = self.batch, self.tally
        total_N: Tensor | None = None
        for i, own in enumerate(codes):
            for s, source in enumerate(own):
                l0_N = ledger.codes.setdefault((i, s), CodeSums()).add(source)
                total_N = l0_N if total_N is None else total_N + l0_N
        assert total_N is not None
        width = sum(source.width for own in codes for source in own)
        ledger.count("total_l0", torch.bincount(total_N, minlength=width + 1))
        scored_N = total_N[batch.score[batch.patch]].double()
        for name, index_N, size in (
            ("segment_l0", batch.segment, tally.segments),
            ("position_l0", batch.bucket, tally.buckets),
        ):
            ledger.count(
                name, torch.zeros(size, dtype=torch.float64, device=tally.device).index_add_(0, index_N, scored_N)
            )

    # All of one replacement.

    def run_replacement(self, ledger: Ledger, replacement: Replacement, clean: Clean) -> None:
        """All protocols of one replacement on this batch."""
        name, dictionaries, patch_BT = replacement.name, replacement.dictionaries, self.batch.patch
        plan, who = self.tally.plan, f"The replacement {name!r}"
        protocols = protocols_of(replacement, plan.protocols)
        yhats, known = self.measure(ledger, replacement, clean)
        if "cascade" in protocols:
            self.cascade(ledger, replacement, known)
        if has_error_arm(replacement, plan):
            errors = {site: clean.patched[site] - yhat_NE for site, yhat_NE in yhats.items()}
            edits = splice.cascade_edits(dictionaries, patch_BT, errors=errors, known=known)
            self.run(ledger, error_label(name), edits, f"{who} with its errors added")
        places = list(zip(means_of(replacement), yhats.items(), strict=True))
        single = "single_site" in protocols and self.batch.single
        if "clean_input" in protocols:
            edits, seen = splice.constant_edits(yhats, patch_BT), dict[str, Tensor]()
            if replacement.stands_for_others:  # which follows from what it writes, whatever the stream
                edits |= splice.recording_edits([site for site, _ in places], patch_BT, seen)
            scores_N4 = self.run(ledger, patched_label("clean_input", name), edits, f"{who} under clean_input")
            for site, yhat_NE in seen.items():
                self._add_errors(ledger, site, clean, yhat_NE)
            if single and len(places) == 1:  # one site: both protocols write the same constants
                self._add(ledger, patched_label("single_site", name, places[0][0]), scores_N4)
                single = False
        if single:
            for site, (written, yhat_NE) in places:
                edits = splice.constant_edits({written: yhat_NE}, patch_BT)
                self.run(ledger, patched_label("single_site", name, site), edits, f"{who} at {site!r} alone")

    def cascade(self, ledger: Ledger, replacement: Replacement, known: splice.Settled) -> None:
        """The pass of the cascade."""
        active = torch.zeros((), dtype=torch.int64, device=self.tally.device)

        def observe(dictionary: int, source: int, codes: Codes) -> None:
            active.add_((codes.values > 0).sum())

        watched = None if replacement.baseline else observe
        edits = splice.cascade_edits(replacement.dictionaries, self.batch.patch, observe=watched, known=known)
        label = patched_label("cascade", replacement.name)
        self.run(ledger, label, edits, f"The replacement {replacement.name!r} under cascade")
        if watched is not None:
            ledger.count("cascade_l0", active)


def _both(first: Edit, second: Edit) -> Edit:
    def edit(x_BTD: Tensor) -> None:
        first(x_BTD)
        second(x_BTD)

    return edit
