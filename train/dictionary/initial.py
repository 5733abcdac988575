"""Initial weights.

- SAE: decoder rows are random directions of norm 1, the encoder starts as their transpose and goes its own way. A
  crosscoder likewise, with directions over all its sites together.
- Transcoder: encoder uniform in ±1/√d_in, decoder zero, so that it starts as the mean and no random writing has to be
  unlearned. Input and output spaces differ: nothing is tied. A MoLT likewise, with what its transforms write zero.
- CLT: encoder uniform in ±1/√F, decoder uniform in ±1/√(L·d_out).
- Decoder biases start at the destinations' means. Encoder biases start such that the encoder sees centred inputs
  (unless a pre-bias already does that).
- JumpReLU's threshold and window are set in standard deviations of the pre-activations so found, on sample rows.

`init_encoder`, `init_decoder`, `init_b_dec` and `init_b_enc` choose otherwise (drawing.py). A skip connection is zero.

Every source draws from its own generator, keyed by seed, topology and site: no global state is touched, layers differ,
and dictionaries of a sweep that differ only in sparsity start from the same weights.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.drawing import geometric_median
from thresher.train.normalise import Affine


def generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the names, and on nothing else."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def initialise(
    coder: Coder,
    seed: int,
    reads: Sequence[Affine],
    writes: Sequence[Affine],
    samples: Sequence[Tensor],
    targets: Sequence[Tensor] = (),
) -> None:
    """Set all weights. `samples` are rows [n, D] of every source in training space, `targets` of every destination;
    the latter may be left out where decoder biases do not start from them."""
    spec = coder.spec
    for destination, site in enumerate(writes):
        if spec.init_b_dec == "mean":
            coder.b_dec[destination] = site.mean.to(coder.b_dec)
        elif spec.init_b_dec != "zero":
            y_NE = targets[destination]
            point_E = geometric_median(y_NE) if spec.init_b_dec == "median" else y_NE.double().mean(0)
            coder.b_dec[destination] = point_E.to(coder.b_dec)
    for source, names in enumerate(coder.inputs):
        encoder = coder.encoder(source)
        coder.draw(source, generator(seed, spec.kind, *names))
        coder.constrain(source)
        if not spec.pre_bias and spec.init_b_enc == "centred":
            encoder.b_enc.copy_(-(encoder.W_enc @ reads[source].mean.to(encoder.W_enc)))
        a_NF = encoder.preactivations(samples[source], coder.bias(source))
        encoder.rule.start(deviation(coder, a_NF), encoder.b_enc)


def deviation(coder: Coder, a_NF: Tensor) -> float:
    """Standard deviation of pre-activations, from the mean of their variances; of shared latents a collective."""
    variances_F = a_NF.var(0)
    return float((variances_F if coder.holding is None else coder.holding.whole(variances_F)).mean().sqrt())
