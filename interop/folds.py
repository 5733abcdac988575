"""What other tools leave for the reader to apply, folded into weights; every fold is exact, in float64.

In this order, where several are wanted (each returns a new dictionary):

1. `subtracted`: a bias p taken off the input before encoding      b_enc −= W_enc p
2. `standardised_input`: x̃ = (x − μ)/σ; one factor s is σ = 1/s    W_enc ← W_enc diag(1/σ), then b_enc −= W_enc μ
3. `standardised_output`: ỹ = (y − ν)/τ                            W_dec ← W_dec diag(τ), b_dec ← b_dec ⊙ τ + ν
4. `unit_rows`: n_f = ‖w_f‖ over all destinations together         W_dec /= n; W_enc, b_enc, θ *= n
5. `for_subtracting_reader`: a reader that takes b_dec off its input   b_enc += W_enc b_dec
6. `before_gain`: a reader that sees x before a norm's gain γ and shift β  b_enc += W_enc β, then W_enc ← W_enc diag(γ)

A skip connection acts on the raw input: W_skip ← diag(τ) W_skip diag(1/σ), and W_skip μ comes off b_dec.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thresher.interop.canonical import Canonical, Source


def subtracted(dictionary: Canonical, p: Sequence[Tensor]) -> Canonical:
    """Of one that encodes x − p, p [D] by source."""
    return _each(dictionary, lambda part, s: part._replace(b_enc=part.b_enc - part.W_enc @ p[s].double()))


def for_subtracting_reader(dictionary: Canonical) -> Canonical:
    """For a reader that encodes x − b_dec: the same codes come out."""
    return subtracted(dictionary, [-b_dec for b_dec in dictionary.b_dec])


def standardised_input(dictionary: Canonical, mu: Sequence[Tensor], sigma: Sequence[Tensor]) -> Canonical:
    """Of one that encodes (x − μ)/σ, both [D] (or one number) by source. A skip connection read the same."""

    def folded(part: Source, s: int) -> Source:
        W_enc = part.W_enc / sigma[s].double()
        return part._replace(W_enc=W_enc, b_enc=part.b_enc - W_enc @ mu[s].double().expand(W_enc.shape[1]))

    out = _each(dictionary, folded)
    if out.W_skip is None:
        return out
    W_skip = tuple(weight / sigma[s].double() for s, weight in enumerate(out.W_skip))
    shifts = [weight @ mu[s].double().expand(weight.shape[1]) for s, weight in enumerate(W_skip)]
    return out._replace(W_skip=W_skip, b_dec=tuple(b - shift for b, shift in zip(out.b_dec, shifts, strict=True)))


def standardised_output(dictionary: Canonical, nu: Sequence[Tensor], tau: Sequence[Tensor]) -> Canonical:
    """Of one that writes (y − ν)/τ, both [E] (or one number) by destination."""

    def folded(part: Source, s: int) -> Source:
        scales = [tau[s + t].double().expand(part.W_dec.shape[2]) for t in range(part.W_dec.shape[1])]
        return part._replace(W_dec=part.W_dec * torch.stack(scales))

    out = _each(dictionary, folded)
    b_dec = tuple(b * tau[j].double() + nu[j].double() for j, b in enumerate(out.b_dec))
    W_skip = None
    if out.W_skip is not None:
        W_skip = tuple(w * tau[j].double().expand(w.shape[0])[:, None] for j, w in enumerate(out.W_skip))
    return out._replace(b_dec=b_dec, W_skip=W_skip)


def unit_rows(dictionary: Canonical) -> Canonical:
    """With decoder rows of norm 1, over all destinations together; a row of zeros stays.

    Codes are multiplied by the norm. Not for topk and groupmax, which would choose others: pass those whose rows differ
    in norm through thresholds first.
    """
    norms = [part.W_dec.flatten(1).norm(dim=1) for part in dictionary.sources]
    safe = [torch.where(n > 0, n, 1.0) for n in norms]
    return _each(dictionary, lambda part, s: scaled_codes(part, safe[s]))


def before_gain(dictionary: Canonical, gamma: Sequence[Tensor], beta: Sequence[Tensor]) -> Canonical:
    """For a reader that is given x of γ ⊙ x + β, both [D] by source: what the last step of a norm makes of x."""

    def folded(part: Source, s: int) -> Source:
        b_enc = part.b_enc + part.W_enc @ beta[s].double()
        return part._replace(W_enc=part.W_enc * gamma[s].double(), b_enc=b_enc)

    out = _each(dictionary, folded)
    if out.W_skip is None:
        return out
    b_dec = tuple(
        b + weight @ beta[s].double() for s, (b, weight) in enumerate(zip(out.b_dec, out.W_skip, strict=True))
    )
    return out._replace(W_skip=tuple(weight * gamma[s].double() for s, weight in enumerate(out.W_skip)), b_dec=b_dec)


def scaled_codes(part: Source, factor_F: Tensor) -> Source:
    """Codes multiplied by a factor ≥ 0 per latent, reconstructions the same where it is above 0 or the row is 0."""
    safe_F = torch.where(factor_F > 0, factor_F, 1.0)
    return Source(
        part.W_enc * factor_F[:, None],
        part.b_enc * factor_F,
        None if part.threshold is None else part.threshold * factor_F,
        part.W_dec / safe_F[:, None, None],
    )


def from_gate(W: Tensor, b_gate: Tensor, r: Tensor, b_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(W_enc, b_enc, θ) of a gated encoder: z = ReLU(e^r ⊙ Wx + b_mag) where Wx + b_gate > 0; W [F, D]."""
    slope = r.double().exp()
    W_enc, b_enc = W.double() * slope[:, None], b_mag.double()
    return W_enc, b_enc, (b_enc - slope * b_gate.double()).clamp_min(0.0)


def _each(dictionary: Canonical, change: Callable[[Source, int], Source]) -> Canonical:
    return dictionary._replace(sources=tuple(change(part, s) for s, part in enumerate(dictionary.sources)))
