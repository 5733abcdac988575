"""A batch in parts: gradient accumulation that gives the step of the whole batch.

Gradients of sums over tokens add up by themselves. What couples the tokens of a batch does not, so a first pass without
gradient, the survey, finds it over all parts:

- BatchTopK's cut (dictionary/pools.py);
- the mean L0 of the target_l0 penalty;
- the variance of the residual where AuxK divides by it, merged from the parts' means and sums of squares.

The survey's selections and pre-activations are kept, and the second pass goes on from them: no encoder product is done
twice, except where all latents are looked at, since such blocks are what parts are to avoid. A step that needs none of
the three takes no survey.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.encoder import Chosen
from thresher.train.dictionary.pools import choose
from thresher.train.losses import Whole


class Survey(NamedTuple):
    """What is known of a batch before its gradients."""

    chosen: list[list[Chosen | None]]
    """By part and source; None: to be found anew."""
    whole: Whole
    """What losses have to know of all parts."""


def split(xs: Sequence[Tensor], rows: int | None) -> list[list[Tensor]]:
    """Consecutive parts of up to `rows` rows of every tensor; None: one part."""
    if rows is None or xs[0].shape[0] <= rows:
        return [list(xs)]
    return [list(part) for part in zip(*(x.split(rows) for x in xs), strict=True)]


@torch.no_grad()
def survey(coder: Coder, xs: Sequence[Sequence[Tensor]], ys: Sequence[Sequence[Tensor]], penalised: bool) -> Survey:
    """Look at all parts; xs, ys: [n, width] by part and site; `penalised`: penalties have weight in this step."""
    spec = coder.spec
    tokens = sum(part[0].shape[0] for part in xs)
    wants_l0 = penalised and spec.resolved_penalty == "target_l0" and spec.sparsity > 0
    wants_residual = spec.aux > 0 and spec.aux_divisor == "residual" and _may_be_dead(coder, tokens)
    wants_cut = coder.encoder(0).rule.budget(tokens) is not None
    if not (wants_l0 or wants_residual or wants_cut):
        return Survey([[None] * len(xs[0]) for _ in xs], Whole(tokens))
    chosen = choose(coder, xs)
    l0 = residual = None
    if wants_l0 or wants_residual:
        l0, residual = _sums(coder, xs, ys, chosen, wants_l0, wants_residual)
    kept = [[None if one.selection is None else one for one in row] for row in chosen]
    return Survey(kept, Whole(tokens, None if l0 is None else l0 / tokens, residual))


def _may_be_dead(coder: Coder, tokens: int) -> bool:
    """Whether AuxK has to be reckoned with; where asking would wait for a device, as far as is known."""
    return any(coder.encoder(source).asleep(tokens) is not None for source in range(len(coder.inputs)))


def _sums(
    coder: Coder,
    xs: Sequence[Sequence[Tensor]],
    ys: Sequence[Sequence[Tensor]],
    chosen: Sequence[Sequence[Chosen]],
    wants_l0: bool,
    wants_residual: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """[sources] sum of gates, and [S] Σ‖e − ē‖² by the pairwise merging of Chan, Golub and LeVeque 1983."""
    gates = coder.b_dec.new_zeros(len(xs[0])) if wants_l0 else None
    squares, mean_SE, seen = coder.b_dec.new_zeros(len(ys[0])), torch.zeros_like(coder.b_dec), 0
    for part_xs, part_ys, part_chosen in zip(xs, ys, chosen, strict=True):
        out = coder(part_xs, part_chosen)
        if gates is not None:
            gates += torch.stack([fired.gate.sum() for fired in out.fired if fired.gate is not None])
        if wants_residual:
            e_nSE = torch.stack(list(part_ys), 1) - out.y
            count, own_SE = e_nSE.shape[0], e_nSE.mean(0)
            away_SE = own_SE - mean_SE
            squares += (e_nSE - own_SE).square().sum((0, 2)) + away_SE.square().sum(1) * (seen * count / (seen + count))
            mean_SE += away_SE * (count / (seen + count))
            seen += count
    return gates, squares if wants_residual else None
