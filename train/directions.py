"""A trained dictionary's weights as directions, for comparison with what a toy model is known to compute."""

import torch

from thresher.cache.contracts import Directions
from thresher.train.dictionary.coder import Coder


@torch.no_grad()
def directions(coder: Coder) -> list[Directions]:
    """By source; [] for a topology whose latents have no decoder rows of one site each (molt, crosscoder)."""
    if coder.spec.kind not in ("sae", "transcoder", "clt") or coder.spec.normalise.startswith("per_token"):
        return []
    out = []
    for source in range(len(coder.inputs)):
        written = list(coder.written(source))
        rows_FTE = coder.W_dec[source].detach().double().cpu()
        decoder = {coder.writes[site]: rows_FTE[:, i] for i, site in enumerate(written)}
        skip = {}
        if coder.W_skip is not None:
            skip = {coder.writes[source]: coder.W_skip[source].detach().double().cpu()}
        out.append(Directions(coder.encoder(source).W_enc.detach().double().cpu(), decoder, skip))
    return out
