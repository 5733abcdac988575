"""AuxK of all layers together: dead latents of a CLT explain whatever is left anywhere they write to.

The other form (train/auxk.py) lets each layer's dead latents explain their own layer alone. Here, with z'_i the codes
of source i's dead latents (of each token the k' largest positive pre-activations) and e_j = y_j − ŷ_j, detached,

    ê_j = Σ_{i ≤ j} z'_i W_dec^{i→j} (no decoder bias)        AuxK = s · mean over j of Σ‖ê_j − e_j‖² / divisor_j

with s = min(n / (L k_aux), 1), n the dead latents of all layers. Their codes are ordinary sparse ones, so encoder and
decoder treat them as any others: nothing here has kernels of its own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.train.dictionary.coder import Coder, Pass
from thresher.train.dictionary.encoder import Fired
from thresher.train.kernels.padded import Padded
from thresher.train.kernels.residual import Left
from thresher.train.kernels.silent import Dead, Silent, plain_silent
from thresher.train.kernels.sparse import Selection, add_decoded, gathered_linear


def joint(
    coder: Coder,
    done: Pass,
    xs: Sequence[Tensor],
    lefts: Sequence[Left],
    dead: Sequence[Dead | None],
    divisor_S: Tensor | None = None,
) -> Tensor:
    """The term; 0 when no latent is dead. `dead`: by source; else as `auxk.auxiliary`."""
    numbers = [some.latents.shape[0] if some.number is None else some.number for some in dead if some is not None]
    if not numbers:
        return done.y.new_zeros(())
    guess_NSE = joint_guess(coder, done.fired, xs, dead, torch.zeros_like(done.y.detach()))
    return joint_error(coder, guess_NSE, lefts, divisor_S) * joint_share(coder, sum(numbers[1:], numbers[0]), guess_NSE)


def joint_guess(
    coder: Coder, fired: Sequence[Fired], xs: Sequence[Tensor], dead: Sequence[Dead | None], zero_NSE: Tensor
) -> Tensor:
    """[N, S, E] ê; on top of zeros, which are changed in place."""
    for source, (x_ND, some) in enumerate(zip(xs, dead, strict=True)):
        if some is not None:
            z, selection = _codes(coder, source, some, fired[source].silent, x_ND)
            first, sink = coder.written(source).start, coder.decoder_sink(source)
            zero_NSE = add_decoded(zero_NSE, z, coder.W_dec[source], selection, first, coder.kernels, sink)
    return zero_NSE


def joint_error(coder: Coder, guess_NSE: Tensor, lefts: Sequence[Left], divisor_S: Tensor | None) -> Tensor:
    """The mean over destinations of Σ‖ê − e‖² / divisor."""
    terms = []
    for j, left in enumerate(lefts):
        total = left.variation() if divisor_S is None else divisor_S[j]
        terms.append((guess_NSE[:, j] - left.residual).square().sum() / total.where(total > 0, torch.inf))
    return torch.stack(terms).mean()


def joint_share(coder: Coder, number: Tensor | int, like: Tensor) -> Tensor | float:
    """s; on a device the number of dead latents is not known here, and may be 0."""
    enough = coder.spec.resolved_aux_k * len(coder.W_dec) if coder.spec.aux_scale else 1
    return min(number / enough, 1.0) if isinstance(number, int) else (number.to(like.dtype) / enough).clamp_max(1.0)


def _codes(coder: Coder, source: int, dead: Dead, silent: object, x_ND: Tensor) -> tuple[Tensor, Selection | None]:
    """Codes of a source's dead latents, as entries among all latents; without a selection [N, F]."""
    encoder, bias_F = coder.encoder(source), coder.bias(source)
    if isinstance(silent, Silent):
        selection, values = _among_all(silent, coder.n_latents)
        a = gathered_linear(x_ND, encoder.W_enc, bias_F, values, selection, coder.kernels, encoder.sink)
        return torch.relu(a), selection
    assert silent is None, "the encoder of a joint AuxK lists its dead latents' codes"
    a_Nn = F.linear(x_ND, encoder.W_enc[dead.latents], bias_F[dead.latents])
    every = torch.arange(dead.latents.shape[0], device=a_Nn.device)
    kept_Nn = plain_silent(a_Nn.detach(), every, coder.spec.resolved_aux_k)
    return torch.zeros_like(x_ND[:, :1]).expand(-1, coder.n_latents).index_add(1, dead.latents, a_Nn * kept_Nn), None


def _among_all(silent: Silent, width: int) -> tuple[Selection, Tensor]:
    """The entries and values of dead latents' codes, with latents counted among all."""
    chosen, values = silent.selection, silent.values
    latents = silent.latents.index_select(0, chosen.latents)
    if silent.number is None:
        return Selection(latents, chosen.offsets, width), values
    ordered = latents.view(chosen.tokens, -1).sort(dim=1)  # as many for every token; those without a code have value 0
    starts = torch.arange(0, chosen.tokens * width, width, device=latents.device)
    positions = (ordered.values + starts[:, None]).view(-1)
    return Padded(positions, chosen.tokens, width), values.view(chosen.tokens, -1).gather(1, ordered.indices).view(-1)
