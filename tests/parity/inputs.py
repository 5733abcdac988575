"""The rows on which a dictionary of ours and the foreign object made of its export are compared (acceptance rule).

    0            an outlier at position 0: the first cached row, forty times as long
    RANDOM       4,096 random rows with the site's mean and scale in every dimension
    CACHED       4,096 cached rows of the test split, which was not trained on
    ZERO         a row of zeros
    SILENT       last in its sequence, a row that fires nothing, where the dictionary has one

A block of rows is judged against its own largest value, so that the outlier makes no room for the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.reader import CacheReader
from thresher.train.dictionary.coder import Coder

COUNT = 4096
BLOCKS = {
    "outlier": slice(0, 1),
    "random": slice(1, 1 + COUNT),
    "cached": slice(1 + COUNT, 1 + 2 * COUNT),
    "zero": slice(1 + 2 * COUNT, 2 + 2 * COUNT),
    "silent": slice(2 + 2 * COUNT, 3 + 2 * COUNT),
}


class Rows(NamedTuple):
    """What is encoded."""

    x: Tensor
    """[S, N, D] float32, S the sources."""
    silent: bool
    """Whether every source has its row that fires nothing; if one has none, that block is left out of all."""

    @property
    def blocks(self) -> dict[str, slice]:
        """The blocks that are there."""
        return {name: rows for name, rows in BLOCKS.items() if name != "silent" or self.silent}


def rows_for(cache: CacheReader, dictionaries: Sequence[Coder]) -> Rows:
    """Rows for all sources of a dictionary, or of the layers of a set."""
    sources = [(coder, index) for coder in dictionaries for index in range(len(coder.inputs))]
    rng = np.random.default_rng(0)
    held_out = cache.sample("test", COUNT)
    parts, quiet = [], []
    for coder, index in sources:
        [site] = coder.inputs[index]
        statistics = cache.statistics(site)
        mean_D, scale_D = np.asarray(statistics.mean), np.sqrt(np.asarray(statistics.variance))
        random_ND = torch.from_numpy(rng.standard_normal((COUNT, len(mean_D))) * scale_D + mean_D)
        cached_ND = cache.gather("test", site, held_out).double()
        silent_D = silent_row(coder, index, torch.from_numpy(mean_D))
        last = torch.zeros_like(cached_ND[:1]) if silent_D is None else silent_D[None]
        quiet.append(silent_D is not None)
        parts.append(torch.cat([40 * cached_ND[:1], random_ND, cached_ND, torch.zeros_like(last), last]).float())
    silent = all(quiet)
    x_SND = torch.stack(parts)
    return Rows(x_SND if silent else x_SND[:, :-1], silent)


def silent_row(coder: Coder, source: int, mean_D: Tensor) -> Tensor | None:
    """[D] a row on which no latent of a source fires, by descent from the mean on Σ relu(pre − θ + margin)²; None where
    none was found."""
    encoder = coder.encoder(source)
    thresholds = encoder.rule.thresholds()
    W_enc, b_enc = encoder.W_enc.double(), encoder.b_enc.double()
    theta_F = torch.zeros_like(b_enc) if thresholds is None else thresholds.double()
    alive = torch.isfinite(theta_F)
    W_enc, bar_F = W_enc[alive], (theta_F - b_enc)[alive]
    margin = 1e-3 * W_enc.norm(dim=1)
    x_D = mean_D.double().clone().requires_grad_()
    optimiser = torch.optim.Adam([x_D], lr=0.02 * float(mean_D.abs().mean() + 1))
    for _ in range(3000):
        over = (W_enc @ x_D - bar_F + margin).clamp_min(0)
        if not over.any():
            row_D = x_D.detach().float()
            return row_D.double() if not coder.encode(source, row_D[None].to(coder.b_dec.dtype)).l0().any() else None
        optimiser.zero_grad()
        over.square().sum().backward()
        optimiser.step()
    return None
