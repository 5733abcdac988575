"""Which tensors of a checkpoint have a row for every latent, and which of those rows are one rank's."""

import torch
from torch import Tensor

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.holding import Holding
from thresher.train.dictionary.topologies import build
from thresher.train.updates.rule import Parameters

_EXTRA = "_extra_state"


class Rows:
    """Of one rank's share of a dictionary and its optimiser's state."""

    def __init__(self, coder: Coder, holding: Holding, parameters: Parameters) -> None:
        self.holding, self.parameters = holding, parameters
        with torch.device("meta"):
            whole = build(coder.spec, coder.label)
        self._whole = whole.state_dict()
        """The state of the dictionary that all ranks hold together, tensors without content."""
        own = coder.state_dict()
        self._names = {
            name
            for name, tensor in own.items()
            if not name.endswith(_EXTRA) and tensor.shape != self._whole[name].shape
        }

    def of(self, name: str, dimensions: int) -> slice | None:
        """Rows of a tensor `model.*` or `optimiser.*` that are this rank's; None: it has all of it."""
        part, key = name.split(".", 1)
        if part == "model":
            shared = key in self._names
        else:
            shared = not self.parameters.is_replicated(self.parameters.all[int(key.split(".")[0])])
        return slice(self.holding.first, self.holding.stop) if shared and dimensions else None

    def settle(self, tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors of which these are rows.

        What a rank knows of the room that its own selections want is no part of a whole dictionary: in its place comes
        what is known at the beginning.
        """
        shapes = {}
        for name, tensor in tensors.items():
            if name.endswith(_EXTRA):
                tensors[name] = self._whole[name.removeprefix("model.")]
            elif self.of(name, tensor.dim()) is not None:
                shapes[name] = (self.holding.width, *tensor.shape[1:])
        return shapes
