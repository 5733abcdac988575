"""What an evaluation sums, in parts that can be computed, stored and taken up again each by itself.

One ledger holds the sums of one thing: a replacement, an arm that replacements share, or the true values of a site. It
knows how many batches it has taken in, so that an interrupted evaluation goes on where it was, and a key that names
everything its sums depend on, so that an unchanged one is never computed twice. Sums are named by tuples; `arrays` and
`load` turn them into plain arrays and back.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thresher.evaluate.metrics import SUMS, CodeSums, ReconstructionSums, TargetSums

PATCHED, FIRST, SPECIAL, OUTLIERS = "patched", "first", "special", "outliers"
"""Groups of rows of a site: P, first positions of rows, other special ones, and those rows of P whose true value has an
outlying norm."""
BESIDE = (FIRST, SPECIAL)
"""Those outside P."""

_STRUCTURES = {"truth": TargetSums, "reconstruction": ReconstructionSums, "codes": CodeSums}


@dataclass
class Ledger:
    """The sums of one part of an evaluation."""

    name: str
    key: str | None = None
    """Fingerprint of everything the sums depend on; None: unknown, so they are not kept."""
    done: int = 0
    """Batches taken in."""
    language: dict[str, Tensor] = field(default_factory=dict)
    """[G, 4] float64 by arm label; columns as in `metrics.SUMS`."""
    positions: dict[str, Tensor] = field(default_factory=dict)
    """[P, 4] float64 by arm label: the same by bucket of the source position."""
    counts: dict[str, Tensor] = field(default_factory=dict)
    """Sums by name: `total_l0` [n + 1] tokens by active latents over all sources, `segment_l0` [G] and `position_l0`
    [P] active latents over scored positions, `cascade_l0` [] over patched positions of the patched stream,
    `compat|SITE` [4]: `compat.COMPAT` summed over batches, and batches."""
    truth: dict[tuple[str, str], TargetSums] = field(default_factory=dict)
    """By site and group."""
    reconstruction: dict[tuple[str, str], ReconstructionSums] = field(default_factory=dict)
    """By site and group, on clean inputs."""
    codes: dict[tuple[int, int], CodeSums] = field(default_factory=dict)
    """By dictionary and source, on clean inputs."""

    def add_scores(
        self, label: str, scores_N4: Tensor, segment_N: Tensor, segments: int, bucket_N: Tensor, buckets: int
    ) -> None:
        """Sum per-token scores of an arm into its segments and buckets."""
        _add(self.language, label, scores_N4, segment_N, segments)
        _add(self.positions, label, scores_N4, bucket_N, buckets)

    def add_positions(self, label: str, scores_N4: Tensor, bucket_N: Tensor, buckets: int) -> None:
        """Sum per-token scores into buckets alone."""
        _add(self.positions, label, scores_N4, bucket_N, buckets)

    def count(self, name: str, value: Tensor) -> None:
        """Add to one of `counts`."""
        self.counts[name] = self.counts[name] + value if name in self.counts else value

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays by a JSON name."""
        out: dict[str, np.ndarray] = {}
        for part in ("language", "positions", "counts"):
            out |= {json.dumps([part, name]): value.cpu().numpy() for name, value in getattr(self, part).items()}
        for part in _STRUCTURES:
            for name, sums in getattr(self, part).items():
                out |= {json.dumps([part, list(name), key]): value for key, value in _state(sums).items()}
        return out

    def load(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> None:
        """Put back what `arrays` gave."""
        found: dict[tuple[str, tuple[Any, ...]], dict[str, np.ndarray]] = {}
        for text, value in arrays.items():
            part, name, *key = json.loads(text)
            if key:
                found.setdefault((part, tuple(name)), {})[key[0]] = value
            else:
                getattr(self, part)[name] = torch.from_numpy(value).to(device)
        for (part, name), state in found.items():
            getattr(self, part)[name] = _restored(_STRUCTURES[part], state, device)


def _add(sums: dict[str, Tensor], label: str, scores_N4: Tensor, index_N: Tensor, size: int) -> None:
    if label not in sums:
        sums[label] = torch.zeros(size, len(SUMS), dtype=torch.float64, device=scores_N4.device)
    sums[label].index_add_(0, index_N, scores_N4)


def _state(sums: Any) -> dict[str, np.ndarray]:
    """The fields of a dataclass of sums; lists of arrays are joined."""
    out = {}
    for f in fields(sums):
        value = getattr(sums, f.name)
        if isinstance(value, list):
            out[f.name] = np.concatenate(value) if value else np.zeros(0, np.float32)
        elif value is not None:
            out[f.name] = value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return out


def _restored(kind: type, state: Mapping[str, np.ndarray], device: torch.device) -> Any:
    values: dict[str, Any] = {}
    plain = {"count": int, "tokens": int}
    for name, value in state.items():
        if name == "token_fvu":
            values[name] = [value]
        elif name in plain:
            values[name] = plain[name](value)
        elif kind is TargetSums and name == "square":
            values[name] = float(value)
        else:
            values[name] = torch.from_numpy(np.asarray(value)).to(device)
    return kind(**values)
