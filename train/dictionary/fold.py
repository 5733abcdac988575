"""From training space to raw activations: weights that need no normalisation by whoever loads them.

With x̃ = (x − μ)/σ read and ỹ = (y − ν)/τ written:

    W_enc ← W_enc diag(1/σ)             b_enc ← b_enc − W_enc μ (after the row above; any pre-bias goes first)
    W_dec ← W_dec diag(τ)               b_dec ← b_dec ⊙ τ + ν − W_skip μ (after the row below)
    W_skip ← diag(τ) W_skip diag(1/σ)
    V ← V diag(1/σ)   U ← diag(τ) U     of a MoLT, which then subtracts c ⊙ σ + μ from what its transforms read

Codes and thresholds stay what they were. An SAE under one factor c for its site is folded the other way, codes in raw
units: weights stay (and with them unit rows), biases and thresholds are multiplied by c. A rule whose codes are a line
in its pre-activations (gated) has the line folded in first. Where latents are ranked by a · n, their thresholds are
divided by the norm n of their row in training space. All sums are float64, cast to fp32 last. The trained module is
left as it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.rules import Deployed
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build, topology
from thresher.train.normalise import Affine


@torch.no_grad()
def deploy(
    coder: Coder, reads: Sequence[Affine], writes: Sequence[Affine], dtype: torch.dtype = torch.float32
) -> Coder:
    """A new module with frozen rules that acts on raw activations, on the trained one's device.

    `reads`: by source, of several sites `joined` ones; `writes`: by destination.
    """
    device = coder.b_dec.device
    out = build(coder.spec, coder.label, deployed=True, holding=coder.holding).to(device=device, dtype=dtype)
    for destination, site in enumerate(writes):
        shift, scale = site.shift.to(device), site.scale.to(device)
        b_dec = coder.b_dec[destination].double() * scale + shift
        if coder.W_skip is not None and out.W_skip is not None:
            own = reads[destination]
            W_ED = coder.W_skip[destination].double() * scale[:, None] / own.scale.to(device)
            out.W_skip[destination] = W_ED.to(dtype)
            b_dec -= W_ED @ own.shift.to(device)
        out.b_dec[destination] = b_dec.to(dtype)
        mean = site.mean * site.scale + site.shift if site.raw_mean is None else site.raw_mean
        out.mean[destination] = mean.to(device).to(dtype)
    for source, site in enumerate(reads):
        factor = code_factor(coder.spec, site)
        trained, folded = coder.encoder(source), out.encoder(source)
        line, thresholds = trained.rule.line(trained.b_enc.double()), trained.rule.thresholds()
        W_enc, bias = trained.W_enc.double() * (factor / site.scale.to(device)), _bias(coder, source)
        if line is not None:  # codes are slope · a + lift, cut off below 0: let that be the pre-activation
            W_enc, bias = W_enc * line.slope.double()[:, None], bias * line.slope + line.lift
            thresholds = None if thresholds is None else (thresholds * line.slope + line.lift).clamp_min(0.0)
        b_enc = bias * factor - W_enc @ site.shift.to(device)
        folded.W_enc.copy_(W_enc)
        folded.b_enc.copy_(b_enc)
        folded.tokens_since_fired.copy_(trained.tokens_since_fired)
        norms_F = coder.rank_norms(source)
        if norms_F is not None:
            assert folded.norms is not None
            folded.norms.copy_(norms_F)
        if thresholds is not None and isinstance(folded.rule, Deployed):
            folded.rule.threshold.copy_(ranked(thresholds.double() * factor, norms_F))
    out.fold(coder, reads, writes, code_factor(coder.spec, reads[0]))
    return out.requires_grad_(False)


def ranked(thresholds: Tensor, norms_F: Tensor | None) -> Tensor:
    """[F] thresholds on pre-activations from those on scores a · n; a latent that writes nothing never fires."""
    if norms_F is None:
        return thresholds
    return torch.where(norms_F > 0, thresholds / norms_F, torch.inf)


def code_factor(spec: DictionarySpec, site: Affine) -> float:
    """A code in raw units over the same code in training units, for a source of that site."""
    return float(site.scale[0]) if topology(spec.kind).raw_codes and spec.normalise == "scale" else 1.0


def _bias(coder: Coder, source: int) -> Tensor:
    """[F] float64 encoder bias in training space with the pre-bias folded in."""
    encoder = coder.encoder(source)
    if not coder.spec.pre_bias:
        return encoder.b_enc.double()
    return encoder.b_enc.double() - encoder.W_enc.double() @ coder.b_dec[source].double()
