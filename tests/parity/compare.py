"""Whether a foreign object computes what our dictionary computes: the acceptance rule.

    max|Δ| ≤ 1e-5 · max|ref|, for code and output, in every source (destination) and block of rows,
    and equal L0 on every row.

Our own evaluation forward in float32 on a CPU is the reference. Where a gate is so close that rounding decides it, both
are asked again in float64: a pre-activation within 1e-5 · |θ| of its θ, or values around the k-th within 1e-5 of each
other, or either within the rounding of a float32 product, 1e-6 · ‖w‖ (‖x‖ + ‖b‖). Weights are rounded to float32 by
export, so float64 too can put such a latent on either side: no other latent may then differ.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.rules import Deployed

RTOL = 1e-5


class Result(NamedTuple):
    """What either side computes of rows."""

    code: Tensor
    """[S, N, F], S the sources."""
    output: Tensor
    """[T, N, E], T the destinations."""


class Verdict(NamedTuple):
    """A comparison."""

    code: float
    """Largest |Δ| of a code over the largest |code| of its source and block, float32."""
    output: float
    l0_equal: bool
    """On every row, or float64 says so."""
    l0: float
    """Mean L0 of a source on cached rows."""
    rechecked: int
    """Rows whose gates were too close for float32."""
    undecided: int
    """Of these, rows on which float64 too has a close latent on the other side."""

    @property
    def passed(self) -> bool:
        return self.code <= RTOL and self.output <= RTOL and self.l0_equal


def reference(dictionaries: Sequence[Coder], x_SND: Tensor) -> Result:
    """Our own forward in the dtype of the rows. Where latents rank by a · n, codes are a · n, as they leave us."""
    codes, outputs, first = [], [], 0
    for coder in dictionaries:
        made = coder.to(x_SND.dtype)
        sources = [made.encode(s, x_SND[first + s]) for s in range(len(made.inputs))]
        for s, found in enumerate(sources):
            norms_F = made.encoder(s).norms
            codes.append(found.dense() if norms_F is None else found.dense() * norms_F)
        outputs += [made.decode(t, [sources[s] for s in made.sources(t)]) for t in range(len(made.writes))]
        first += len(sources)
        coder.to(torch.float32)
    return Result(torch.stack(codes), torch.stack(outputs))


def close_gates(dictionaries: Sequence[Coder], x_SND: Tensor) -> Tensor:
    """[S, N, F] latents whose gate float32 may not decide."""
    found, first = [], 0
    for coder in dictionaries:
        for s in range(len(coder.inputs)):
            encoder = coder.encoder(s)
            W_enc, x_ND = encoder.W_enc.double(), x_SND[first].double()
            scale_F = torch.ones(len(W_enc), dtype=torch.float64) if encoder.norms is None else encoder.norms.double()
            a_NF = (x_ND @ W_enc.T + encoder.b_enc.double()) * scale_F
            length_N = x_ND.norm(dim=1) + coder.b_dec.double().norm(dim=1).max()
            rounding_NF = 1e-6 * length_N[:, None] * W_enc.norm(dim=1) * scale_F
            if isinstance(encoder.rule, Deployed):
                theta_F = encoder.rule.threshold.double()
                close = (a_NF - theta_F).abs() <= torch.maximum(RTOL * theta_F, rounding_NF)
            else:
                close = (a_NF.abs() <= rounding_NF) | _tied(coder, a_NF.relu(), rounding_NF)
            found.append(close)
            first += 1
    return torch.stack(found)


def rechecked(close_SNF: Tensor) -> Tensor:
    """[N] rows to be asked again in float64."""
    return close_SNF.any(2).any(0)


def _tied(coder: Coder, z_NF: Tensor, rounding_NF: Tensor) -> Tensor:
    """[N, F] latents whose value lies around the border between chosen and not chosen."""
    k = int(coder.spec.k or 0)
    groups = z_NF.unflatten(1, (k, -1)) if coder.spec.firing == "groupmax" else z_NF[:, None]
    chosen = 1 if coder.spec.firing == "groupmax" else k
    best = groups.topk(chosen + 1, dim=2).values
    last, next_ = best[..., -2:-1], best[..., -1:]
    room = torch.maximum(RTOL * last, rounding_NF.reshape(groups.shape).amax(2, keepdim=True))
    tied = (last - next_ <= room) & (last > 0) & ((groups - last).abs() <= 2 * room)
    return tied.flatten(1)


def judge(
    dictionaries: Sequence[Coder],
    x_SND: Tensor,
    blocks: dict[str, slice],
    close_SNF: Tensor,
    foreign: Result,
    wide: Result | None,
) -> Verdict:
    """Compare. `close_SNF`: `close_gates`; `wide`: the foreign object in float64 on the rows that have such a gate."""
    ours = reference(dictionaries, x_SND)
    recheck_N = rechecked(close_SNF)
    code = _difference(ours.code, foreign.code, ~recheck_N, blocks)
    output = _difference(ours.output, foreign.output, ~recheck_N, blocks)
    fires, theirs = ours.code != 0, foreign.code != 0
    equal = bool((fires.sum(2) == theirs.sum(2))[:, ~recheck_N].all())
    undecided = 0
    if wide is not None:
        mine = reference(dictionaries, x_SND[:, recheck_N].double())
        differ_SNF = (mine.code != 0) != (wide.code != 0)
        equal = equal and not bool((differ_SNF & ~close_SNF[:, recheck_N]).any())
        same_N = ~differ_SNF.any(2).any(0)
        undecided = int((~same_N).sum())
        whole = {"rechecked": slice(None)}
        code = max(code, _difference(mine.code, wide.code, same_N, whole))
        output = max(output, _difference(mine.output, wide.output, same_N, whole))
    l0 = float(fires[:, blocks["cached"]].sum(2).float().mean())
    return Verdict(code, output, equal, l0, int(recheck_N.sum()), undecided)


def _difference(ours: Tensor, theirs: Tensor, rows_N: Tensor, blocks: dict[str, slice]) -> float:
    """Largest relative difference over sources and blocks, of the rows marked."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} here, {tuple(theirs.shape)} there"
    worst = 0.0
    for block in blocks.values():
        chosen = rows_N[block]
        for a, b in zip(ours[:, block][:, chosen], theirs[:, block][:, chosen], strict=True):
            if a.numel():
                delta, largest = float((a - b).abs().max()), float(a.abs().max())
                worst = max(worst, delta / largest if largest else (0.0 if delta == 0 else float("inf")))
    return worst
