"""From a wider code to the one it contains: of each token's entries the k largest.

Multi-TopK looks at some multiple of k entries per token. Those of the main code are among them, so one selection, one
set of pre-activations and one gradient of the encoder serve both codes.
"""

import torch
from torch import Tensor

from thresher.train.kernels.padded import Padded
from thresher.train.kernels.sparse import Selection


def narrowed(selection: Selection, values: Tensor, k: int | Tensor) -> tuple[Selection, Tensor]:
    """The k largest entries of every token, in their old order, and [N·k] int64 where they stand in `selection`.

    values [A]; every token has the same number of entries, k or more. Or k [A] says which entries those are (bool).
    """
    if isinstance(k, Tensor):
        offsets = torch.nn.functional.pad(k.cumsum(0), (1, 0)).index_select(0, selection.offsets)
        entries = torch.nonzero(k).view(-1)
        return Selection(selection.latents.index_select(0, entries), offsets, selection.width), entries
    tokens = selection.tokens
    each = values.shape[0] // max(tokens, 1)
    best = torch.topk(values.detach().view(tokens, each), k, dim=1, sorted=False).indices.sort(dim=1).values
    starts = torch.arange(0, tokens * each, max(each, 1), device=values.device)
    entries = (best + starts[:, None]).view(-1)
    if isinstance(selection, Padded):
        return Padded(selection.positions.index_select(0, entries), tokens, selection.width), entries
    offsets = torch.arange(0, tokens * k + 1, k, device=values.device)
    return Selection(selection.latents.index_select(0, entries), offsets, selection.width), entries
