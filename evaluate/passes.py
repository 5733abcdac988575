"""The forward passes of an evaluation: which arms are run on a batch of rows, and what is summed from each.

Per batch the clean pass runs once and leaves behind the patched positions of every site, the clean next-token
distribution and the argmax; all replacements share them, and so they share the zero and mean ablations of the sites
they write. Clean inputs are encoded once per replacement, for the reconstruction metrics, for `clean_input` and for
`single_site`. Logits live for one pass; nothing of the size tokens × latents or tokens × vocabulary outlives a batch.

`single_site` needs a pass per written site, so it is run on an evenly spaced part of the rows, its share recorded.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.contracts import Codes, Edit, Target
from thresher.cache.errors import UserError
from thresher.evaluate import splice
from thresher.evaluate.checks import Replacement
from thresher.evaluate.masks import Scored, spread
from thresher.evaluate.metrics import (
    SUMS,
    CleanScores,
    CodeSums,
    ReconstructionSums,
    TargetSums,
    clean_scores,
    score_tokens,
)

CLEAN, IDENTITY = "clean", "identity"
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}
"""Logits scored at a time: on a CPU, as many as stay in its cache."""


class Plan(NamedTuple):
    """What to run."""

    protocols: tuple[splice.Protocol, ...]
    arms: tuple[str, ...]
    """Of `identity`, `zero`, `mean`, `error_added`; `clean` and the replacements always run."""
    batch_contexts: int
    single_site_share: float


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
    following: Tensor
    """[N] next tokens at the scored positions."""
    segment: Tensor
    """[N] their segments."""
    single: bool
    """Whether `single_site` is run on these rows."""


@dataclass
class Tally:
    """Everything summed over the text so far."""

    segments: int
    device: torch.device
    language: dict[str, Tensor] = field(default_factory=dict)
    """[G, 4] float64 by arm label; columns as in `metrics.SUMS`."""
    truth: dict[str, TargetSums] = field(default_factory=dict)
    reconstruction: dict[tuple[str, str], ReconstructionSums] = field(default_factory=dict)
    """By replacement and written site, on clean inputs."""
    codes: dict[tuple[str, int, int], CodeSums] = field(default_factory=dict)
    """By replacement, dictionary and source, on clean inputs."""
    total_l0: dict[str, Tensor] = field(default_factory=dict)
    """Tokens by active latents over all sources together, a histogram by replacement."""
    segment_l0: dict[str, Tensor] = field(default_factory=dict)
    """[G] active latents over all sources, summed over scored positions, by replacement."""
    cascade_l0: dict[str, Tensor] = field(default_factory=dict)
    """Active latents over all sources, summed over patched positions, as they arise on the patched stream."""
    single_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Rows of the split on which `single_site` was run."""

    def add_scores(self, label: str, segment_N: Tensor, scores_N4: Tensor) -> None:
        """Sum per-token scores into the segments of an arm."""
        if label not in self.language:
            self.language[label] = torch.zeros(self.segments, len(SUMS), dtype=torch.float64, device=self.device)
        self.language[label].index_add_(0, segment_N, scores_N4)


# --- labels of arms -------------------------------------------------------------------------------------------------


def patched_label(protocol: str, name: str, site: str | None = None) -> str:
    """Key of a replacement's sums; `single_site` has one per written site."""
    return f"{protocol}|{name}" if site is None else f"{protocol}|{name}|{site}"


def zero_label(sites: Sequence[str]) -> str:
    """Key of the zero ablation of some sites."""
    return "zero|" + ",".join(sites)


def mean_label(sites: Sequence[str], means: Mapping[str, Tensor]) -> str:
    """Key of a mean ablation. Runs of another cache bring other training means, and get an ablation of their own."""
    digest = hashlib.sha256(b"".join(means[site].float().cpu().numpy().tobytes() for site in sites))
    return f"mean|{','.join(sites)}|{digest.hexdigest()[:8]}"


def error_label(name: str) -> str:
    """Key of the check that adds a replacement's errors back."""
    return f"error_added|{name}"


def means_of(replacement: Replacement) -> dict[str, Tensor]:
    """Training means by written site."""
    return {site: d.means[site] for d in replacement.dictionaries for site in d.writes}


# --- batches --------------------------------------------------------------------------------------------------------


def single_rows(scored: Scored, plan: Plan) -> np.ndarray:
    """Indices of the evaluated rows on which `single_site` runs."""
    if "single_site" not in plan.protocols:
        return np.zeros(0, dtype=np.int64)
    return spread(len(scored.rows), round(plan.single_site_share * len(scored.rows)))


def batches(scored: Scored, plan: Plan, device: torch.device) -> Iterator[Batch]:
    """All evaluated rows: those of `single_site` first, then the rest, each in order."""
    single = single_rows(scored, plan)
    rest = np.setdiff1d(np.arange(len(scored.rows)), single)
    for part, is_single in ((single, True), (rest, False)):
        for start in range(0, len(part), plan.batch_contexts):
            yield _batch(scored, part[start : start + plan.batch_contexts], is_single, device)


def _batch(scored: Scored, index: np.ndarray, single: bool, device: torch.device) -> Batch:
    score = scored.score[index]
    following = np.roll(scored.token_id[index], -1, axis=1)
    return Batch(
        scored.rows[index],
        torch.from_numpy(scored.token_id[index]).to(device),
        torch.from_numpy(scored.patch[index]).to(device),
        torch.from_numpy(score).to(device),
        torch.from_numpy(following[score]).to(device),
        torch.from_numpy(scored.segment[index][score]).to(device),
        single,
    )


# --- one batch ------------------------------------------------------------------------------------------------------


class BatchRunner:
    """Runs the arms of one batch and sums their scores."""

    def __init__(self, target: Target, batch: Batch, tally: Tally, advance: Callable[[], None]) -> None:
        self.target, self.batch, self.tally, self.advance = target, batch, tally, advance
        budget = CHUNK_ELEMENTS.get(target.device.type, CHUNK_ELEMENTS["cpu"])
        # places once per batch: a boolean mask would be searched again in every pass
        places = batch.score.flatten().nonzero()[:, 0].split(max(1, budget // target.n_vocab))
        self.chunks = list(zip(places, batch.following.split([len(part) for part in places]), strict=True))
        self.clean: list[CleanScores] = []

    def run_clean(self, sites: Sequence[str]) -> dict[str, Tensor]:
        """The clean pass; returns the patched positions of `sites`, [N, D] by name."""
        values: dict[str, Tensor] = {}
        logits_BTV = self.target.logits(self.batch.token, splice.recording_edits(sites, self.batch.patch, values))
        logits_NV = logits_BTV.flatten(0, 1)
        self.clean = [clean_scores(logits_NV.index_select(0, places)) for places, _ in self.chunks]
        self._add(CLEAN, logits_BTV, "the target itself, nothing patched,")
        return values

    def run(self, label: str, edits: Mapping[str, Edit], who: str) -> None:
        """One patched pass."""
        self._add(label, self.target.logits(self.batch.token, edits), who)

    def repeat(self, label: str, other: str, since: Tensor) -> None:
        """Give `label` what this batch added to `other`: two arms whose edits are the same need one pass."""
        added = self.tally.language[other] - since
        if label not in self.tally.language:
            self.tally.language[label] = torch.zeros_like(added)
        self.tally.language[label] += added

    def _add(self, label: str, logits_BTV: Tensor, who: str) -> None:
        logits_NV = logits_BTV.flatten(0, 1)
        scores_N4 = torch.cat(
            [
                score_tokens(logits_NV.index_select(0, places), following, clean).stacked()
                for (places, following), clean in zip(self.chunks, self.clean, strict=True)
            ]
        )
        self._refuse_nan(scores_N4, self.batch.score, who, "a loss")
        self.tally.add_scores(label, self.batch.segment, scores_N4)
        self.advance()

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

    def measure(self, replacement: Replacement, clean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode and decode the clean values, sum their statistics; returns reconstructions [N, E] by site."""
        name, tally = replacement.name, self.tally
        codes = splice.encode_clean(replacement.dictionaries, clean)
        yhats = splice.decode_all(replacement.dictionaries, codes)
        for site, yhat_NE in yhats.items():
            self._refuse_nan(yhat_NE, self.batch.patch, f"The replacement {name!r}", f"a value for {site!r}")
            tally.reconstruction.setdefault((name, site), ReconstructionSums()).add(clean[site], yhat_NE)
        total_N: Tensor | None = None
        for i, own in enumerate(codes):
            for s, source in enumerate(own):
                l0_N = tally.codes.setdefault((name, i, s), CodeSums()).add(source)
                total_N = l0_N if total_N is None else total_N + l0_N
        assert total_N is not None
        self._add_total_l0(name, total_N, sum(source.width for own in codes for source in own))
        return yhats

    def _add_total_l0(self, name: str, total_N: Tensor, width: int) -> None:
        tally, batch = self.tally, self.batch
        histogram = torch.bincount(total_N, minlength=width + 1)
        tally.total_l0[name] = tally.total_l0[name] + histogram if name in tally.total_l0 else histogram
        per_segment = tally.segment_l0.setdefault(
            name, torch.zeros(tally.segments, dtype=torch.float64, device=tally.device)
        )
        per_segment.index_add_(0, batch.segment, total_N[batch.score[batch.patch]].double())

    def run_replacement(self, replacement: Replacement, clean: Mapping[str, Tensor], plan: Plan) -> None:
        """All protocols of one replacement on this batch."""
        name, dictionaries, patch_BT = replacement.name, replacement.dictionaries, self.batch.patch
        who = f"The replacement {name!r}"
        yhats = self.measure(replacement, clean)
        if "cascade" in plan.protocols:
            none = torch.zeros((), dtype=torch.int64, device=self.tally.device)
            active = self.tally.cascade_l0.setdefault(name, none)

            def observe(dictionary: int, source: int, codes: Codes) -> None:
                active.add_((codes.values > 0).sum())

            edits = splice.cascade_edits(dictionaries, patch_BT, observe=observe)
            self.run(patched_label("cascade", name), edits, f"{who} under cascade")
        if "error_added" in plan.arms:
            errors = {site: clean[site] - yhat_NE for site, yhat_NE in yhats.items()}
            edits = splice.cascade_edits(dictionaries, patch_BT, errors=errors)
            self.run(error_label(name), edits, f"{who} with its errors added")
        single = "single_site" in plan.protocols and self.batch.single
        if "clean_input" in plan.protocols:
            label = patched_label("clean_input", name)
            before = self.tally.language.get(label)
            before = torch.zeros_like(self.tally.language[CLEAN]) if before is None else before.clone()
            self.run(label, splice.constant_edits(yhats, patch_BT), f"{who} under clean_input")
            if single and len(yhats) == 1:  # one site: both protocols write the same constants
                self.repeat(patched_label("single_site", name, next(iter(yhats))), label, before)
                single = False
        if single:
            for site, yhat_NE in yhats.items():
                edits = splice.constant_edits({site: yhat_NE}, patch_BT)
                self.run(patched_label("single_site", name, site), edits, f"{who} at {site!r} alone")


def ablations(replacements: Sequence[Replacement], plan: Plan) -> dict[str, tuple[dict[str, Tensor], bool]]:
    """Constants [D] by site for every zero and mean ablation needed, by label; the flag: for `single_site` only."""
    out: dict[str, tuple[dict[str, Tensor], bool]] = {}
    whole = "cascade" in plan.protocols or "clean_input" in plan.protocols
    for replacement in replacements:
        means = means_of(replacement)
        sets = [(tuple(means), False)] if whole else []
        if "single_site" in plan.protocols:
            sets += [((site,), True) for site in means]
        for sites, single in sets:
            for arm, label in (("zero", zero_label(sites)), ("mean", mean_label(sites, means))):
                if arm in plan.arms:
                    values = {s: means[s] if arm == "mean" else torch.zeros_like(means[s]) for s in sites}
                    out[label] = (values, single and out.get(label, (values, True))[1])
    return out


def count_passes(scored: Scored, replacements: Sequence[Replacement], plan: Plan) -> int:
    """Forward passes of the whole evaluation, in batches, for the progress bar."""
    arms = ablations(replacements, plan)
    every = 1 + ("identity" in plan.arms) + sum(not single for _, single in arms.values())
    every += len(replacements) * sum((p in plan.protocols) for p in ("cascade", "clean_input"))
    every += len(replacements) * ("error_added" in plan.arms)
    extra = sum(single for _, single in arms.values())
    if "single_site" in plan.protocols:
        counts = [len(means_of(replacement)) for replacement in replacements]
        extra += sum(n for n in counts if n > 1 or "clean_input" not in plan.protocols)
    n_single = len(single_rows(scored, plan))
    n_rest = len(scored.rows) - n_single
    single, rest = (-(-n // plan.batch_contexts) for n in (n_single, n_rest))
    return every * (single + rest) + extra * single


def run_passes(
    scored: Scored, replacements: Sequence[Replacement], target: Target, plan: Plan, advance: Callable[[], None]
) -> Tally:
    """Run every arm over all rows and return the sums."""
    device = target.device
    tally = Tally(len(scored.segment_row), device)
    tally.single_rows = scored.rows[single_rows(scored, plan)]
    written = tuple(dict.fromkeys(s for r in replacements for s in splice.writes(r.dictionaries)))
    sites = tuple(dict.fromkeys([s for r in replacements for s in splice.reads(r.dictionaries)] + list(written)))
    constants = ablations(replacements, plan)
    with torch.inference_mode():
        for batch in batches(scored, plan, device):
            runner = BatchRunner(target, batch, tally, advance)
            clean = runner.run_clean(sites)
            for site in written:
                tally.truth.setdefault(site, TargetSums()).add(clean[site])
            if "identity" in plan.arms:
                runner.run(IDENTITY, splice.identity_edits(written, batch.patch), "The identity arm")
            for label, (values, single_only) in constants.items():
                if batch.single or not single_only:
                    on_device = {site: value.to(device) for site, value in values.items()}
                    runner.run(label, splice.constant_edits(on_device, batch.patch), f"The ablation {label!r}")
            for replacement in replacements:
                runner.run_replacement(replacement, clean, plan)
    return tally
