"""What a replacement costs per token, on three axes that rank topologies differently.

From what a dictionary says its latents bring into play, so all topologies share one formula: a latent of an SAE or a
transcoder its encoder and decoder row, a transform of a MoLT its gate's row and both factors. A skip connection is used
on every token, so all of it counts. The target's own neurons are counted like the latents of a transcoder. Biases are
ignored.
"""

from collections.abc import Sequence

import numpy as np

from thresher.cache.contracts import Dictionary

AXES = ("l0", "active_per_mlp", "active_parameters")


def costs(
    dictionaries: Sequence[Dictionary], l0: Sequence[Sequence[float]], used: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Cost by axis, from the mean L0 and the mean weights used per token of every source of every dictionary.

    - `l0`: active latents per source, averaged over sources.
    - `active_per_mlp`: active latents that a reconstruction sums over, averaged over written sites; a latent that
      writes to several sites counts in each.
    - `active_parameters`: weights of the active latents (`Dictionary.latent_costs`) and of what is always active,
      summed.
    """
    per_source, per_destination, parameters = [], [], 0.0
    for dictionary, own, weights in zip(dictionaries, l0, used, strict=True):
        per_source += list(own)
        per_destination += [sum(own[s] for s in dictionary.sources(j)) for j in range(len(dictionary.writes))]
        parameters += sum(weights) + dictionary.fixed_cost
    return {
        "l0": float(np.mean(per_source)),
        "active_per_mlp": float(np.mean(per_destination)),
        "active_parameters": float(parameters),
    }


def neuron_costs(k: int, widths: Sequence[tuple[int, int]], *, gated: bool) -> dict[str, float]:
    """Cost by axis of the k largest neurons of every MLP; `widths` holds what each MLP reads and writes.

    A neuron has a row of input weights, two where it is `gated`, and a row of output weights.
    """
    rows = sum((2 if gated else 1) * d_in + d_out for d_in, d_out in widths)
    return {"l0": float(k), "active_per_mlp": float(k), "active_parameters": float(k * rows)}
