"""Sums of a training between two lines of its log, and the numbers of such a line."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.losses import Losses


class Window:
    """Sums on the device since the last report: nothing is read back until someone asks."""

    def __init__(self, sources: int, destinations: int, device: torch.device) -> None:
        self.steps = self.tokens = 0
        self.fvu = torch.zeros(destinations, dtype=torch.float64, device=device)
        self.active = torch.zeros(sources, dtype=torch.float64, device=device)
        self.other = torch.zeros(4, dtype=torch.float64, device=device)
        self.ratios: dict[str, Tensor] = {}
        """Numerator and denominator of further numbers, [2] by name."""

    def add_ratio(self, name: str, numerator: Tensor, denominator: float) -> None:
        """One step's share of a number that is a ratio of sums."""
        pair = torch.stack([numerator.double(), torch.full_like(numerator, denominator, dtype=torch.float64)])
        self.ratios[name] = self.ratios[name] + pair if name in self.ratios else pair

    def add(self, parts: Sequence[Losses], active: Tensor, norm: Tensor, tokens: int) -> None:
        """One step, in parts that add up; `active` [sources] entries that fired."""
        for terms in parts:
            self.fvu += terms.fvu.double() * tokens
            self.other[:2] += torch.stack([terms.aux, terms.penalty]).double()
        self.active += active
        self.other[2] += norm.double()
        self.steps += 1
        self.tokens += tokens

    def means(self) -> tuple[Tensor, Tensor]:
        """[sources] mean L0 and [destinations] mean FVU."""
        tokens = max(self.tokens, 1)
        return self.active / tokens, self.fvu / tokens

    def terms(self) -> Tensor:
        """Mean AuxK, penalty and gradient norm per step, and the share of updates left out for lack of room."""
        return self.other / max(self.steps, 1)

    def numbers(self, spec: DictionarySpec, dead: Tensor, thresholds: Tensor) -> dict[str, Any]:
        """Means over the window, and the present state; one transfer from the device.

        `dead`, `thresholds`: [sources] float64 share of dead latents and mean threshold.
        """
        sources = dead.shape[0]
        active, fvus = self.means()
        flat = torch.cat([dead, thresholds, active, fvus]).tolist()
        shares = flat[:sources]
        by_source = flat[sources : 2 * sources], flat[2 * sources : 3 * sources], flat[3 * sources :]
        theta_mean, l0, fvu = (sum(row) / len(row) for row in by_source)
        aux, penalty, norm, left_out = self.terms().tolist()
        out: dict[str, Any] = {
            "fvu": fvu,
            "l0": l0,
            "dead": sum(shares) / len(shares),
            "aux": aux,
            "penalty": penalty,
            "gradient_norm": norm,
            "left_out": left_out,
            "threshold": theta_mean,
        }
        out |= {name: (pair[0] / pair[1]).item() for name, pair in self.ratios.items()}
        if len(spec.layers) > sources:
            out |= {f"fvu.{site}": value for site, value in zip(spec.writes, by_source[2], strict=True)}
        elif sources > len(spec.layers):
            out |= {f"l0.S{source}": value for source, value in enumerate(by_source[1])}
        elif sources > 1:
            for index, layer in enumerate(spec.layers):
                per_layer = {"fvu": by_source[2][index], "l0": by_source[1][index], "dead": shares[index]}
                out |= {f"{key}.L{layer:02d}": value for key, value in per_layer.items()}
        return out
