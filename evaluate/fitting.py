"""What an evaluation learns from training rows, in one pass over an evenly spaced sample of them: the best affine map
from what a dictionary reads to what it writes, and the token norm above which a token counts as an outlier.

B = C_vu (C_uu + λ I)⁻¹, c = v̄ - B ū with λ = 1e-6 · tr(C_uu)/D: least squares with a ridge that only matters where u
does not vary. Moments are float64 sums of centred products, merged as in parallel variance, so the result does not
depend on how rows are cut into batches. They take 8 (D² + D E) bytes a pair, on the target's device.

Only patched positions count (cache/patching.py), as in everything that the fitted maps stand beside.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.contracts import Site, Target
from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.patching import patch_mask, places, read_rows
from thresher.evaluate.baselines import Affine, Pair
from thresher.evaluate.masks import choose_rows, text_hash

RIDGE = 1e-6
"""λ in units of the mean variance of an entry of u."""
OUTLIER_QUANTILE = 0.999
"""Share of training tokens whose norm an outlier's exceeds."""
TOKENS = 65_536
"""Training tokens fitted on. Of a map that reads D entries the error on new tokens is about 1 + D / tokens times the
least possible: 1.2 % above it for D = 768, 6 % for D = 4096."""


_PARTS = ("weight_ED", "bias_E", "mean_E")


class Fitted(NamedTuple):
    """What training rows say."""

    affine: dict[Pair, Affine]
    outlier_norm: dict[str, float]
    """By site: the 99.9th percentile of the token norm, between neighbours linearly."""
    facts: dict[str, object]
    """Which rows, how many tokens, their hash, λ: JSON values for the provenance."""


def arrays(fitted: Fitted) -> dict[str, np.ndarray]:
    """All of it as arrays by name, to be kept."""
    words = {"pairs": [list(pair) for pair in fitted.affine], "norms": fitted.outlier_norm, "facts": fitted.facts}
    out = {"words": np.frombuffer(json.dumps(words).encode(), dtype=np.uint8)}
    for index, affine in enumerate(fitted.affine.values()):
        for part in _PARTS:
            out[f"{index}.{part}"] = getattr(affine, part).cpu().numpy()
    return out


def restored(kept: Mapping[str, np.ndarray], device: torch.device) -> Fitted:
    """What `arrays` was given."""
    words = json.loads(kept["words"].tobytes())
    affine = {}
    for index, names in enumerate(words["pairs"]):
        weight_ED, bias_E, mean_E = (torch.from_numpy(kept[f"{index}.{part}"]).to(device) for part in _PARTS)
        affine[Pair(*names)] = Affine(Pair(*names), weight_ED, bias_E, mean_E)
    return Fitted(affine, words["norms"], words["facts"])


class Moments:
    """Means and summed centred products of rows u [N, D] and v [N, E]."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_D = self.mean_E = self.uu_DD = self.uv_DE = torch.empty(0)

    def add(self, u_ND: Tensor, v_NE: Tensor) -> None:
        """Take in N more rows."""
        rows = u_ND.shape[0]
        if rows == 0:
            return
        u_ND, v_NE = u_ND.double(), v_NE.double()
        mean_D, mean_E = u_ND.mean(0), v_NE.mean(0)
        u_ND, v_NE = u_ND - mean_D, v_NE - mean_E
        if self.count == 0:
            self.count, self.mean_D, self.mean_E = rows, mean_D, mean_E
            self.uu_DD, self.uv_DE = u_ND.T @ u_ND, u_ND.T @ v_NE
            return
        total = self.count + rows
        shift_D, shift_E, weight = mean_D - self.mean_D, mean_E - self.mean_E, self.count * rows / total
        self.uu_DD.addmm_(u_ND.T, u_ND).addr_(shift_D, shift_D, alpha=weight)
        self.uv_DE.addmm_(u_ND.T, v_NE).addr_(shift_D, shift_E, alpha=weight)
        self.mean_D = self.mean_D + shift_D * (rows / total)
        self.mean_E = self.mean_E + shift_E * (rows / total)
        self.count = total

    def affine(self, pair: Pair) -> Affine:
        """The least-squares map of the rows taken in; B = 0 where u never varies."""
        variance = float(self.uu_DD.trace()) / self.count / len(self.mean_D)
        if variance == 0:
            return Affine(pair, torch.zeros_like(self.uv_DE.T), self.mean_E, self.mean_E)
        ridge_DD = torch.eye(len(self.mean_D), dtype=torch.float64, device=self.mean_D.device) * (RIDGE * variance)
        factor_DD = torch.linalg.cholesky(self.uu_DD / self.count + ridge_DD)
        weight_ED = torch.cholesky_solve(self.uv_DE / self.count, factor_DD).T.contiguous()
        return Affine(pair, weight_ED, self.mean_E - weight_ED @ self.mean_D, self.mean_E)


def fit(
    target: Target,
    contexts: Contexts,
    pairs: Sequence[Pair],
    sites: Sequence[str],
    *,
    tokens: int = TOKENS,
    batch_contexts: int = 8,
) -> Fitted:
    """Fit an affine map to every pair and find the outlier norm of every site, on training contexts.

    Evenly spaced rows with about `tokens` patched positions are run; 0, or more than there are, takes all rows. Raises
    UserError for contexts without a patched position, and naming the site for values that are not finite.
    """
    names = dict.fromkeys([*sites, *(site for pair in pairs for site in pair)])
    if not names:
        return Fitted({}, {}, {})
    chosen = _sample(contexts, tokens)
    moments = {pair: Moments() for pair in pairs}
    norms: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        for rows in _recorded(target, chosen, target.sites(list(names)), batch_contexts):
            for name, x_ND in rows.items():
                norms[name].append(x_ND.double().norm(dim=1).float())
            for pair, sums in moments.items():
                sums.add(rows[pair.read], rows[pair.written])
        measured = {name: torch.cat(parts).cpu().numpy() for name, parts in norms.items()}
        _refuse_infinite(measured, target)
        affine = {pair: sums.affine(pair) for pair, sums in moments.items()}
    facts: dict[str, object] = {
        "rows": len(chosen.token_id),
        "tokens": int(patch_mask(chosen).sum()),
        "sha256": text_hash(chosen),
        "ridge": RIDGE,
        "outlier_quantile": OUTLIER_QUANTILE,
    }
    return Fitted(affine, {name: float(np.quantile(measured[name], OUTLIER_QUANTILE)) for name in sites}, facts)


def _sample(contexts: Contexts, tokens: int) -> Contexts:
    per_row = patch_mask(contexts).sum(axis=1)
    if per_row.sum() == 0:
        raise UserError(
            f"The training contexts ({contexts.token_id.shape[0]} rows of {contexts.token_id.shape[1]} tokens) hold no "
            "position that is patched, so no baseline can be fitted: expected at least one kept token behind the first "
            "of its row. Give more training text, or longer contexts."
        )
    rows = choose_rows(per_row, tokens)
    return Contexts(contexts.token_id[rows], contexts.document_id[rows], contexts.keep[rows])


def _recorded(
    target: Target, contexts: Contexts, sites: Sequence[Site], batch_contexts: int
) -> Iterator[dict[str, Tensor]]:
    """Patched positions [N, D] by site, a batch of rows at a time."""
    patch = patch_mask(contexts)
    for start in range(0, len(patch), batch_contexts):
        here = slice(start, start + batch_contexts)
        token_BT = torch.from_numpy(contexts.token_id[here].astype(np.int64)).to(target.device)
        patch_BT = torch.from_numpy(patch[here]).to(target.device)
        places_N = places(patch_BT)
        yield {name: read_rows(x_BTD, places_N) for name, x_BTD in target.record(token_BT, sites).items()}


def _refuse_infinite(norms: dict[str, np.ndarray], target: Target) -> None:
    for name, norm_N in norms.items():
        bad = int((~np.isfinite(norm_N)).sum())
        if bad:
            raise UserError(
                f"The target {target.name!r} gives values at {name!r} that are not finite numbers, on {bad} of "
                f"{len(norm_N)} training tokens. A baseline fitted to them would be meaningless. Evaluate the target "
                "in float32 if its dtype overflows, or check its weights."
            )
