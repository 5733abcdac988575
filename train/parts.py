"""A batch in parts: gradient accumulation that gives the step of the whole batch.

Gradients of sums over tokens add up by themselves. What couples the tokens of a batch does not, so a first pass without
gradient, the survey, finds it over all parts:

- BatchTopK's cut (dictionary/pools.py);
- the mean L0 of the target_l0 penalty;
- the variance of the residual where AuxK divides by it, merged from the parts' means and sums of squares.

The survey's selections and pre-activations are kept, and the second pass goes on from them: no encoder product is done
twice, except where all latents are looked at, since such blocks are what parts are to avoid. A step that needs none of
the three takes no survey.

Other ranks may have further parts of the same batch (train/exchange.py): then the survey asks them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.train.dictionary.coder import Coder, Pass
from thresher.train.dictionary.encoder import Chosen
from thresher.train.dictionary.pools import choose
from thresher.train.exchange import Exchange, Moments, Wants
from thresher.train.losses import Whole, own_sums


class Survey(NamedTuple):
    """What is known of a batch before its gradients."""

    chosen: list[list[Chosen | None]]
    """By part and source; None: to be found anew."""
    whole: Whole
    """What losses have to know of all parts."""
    done: Pass | None = None
    """The pass of the only part here, with gradient, where the survey had to make it."""


def split(xs: Sequence[Tensor], rows: int | None) -> list[list[Tensor]]:
    """Consecutive parts of up to `rows` rows of every tensor; None: one part."""
    if rows is None or xs[0].shape[0] <= rows:
        return [list(xs)]
    return [list(part) for part in zip(*(x.split(rows) for x in xs), strict=True)]


def wanted(coder: Coder, tokens: int, penalised: bool) -> Wants:
    """What a step on a batch of so many tokens has to know of it beforehand; `penalised`: penalties weigh in it."""
    spec = coder.spec
    l0 = penalised and spec.resolved_penalty == "target_l0" and spec.sparsity > 0
    residual = spec.aux > 0 and spec.aux_divisor == "residual" and _may_be_dead(coder, tokens)
    return Wants(coder.encoder(0).rule.budget(tokens), l0, residual)


@torch.no_grad()
def survey(
    coder: Coder,
    xs: Sequence[Sequence[Tensor]],
    ys: Sequence[Sequence[Tensor]],
    wants: Wants,
    tokens: int,
    others: Exchange | None = None,
) -> Survey:
    """Look at all parts; xs, ys: [n, width] by part and site; `tokens`: N; `others`: who has further parts."""
    if wants == Wants():
        return Survey([[None] * len(xs[0]) for _ in xs], Whole(tokens))
    chosen = choose(coder, xs, tokens, None if others is None else others.cut)
    kept: list[list[Chosen | None]] = [[None if one.selection is None else one for one in row] for row in chosen]
    counted = wants.cut is not None or coder.encoder(0).rule.per_token() is not None
    if coder.holding is not None and not counted:  # whether entries are listed may differ between ranks
        kept = [[None] * len(xs[0]) for _ in xs]
    if not (wants.l0 or wants.residual):
        return Survey(kept, Whole(tokens))
    done = None
    if len(xs) == 1:
        with torch.enable_grad():
            done = coder(xs[0], chosen[0], own_sums)
    gates, moments = _sums(coder, xs, ys, chosen, done, wants)
    squares = None if moments is None else moments.squares
    if others is not None:
        gates, squares = others.sums(gates, moments)
    l0 = gates / tokens if gates is not None and wants.l0 else None
    return Survey(kept, Whole(tokens, l0, squares if wants.residual else None), done)


def _may_be_dead(coder: Coder, tokens: int) -> bool:
    """Whether AuxK has to be reckoned with; where asking would wait for a device, as far as is known."""
    if coder.holding is not None:
        return any(coder.dead_of(source) for source in range(len(coder.inputs)))
    return any(coder.encoder(source).asleep(tokens) is not None for source in range(len(coder.inputs)))


def _sums(
    coder: Coder,
    xs: Sequence[Sequence[Tensor]],
    ys: Sequence[Sequence[Tensor]],
    chosen: Sequence[Sequence[Chosen]],
    done: Pass | None,
    wants: Wants,
) -> tuple[Tensor | None, Moments | None]:
    """[sources] sum of gates, and the moments of the residual."""
    gates = coder.b_dec.new_zeros(len(xs[0])) if wants.l0 else None
    moments: Moments | None = None
    for part_xs, part_ys, part_chosen in zip(xs, ys, chosen, strict=True):
        out = coder(part_xs, part_chosen) if done is None else done
        if gates is not None:
            gates += torch.stack([fired.gate.sum() for fired in out.fired if fired.gate is not None])
        if wants.residual:
            e_nSE = torch.stack(list(part_ys), 1) - out.y
            own = Moments(e_nSE.shape[0], e_nSE.mean(0), (e_nSE - e_nSE.mean(0)).square().sum((0, 2)))
            moments = own if moments is None else moments.and_of(own)
    if gates is not None and coder.holding is not None:
        coder.holding.group.add_up([gates])
    return gates, moments
