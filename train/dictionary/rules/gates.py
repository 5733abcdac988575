"""Gates of a decomposition, as a firing rule: a component is active where its gate exceeds a constant."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.train.dictionary.rules.base import Rule
from thresher.train.dictionary.rules.registry import register

if TYPE_CHECKING:
    from thresher.train.dictionary.spec import DictionarySpec


@register
class Gate(Rule):
    """Active where γ > t (`gate_threshold`), with the code 1; what γ is: dictionary/decomposition.py."""

    name = "gate"
    penalties = ("minimality",)
    thresholded = False

    def __init__(self, spec: "DictionarySpec") -> None:
        super().__init__(spec)
        self.limit = spec.gate_threshold

    @classmethod
    def check(cls, settings: Any) -> None:
        """Raise UserError for any topology but the one that has gates."""
        super().check(settings)
        if settings.kind != "decomposition":
            raise UserError(
                f"dictionary.firing is 'gate' for kind = {settings.kind!r}, but only a decomposition has gates of its "
                "own. Choose another rule, or set kind = 'decomposition'."
            )

    def thresholds(self) -> Tensor:
        """[C] t."""
        return torch.full((self.width,), self.limit)
