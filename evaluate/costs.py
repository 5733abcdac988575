"""What a replacement costs per token, on three axes that rank topologies differently.

From what a dictionary reads, writes and connects, so SAEs, transcoders and cross-layer transcoders share one formula.
The target's own neurons are counted like the latents of a transcoder. Biases are ignored, as is a dense skip
connection, which the protocols do not show.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from thresher.cache.contracts import Dictionary

AXES = ("l0", "active_per_mlp", "active_parameters")


def costs(
    dictionaries: Sequence[Dictionary], l0: Sequence[Sequence[float]], width: Mapping[str, int]
) -> dict[str, float]:
    """Cost by axis, from the mean L0 of every source of every dictionary.

    - `l0`: active latents per source, averaged over sources.
    - `active_per_mlp`: active latents that a reconstruction sums over, averaged over written sites; a latent that
      writes to several sites counts in each.
    - `active_parameters`: encoder row plus every decoder row of the active latents, summed.
    """
    per_source, per_destination, parameters = [], [], 0.0
    for dictionary, own in zip(dictionaries, l0, strict=True):
        reached = [list(dictionary.sources(j)) for j in range(len(dictionary.writes))]
        per_source += list(own)
        per_destination += [sum(own[s] for s in sources) for sources in reached]
        for s, site in enumerate(dictionary.reads):
            written = sum(width[w] for w, sources in zip(dictionary.writes, reached, strict=True) if s in sources)
            parameters += own[s] * (width[site] + written)
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
