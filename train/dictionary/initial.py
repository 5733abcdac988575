"""Initial weights.

- SAE: decoder rows are random directions of norm 1, the encoder starts as their transpose and goes its own way.
- Transcoder: encoder uniform in ±1/√d_in, decoder zero, so that it starts as the mean and no random writing has to be
  unlearned. Input and output spaces differ: nothing is tied.
- CLT: encoder uniform in ±1/√F, decoder uniform in ±1/√(L·d_out).
- Decoder biases start at the destinations' means. Encoder biases start such that the encoder sees centred inputs
  (unless a pre-bias already does that).
- JumpReLU's threshold and window are set in standard deviations of the pre-activations so found, on sample rows.

Every source draws from its own generator, keyed by seed, topology and site: no global state is touched, layers differ,
and dictionaries of a sweep that differ only in sparsity start from the same weights.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.train.dictionary.coder import Coder
from thresher.train.normalise import Affine


def generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the names, and on nothing else."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def initialise(
    coder: Coder, seed: int, reads: Sequence[Affine], writes: Sequence[Affine], samples: Sequence[Tensor]
) -> None:
    """Set all weights. `samples` are rows [n, D] of every source in training space."""
    spec = coder.spec
    for destination, site in enumerate(writes):
        coder.b_dec[destination] = site.mean.to(coder.b_dec)
    for source, name in enumerate(spec.reads):
        rng = generator(seed, spec.kind, name)
        encoder, W_dec = coder.encoder(source), coder.W_dec[source]
        if spec.kind == "sae":
            rows = torch.nn.functional.normalize(torch.randn(spec.n_latents, spec.d_out, generator=rng), dim=1)
            W_dec.copy_(rows[:, None])
            encoder.W_enc.copy_(rows)
        else:
            encoder.W_enc.copy_(_uniform(encoder.W_enc.shape, _encoder_bound(coder), rng))
            if spec.kind == "clt" or spec.unit_norm or spec.rank_by == "norm":  # rows of 0 would never be chosen
                W_dec.copy_(_uniform(W_dec.shape, (len(spec.writes) * spec.d_out) ** -0.5, rng))
        if spec.unit_norm:
            W_dec.div_(coder.decoder_norm(source)[:, None, None])
        if not spec.pre_bias:
            encoder.b_enc.copy_(-(encoder.W_enc @ reads[source].mean.to(encoder.W_enc)))
        a_NF = encoder.preactivations(samples[source], coder.bias(source))
        encoder.rule.start(float(a_NF.var(0).mean().sqrt()), encoder.b_enc)


def _encoder_bound(coder: Coder) -> float:
    spec = coder.spec
    return (spec.n_latents if spec.kind == "clt" else spec.d_in) ** -0.5


def _uniform(shape: torch.Size, bound: float, rng: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=rng) * 2 - 1) * bound
