"""How loss depends on where in the context a token stands, by buckets of the source position."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from thresher.evaluate.arms import CLEAN, CLEAN_SINGLE
from thresher.evaluate.masks import Scored
from thresher.evaluate.metrics import finite_or_none
from thresher.evaluate.tally import Tally


class Buckets(NamedTuple):
    """Source positions together, and how many tokens are scored there."""

    first: np.ndarray
    """[P]"""
    last: np.ndarray
    """[P] inclusive."""
    tokens: np.ndarray
    """[P]"""
    tokens_single: np.ndarray
    """[P] in the rows that `single_site` was run on."""


def buckets_of(scored: Scored, tally: Tally) -> Buckets:
    """The buckets of a text."""
    edges, length = scored.bucket_edges, scored.score.shape[1]
    last = np.append(edges[1:], length) - 1
    single = np.isin(scored.rows, tally.single_rows)

    def count(score: np.ndarray) -> np.ndarray:
        return np.add.reduceat(score.sum(axis=0), edges)

    return Buckets(edges, last, count(scored.score), count(scored.score[single]))


def positions(
    tally: Tally, labels: Sequence[str], protocol: str, buckets: Buckets, l0_P: Tensor | None = None
) -> dict[str, list[float | None]]:
    """CE, δ, KL and, where it is counted, L0 of an arm by bucket of the source position."""
    tokens = buckets.tokens_single if protocol == "single_site" else buckets.tokens
    every = tally.positions
    if any(label not in every for label in labels):
        return {}
    arm = np.mean([every[label].cpu().numpy() for label in labels], axis=0)
    clean = every[CLEAN_SINGLE if protocol == "single_site" else CLEAN].cpu().numpy()
    out: dict[str, list[float | None]] = {"first": _floats(buckets.first), "last": _floats(buckets.last)}
    out["tokens"] = _floats(tokens)
    with np.errstate(divide="ignore", invalid="ignore"):
        out["ce"] = _floats(arm[:, 0] / tokens)
        out["delta"] = _floats((arm[:, 0] - clean[:, 0]) / tokens)
        out["kl"] = _floats(arm[:, 1] / tokens)
        if l0_P is not None:
            out["l0"] = _floats(l0_P.cpu().numpy() / buckets.tokens)
    return out


def _floats(values: np.ndarray) -> list[float | None]:
    return [finite_or_none(float(value)) for value in values]
