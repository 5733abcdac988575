"""The verdict on dictionaries of a toy model, whose output is a vector and whose solution is known.

Cross-entropy means nothing there. Instead: FVU of what is written, on clean inputs; what the model's output loses with
reconstructions in place, as a mean squared error under the protocols of `splice`; L0 beside the true number of active
features; and how many of the true directions were found (`recovery`). Every row of inputs counts: none of them is the
first of anything.

Beside the dictionaries stand mean and zero ablation of the sites they write.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.contracts import Dictionary, Directions, Edit, Target, Truths, side_by_side
from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.records import fingerprint
from thresher.evaluate import recovery, splice
from thresher.evaluate.arms import protocols_of, protocols_that_fit
from thresher.evaluate.checks import Replacement, check_replacements
from thresher.evaluate.masks import spread
from thresher.evaluate.metrics import CodeSums, ReconstructionSums, TargetSums, code_metrics, reconstruction_metrics
from thresher.evaluate.recovery import Recovery

BATCH_CONTEXTS = 64
Known = Mapping[int, Sequence[Directions]]
"""Directions by `id` of a dictionary, one per source; () where it has none."""


class SourceScore(NamedTuple):
    """Of one source of a dictionary."""

    dictionary: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    l0: float
    """Active latents per row."""
    true_l0: float
    """Truths per row."""
    dead: float
    """Share of latents that never fired."""
    found: Recovery
    null: Recovery
    by_truth: list[float]
    """For every truth the best latent's smaller cosine, descending."""


class VectorRow(NamedTuple):
    """One replacement."""

    name: str
    kind: str
    """`replacement` or `baseline`."""
    sites: tuple[str, ...]
    """Written."""
    fvu: dict[str, float | None]
    """By written site, on clean inputs."""
    output_mse: dict[str, float]
    """By protocol: squared error of the patched model's output, mean over rows and dimensions."""
    sources: tuple[SourceScore, ...]
    facts: dict[str, Any]

    @property
    def l0(self) -> float | None:
        """Active latents per row, of all sources together."""
        return sum(source.l0 for source in self.sources) if self.sources else None

    @property
    def l0_ratio(self) -> float | None:
        """L0 over the true number, which counts a truth once, however many sources see it."""
        if not self.sources:
            return None
        true = max(source.true_l0 for source in self.sources)
        return None if true == 0 else sum(source.l0 for source in self.sources) / true


class VectorResults(NamedTuple):
    """All of them."""

    rows: tuple[VectorRow, ...]
    truths: str
    """What the truths are."""
    tokens: int
    """Input rows measured on."""
    provenance: dict[str, Any]
    notes: tuple[str, ...]


def evaluate_vectors(
    replacements: Sequence[Replacement],
    target: Target,
    contexts: Contexts,
    *,
    known: Known,
    protocols: Sequence[splice.Protocol],
    tokens: int,
    provenance: Mapping[str, Any],
    told: Callable[[int, int], None] = lambda done, total: None,
) -> VectorResults:
    """Judge replacements on about `tokens` rows of a toy model's inputs, 0 for all.

    Raises UserError for a target without a known solution and for replacements that do not fit it.
    """
    sites = list(check_replacements(replacements, target).values())
    truths = target.truths(sites)
    if truths is None:
        raise UserError(f"The target {target.name!r} is no toy model: its solution is not known. Use `evaluate`.")
    fitting, notes = protocols_that_fit(replacements, tuple(protocols))
    count, length = contexts.token_id.shape
    chosen = spread(count, count if tokens == 0 else -(-tokens // length))
    runs = [_Run(replacement, known) for replacement in replacements]
    truth_sums = {site.name: TargetSums() for site in sites}
    ablations = {name: _Sums() for name in ("mean ablation", "zero ablation")}
    measured = 0
    starts = range(0, len(chosen), BATCH_CONTEXTS)
    for done, low in enumerate(starts):
        rows = chosen[low : low + BATCH_CONTEXTS]
        ids_BT = torch.from_numpy(contexts.token_id[rows].astype(np.int64))
        patch_BT = torch.from_numpy(contexts.keep[rows] > 0)
        clean, out_NE = _clean_pass(target, [site.name for site in sites], ids_BT, patch_BT)
        measured += len(out_NE)
        for name, sums in truth_sums.items():
            sums.add(clean[name])
        present_NT = truths.present(ids_BT[patch_BT])
        for run in runs:
            run.add(target, ids_BT, patch_BT, clean, out_NE, present_NT, truths, fitting)
        for name, lost in ablations.items():
            edits = splice.constant_edits(_ablated(replacements, name), patch_BT)
            lost.add(_output(target, ids_BT, edits, patch_BT), out_NE)
        told(done + 1, len(starts))
    rows_out = [run.row(truth_sums, truths) for run in runs]
    rows_out += [
        VectorRow(name, "baseline", (), {}, {"clean_input": lost.mse}, (), {}) for name, lost in ablations.items()
    ]
    identity = dict(target.identity)
    provenance = {**provenance, "target": {"name": target.name, "sha256": fingerprint(identity), "identity": identity}}
    return VectorResults(tuple(rows_out), truths.of, measured, provenance, tuple(notes))


class _Sums:
    """Squared errors of outputs."""

    def __init__(self) -> None:
        self.square, self.count = 0.0, 0

    def add(self, out_NE: Tensor, wanted_NE: Tensor) -> None:
        self.square += float((out_NE.double() - wanted_NE.double()).square().sum())
        self.count += wanted_NE.numel()

    @property
    def mse(self) -> float:
        return self.square / max(self.count, 1)


class _Run:
    """Sums of one replacement."""

    def __init__(self, replacement: Replacement, known: Known) -> None:
        self.replacement = replacement
        self.known = known
        self.errors = {site: ReconstructionSums() for site in splice.writes(replacement.dictionaries)}
        self.codes = {(i, s): CodeSums() for i, d in enumerate(replacement.dictionaries) for s in range(len(d.inputs))}
        self.true = dict.fromkeys(self.codes, 0.0)
        self.tokens = 0
        self.outputs: dict[str, _Sums] = {}

    def add(
        self,
        target: Target,
        ids_BT: Tensor,
        patch_BT: Tensor,
        clean: Mapping[str, Tensor],
        out_NE: Tensor,
        present_NT: Tensor,
        truths: Truths,
        protocols: Sequence[splice.Protocol],
    ) -> None:
        """Take in a batch."""
        dictionaries = self.replacement.dictionaries
        codes = splice.encode_clean(dictionaries, clean)
        yhats = splice.decode_all(dictionaries, codes)
        for site, yhat_NE in yhats.items():
            self.errors[site].add(clean[site], yhat_NE)
        self.tokens += len(out_NE)
        for (i, s), sums in self.codes.items():
            sums.add(codes[i][s])
            truth = self._truth(i, s, truths)
            self.true[i, s] += float(present_NT[:, truth.kept].sum())
        for protocol in protocols_of(self.replacement, tuple(protocols)):
            for edits in self._edits(protocol, patch_BT, yhats):
                patched_NE = _output(target, ids_BT, edits, patch_BT)
                self.outputs.setdefault(protocol, _Sums()).add(patched_NE, out_NE)

    def _edits(self, protocol: splice.Protocol, patch_BT: Tensor, yhats: Mapping[str, Tensor]) -> list[dict[str, Edit]]:
        """Of the passes of a protocol; `single_site` has one per site, whose errors are averaged."""
        if protocol == "cascade":
            return [splice.cascade_edits(self.replacement.dictionaries, patch_BT)]
        if protocol == "clean_input":
            return [splice.constant_edits(yhats, patch_BT)]
        return [splice.constant_edits({site: yhat_NE}, patch_BT) for site, yhat_NE in yhats.items()]

    def _truth(self, i: int, source: int, truths: Truths) -> recovery.Truth:
        dictionary = self.replacement.dictionaries[i]
        read_TD = side_by_side(truths.directions, dictionary.inputs[source])
        return recovery.truth_of(read_TD, torch.cat(self._written(dictionary, source, truths, read_TD), dim=1))

    def _written(self, dictionary: Dictionary, source: int, truths: Truths, read_TD: Tensor) -> list[Tensor]:
        """[T, E] by written site: what latents have to write, so less what a skip connection does."""
        own = self.known.get(id(dictionary), ())
        skip = own[source].skip if own else {}
        return [
            truths.directions[site] - (read_TD @ skip[site].T if site in skip else 0)
            for site in _written_by(dictionary, source)
        ]

    def row(self, truth_sums: Mapping[str, TargetSums], truths: Truths) -> VectorRow:
        """What the sums say."""
        fvu = {site: reconstruction_metrics(truth_sums[site], sums)["fvu"] for site, sums in self.errors.items()}
        sources = tuple(
            score
            for i, dictionary in enumerate(self.replacement.dictionaries)
            for s, own in enumerate(self.known.get(id(dictionary), ()))
            for score in [self._score(i, s, own, truths)]
        )
        outputs = {protocol: sums.mse for protocol, sums in self.outputs.items()}
        sites = splice.writes(self.replacement.dictionaries)
        return VectorRow(
            self.replacement.name, "replacement", sites, fvu, outputs, sources, dict(self.replacement.facts)
        )

    def _score(self, i: int, source: int, own: Directions, truths: Truths) -> SourceScore:
        dictionary, sums = self.replacement.dictionaries[i], self.codes[i, source]
        facts = code_metrics(sums)
        assert isinstance(sums.firings, Tensor)
        alive_F = sums.firings > 0
        truth = self._truth(i, source, truths)
        sites = _written_by(dictionary, source)
        encoder_FD = own.encoder[alive_F]
        decoder_FE = torch.cat([own.decoder[site] for site in sites], dim=1)[alive_F]
        return SourceScore(
            dictionary.name,
            dictionary.inputs[source],
            sites,
            facts["l0"],
            self.true[i, source] / self.tokens,
            facts["dead"],
            recovery.recovery(truth, encoder_FD, decoder_FE),
            recovery.null(truth, len(own.encoder)),
            recovery.best_by_truth(truth, encoder_FD, decoder_FE),
        )


def _written_by(dictionary: Dictionary, source: int) -> tuple[str, ...]:
    return tuple(site for j, site in enumerate(dictionary.writes) if source in dictionary.sources(j))


def _clean_pass(
    target: Target, names: Sequence[str], ids_BT: Tensor, patch_BT: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """[N, D] by site, and the output [N, E], of all rows."""
    clean: dict[str, Tensor] = {}
    out_NE = _output(target, ids_BT, splice.recording_edits(names, patch_BT, clean), patch_BT)
    return clean, out_NE


def _output(target: Target, ids_BT: Tensor, edits: Mapping[str, Edit], patch_BT: Tensor) -> Tensor:
    with torch.inference_mode():
        return target.logits(ids_BT, edits)[patch_BT]


def _ablated(replacements: Sequence[Replacement], name: str) -> dict[str, Tensor]:
    """[E] by site that any replacement writes: its training mean, or 0."""
    means = {site: mean for r in replacements for d in r.dictionaries for site, mean in d.means.items()}
    return means if name == "mean ablation" else {site: torch.zeros_like(mean) for site, mean in means.items()}
