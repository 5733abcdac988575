"""All ledgers of one evaluation, and the keys under which their sums are kept.

A key names everything that the sums depend on, and nothing else: how the text was cut into batches moves only the last
bits, so it is no part of one.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from thresher.cache.contracts import Target
from thresher.cache.records import fingerprint
from thresher.evaluate import splice
from thresher.evaluate.arms import CLEAN, IDENTITY, Plan, ablations, means_of, protocols_of
from thresher.evaluate.checks import Replacement
from thresher.evaluate.ledger import Ledger
from thresher.evaluate.masks import Scored, spread
from thresher.evaluate.metrics import TargetSums

SUMS_VERSION = 1
"""Of what is summed and how: to be raised when any of it changes, so that older sums are not taken up."""


class Tally:
    """Everything summed over the text so far."""

    def __init__(
        self,
        scored: Scored,
        replacements: Sequence[Replacement],
        target: Target,
        plan: Plan,
        norms: Mapping[str, float],
    ) -> None:
        """Empty ledgers; `norms`: by site, the norm above which a row is an outlier."""
        self.segments, self.buckets = len(scored.segment_row), len(scored.bucket_edges)
        self.device, self.plan, self.norms = target.device, plan, norms
        self.single_rows = scored.rows[single_rows(scored, plan)]
        base = {
            "version": SUMS_VERSION,
            "target": dict(target.identity),
            "dtype": str(target.dtype),
            "device": target.device.type,
            "text": scored.facts["sha256"],
            "masks": [scored.facts["patch_rule"], scored.facts["score_rule"]],
            "single_rows": self.single_rows.tolist(),
        }
        self._base = base
        written = list(dict.fromkeys(site for r in replacements for site in means_of(r)))
        names = [CLEAN, *([IDENTITY] if "identity" in plan.arms else []), *ablations(replacements, plan)]
        self.arms = {
            name: Ledger(name, self._key(arm=name, sites=written if name == IDENTITY else [])) for name in names
        }
        self.truth = {site: Ledger(site, self._key(truth=site, outlier=norms.get(site))) for site in written}
        self.own = {r.name: Ledger(r.name, self._own_key(r)) for r in replacements}

    def _key(self, **what: Any) -> str:
        return fingerprint(self._base | what)[:40]

    def _own_key(self, replacement: Replacement) -> str | None:
        if replacement.content is None:
            return None
        sites = list(means_of(replacement))
        return self._key(
            content=replacement.content,
            name=replacement.name,
            dictionaries=[d.name for d in replacement.dictionaries],
            reads=splice.reads(replacement.dictionaries),
            sites=sites,
            outliers={site: self.norms.get(site) for site in sites},
            protocols=list(protocols_of(replacement, self.plan.protocols)),
            error_added="error_added" in self.plan.arms,
        )

    def ledgers(self) -> Iterator[Ledger]:
        """All of them."""
        yield from self.arms.values()
        yield from self.truth.values()
        yield from self.own.values()

    @property
    def language(self) -> dict[str, Tensor]:
        """[G, 4] by arm label, of all arms."""
        return {label: sums for ledger in self.ledgers() for label, sums in ledger.language.items()}

    @property
    def positions(self) -> dict[str, Tensor]:
        """[P, 4] by arm label, of all arms."""
        return {label: sums for ledger in self.ledgers() for label, sums in ledger.positions.items()}

    def true(self, site: str, group: str) -> TargetSums:
        """Moments of a site's true values in a group of rows; empty if there are none."""
        return self.truth[site].truth.get((site, group), TargetSums())


def single_rows(scored: Scored, plan: Plan) -> np.ndarray:
    """Indices of the evaluated rows on which `single_site` runs."""
    if "single_site" not in plan.protocols:
        return np.zeros(0, dtype=np.int64)
    return spread(len(scored.rows), round(plan.single_site_share * len(scored.rows)))
