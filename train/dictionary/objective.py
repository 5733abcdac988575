"""What a dictionary is trained to minimise: settings of the losses, as part of the recipe's [dictionary] table.

With N tokens, e = y − ŷ, V = ⟨‖y − ȳ‖²⟩ from the cache's statistics and ⟨·⟩ a mean over tokens, the three conventions
of the reconstruction loss are

    sum: ⟨‖e‖²⟩        mse: ⟨‖e‖²⟩ / d_out        fvu: ⟨‖e‖²⟩ / V        (the mean over destinations of each)

and everything else stands beside it with a coefficient of its own. λ beside `sum` is therefore λ / d_out beside `mse`
and λ / V beside `fvu`: gradients are then the same but for one factor, as long as neither clipping nor Adam's ε sees
their size. AuxK with `aux_divisor = "none"` is in the unit of the convention and keeps its coefficient.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from thresher.cache.errors import UserError

if TYPE_CHECKING:
    from thresher.train.dictionary.spec import _Settings

Convention = Literal["fvu", "mse", "sum"]
AuxDivisor = Literal["residual", "target", "none"]

MULTI = 4
"""Multi-TopK's second code has this many times k entries."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Settings of the losses that a recipe and a concrete dictionary share."""

    loss: Convention = "fvu"
    """Unit of the reconstruction loss, and so of all coefficients beside it. fvu: mean squared error over the variance
    in the cache's statistics; mse: over the width; sum: over nothing. λ beside sum is λ / d_out beside mse and λ / V
    beside fvu. What is logged is the FVU in any case."""
    multi_topk: float = 0.0
    """topk: coefficient of a second reconstruction, from the 4k largest pre-activations of each token (published: 1/8).
    Counters, AuxK and the saved dictionary know the k largest alone."""
    prefixes: tuple[float, ...] | None = None
    """Matryoshka: ends of the prefixes, ascending, the last being F; as numbers of latents or, when the last is 1, as
    shares of F. Each prefix of the latents reconstructs the target too; per layer for a CLT."""
    prefix_weights: tuple[float, ...] | None = None
    """Matryoshka: weight of each prefix's loss; 1 / number of prefixes when not given."""
    penalty_norm: Literal["l2", "l1", "none"] = "l2"
    """Norm n_f of a latent's decoder row, over all it writes to, in the penalties l1, tanh and lp and in the
    pre-activation loss; none: n_f = 1."""
    p_end: float = 0.2
    """lp: the exponent at the end, above 0; it begins at 1."""
    p_start: int = 15_000
    """lp: optimiser steps before the exponent falls."""
    p_updates: int = 10
    """lp: number of equal steps in which it falls, the first at p_start, evenly spread until the end of training."""
    p_offset: float = 1e-3
    """lp: δ in Σ (z n + δ)^p − δ^p, which keeps the gradient at 0 finite."""
    preact_form: Literal["threshold", "zero"] = "threshold"
    """Pre-activation loss. threshold: Σ n_f · relu(θ_f − a_f); zero: Σ relu(−a_f)."""
    aux_divisor: AuxDivisor = "residual"
    """What AuxK's mean squared error is divided by. residual: the variance of what is left; target: V, that of the
    target; none: what the reconstruction loss is divided by under `loss`."""
    aux_scale: bool = True
    """Whether AuxK shrinks by n / aux_k when there are n < aux_k dead latents."""
    aux_scope: Literal["own", "all"] = "own"
    """clt: what dead latents explain in AuxK. own: each layer's the residual of their own layer; all: those of all
    layers together the residuals of all layers."""
    resample: int = 0
    """relu: every so many steps, latents silent for the latter half of them start anew from inputs that are badly
    reconstructed; 0: never."""


def prefix_ends(prefixes: tuple[float, ...] | None, n_latents: int) -> tuple[int, ...]:
    """Ends of Matryoshka's prefixes as numbers of latents; () without prefixes."""
    if prefixes is None:
        return ()
    return tuple(round(end * n_latents) if prefixes[-1] == 1 else int(end) for end in prefixes)


def check_objective(settings: "_Settings", kind: str) -> None:
    """Raise UserError for values out of range and for losses that a firing rule cannot have."""
    _check_prefixes(settings)
    _check_power(settings)
    if settings.multi_topk < 0:
        raise UserError(f"dictionary.multi_topk is {settings.multi_topk:g}; expected 0 or more.")
    if settings.multi_topk > 0 and settings.firing != "topk":
        raise UserError(
            f"dictionary.multi_topk is {settings.multi_topk:g} with firing = {settings.firing!r}; the second code is "
            "one of more entries per token, which only 'topk' counts. Remove multi_topk or set firing = 'topk'."
        )
    if settings.resample < 0 or settings.resample == 1:
        raise UserError(f"dictionary.resample is {settings.resample}; expected 0 (never) or 2 steps or more.")
    if settings.resample and settings.firing != "relu":
        raise UserError(
            f"dictionary.resample is {settings.resample} with firing = {settings.firing!r}; resampling sets latents up "
            "for firing = 'relu'. Remove it: AuxK (aux, aux_k) revives the dead of the other rules."
        )


def _check_prefixes(settings: "_Settings") -> None:
    ends, weights = settings.prefixes, settings.prefix_weights
    if ends is None:
        if weights is not None:
            raise UserError("dictionary.prefix_weights is given without prefixes. Give prefixes, or remove it.")
        return
    if not ends or list(ends) != sorted(set(ends)) or ends[0] <= 0:
        raise UserError(
            f"dictionary.prefixes is {list(ends)}; expected ascending numbers above 0, the last one F or 1."
        )
    if ends[-1] != 1 and any(end != int(end) for end in ends):
        raise UserError(
            f"dictionary.prefixes is {list(ends)}: shares of F end with 1, numbers of latents are whole. Make the last "
            "one 1, or round them."
        )
    if weights is not None and (len(weights) != len(ends) or min(weights) < 0 or sum(weights) == 0):
        raise UserError(
            f"dictionary.prefix_weights is {list(weights)} for {len(ends)} prefixes; expected as many numbers of 0 or "
            "more, not all 0."
        )


def check_prefix_ends(settings: "_Settings", n_latents: int) -> None:
    """Raise UserError unless the prefixes end with the whole of F latents and are all different."""
    ends = prefix_ends(settings.prefixes, n_latents)
    if ends and (ends[-1] != n_latents or ends[0] < 1 or list(ends) != sorted(set(ends))):
        raise UserError(
            f"dictionary.prefixes is {list(settings.prefixes or ())}, which ends prefixes at {list(ends)} of "
            f"{n_latents} latents; expected different ends from 1 on, the last one {n_latents}. Correct prefixes or "
            "n_latents."
        )


def _check_power(settings: "_Settings") -> None:
    if not 0 < settings.p_end <= 1:
        raise UserError(f"dictionary.p_end is {settings.p_end:g}; expected 0 < p_end ≤ 1: at 0 nothing is penalised.")
    if settings.p_start < 1:
        raise UserError(f"dictionary.p_start is {settings.p_start}; expected 1 or more: λ follows from steps before.")
    if settings.p_updates < 1:
        raise UserError(f"dictionary.p_updates is {settings.p_updates}; expected 1 or more.")
    if settings.p_offset <= 0:
        raise UserError(f"dictionary.p_offset is {settings.p_offset:g}; expected more than 0, for example 1e-3.")
