"""TopK and GroupMax dictionaries as ones with a threshold, for tools that know nothing else.

One threshold per source: the ⌊k·N⌋-th largest positive pre-activation over N training rows, exactly, so that k latents
of a token exceed it on average (train/calibrate.py finds it for BatchTopK the same way). That is another dictionary:
tokens no longer have k active latents each. What it costs is measured on held-out rows before and after, and both
figures travel with the file.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted, StopFlag
from thresher.cache.source import Source
from thresher.interop.canonical import Canonical, codes, decoded, firing_of
from thresher.interop.formats import Reading
from thresher.interop.readings import measure, rows_of
from thresher.train.calibrate import RankSearch, passes

ROWS = 1 << 18
"""Training rows to calibrate over, where nobody says how many."""
COUNTED = ("topk", "groupmax")


class Calibrated(NamedTuple):
    """A dictionary that got thresholds, with what that changed."""

    dictionary: Canonical
    """Fires by thresholds."""
    facts: dict[str, Any]
    """JSON values: `was` (topk or groupmax), `k`, `rows` (calibrated over), `thresholds` by source, and `before` and
    `after` with `fvu` and `l0` on held-out rows."""


def thresholded(dictionary: Canonical, source: Source, rows: int = ROWS, stop: StopFlag | None = None) -> Calibrated:
    """Thresholds for a dictionary that counts, from up to `rows` training rows of the cache it was trained on.

    Raises UserError for one that does not count and for sites the cache does not have, Interrupted on a stop.
    """
    if dictionary.firing not in COUNTED or dictionary.k is None:
        raise UserError(
            f"{dictionary.name} fires by {dictionary.firing}, so --thresholds has nothing to calibrate; expected one "
            f"of {', '.join(COUNTED)}. Leave --thresholds out."
        )
    if rows < 1:
        raise UserError(f"--thresholds is {rows} rows; expected 1 or more.")
    sites = list(dict.fromkeys(dictionary.reads + dictionary.writes))
    for site in sites:
        source.site(site)
    found, seen = _calibrated(dictionary, source, rows, stop or StopFlag())
    thetas = [torch.full_like(part.b_enc, theta) for part, theta in zip(dictionary.sources, found, strict=True)]
    after = dictionary._replace(
        firing=firing_of(thetas),
        k=None,
        sources=tuple(part._replace(threshold=t) for part, t in zip(dictionary.sources, thetas, strict=True)),
    )
    acts = rows_of(source, sites)
    means = [torch.from_numpy(source.statistics(site).mean.copy()).double() for site in dictionary.writes]
    figures = [measure(_itself(each), acts, means) for each in (dictionary, after)]
    before, now = ({"fvu": one.fvu, "l0": one.l0} for one in figures)
    facts = {"was": dictionary.firing, "k": dictionary.k, "rows": seen, "thresholds": found}
    return Calibrated(after, {**facts, "before": before, "after": now})


def _calibrated(dictionary: Canonical, source: Source, rows: int, stop: StopFlag) -> tuple[list[float], int]:
    """Threshold of each source, and rows it is of: float32 pre-activations, as the written weights make them."""
    searches = {s: RankSearch(float(dictionary.k or 0)) for s in range(len(dictionary.sources))}
    weights = [(part.W_enc.float(), part.b_enc.float()) for part in dictionary.sources]
    found: dict[int, float] = {}
    seen = 0
    while searches:
        wanted = [dictionary.reads[s] for s in searches]
        for acts in passes(source, "train", wanted, rows, torch.device("cpu"), stop):
            for s, search in searches.items():
                search.add(torch.addmm(weights[s][1], acts[dictionary.reads[s]], weights[s][0].T))
        if stop.requested:
            raise Interrupted("Stopped while thresholds were calibrated; nothing was written.")
        for s, search in list(searches.items()):
            theta, seen = search.result(), search.rows
            if theta is not None:
                found[s] = theta
                del searches[s]
    return [found[s] for s in sorted(found)], seen


def _itself(dictionary: Canonical) -> Reading:
    """A reading that is its own canonical form."""

    def forward(xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        z = [codes(dictionary, s, x) for s, x in enumerate(xs)]
        return z, decoded(dictionary, z, xs)

    return Reading("", dictionary, forward)
