"""Targets that one device cannot hold: their modules lie on several, by transformers' device maps.

transformers and accelerate place the weights and move tensors between devices as they pass from module to module; what
they keep on the CPU or on the disk is brought to a device for its turn. Here is only what that means for us: where
inputs go, and which settings make sense. Several processes that hold one target together: company.py.
"""

import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from thresher.cache.errors import UserError
from thresher.cache.world import from_environment

WHOLE = "none"
NAMED = (WHOLE, "auto", "balanced", "balanced_low_0", "sequential")


def check_map(device_map: str | Mapping[str, str | int]) -> None:
    """Raise UserError for a map that is neither named nor a table."""
    if isinstance(device_map, str) and device_map not in NAMED:
        raise UserError(
            f"target.device_map is {device_map!r}; expected one of {', '.join(NAMED)}, or a table of modules and "
            'their devices, such as {"model.layers.0" = "cpu", "model.layers.1" = 0}.'
        )
    if not device_map:
        raise UserError("target.device_map is empty; expected modules and their devices. Leave it out for one device.")


def settings(device_map: str | Mapping[str, str | int]) -> dict[str, Any]:
    """What `from_pretrained` is told, besides the rest; nothing for a model that is loaded whole.

    Raises UserError for a named map under several processes, which would all spread over the same GPUs.
    """
    if device_map == WHOLE:
        return {}
    world = from_environment()
    if isinstance(device_map, str) and not world.alone and torch.cuda.is_available():
        raise UserError(
            f"target.device_map = {device_map!r} spreads the target over every GPU that a process sees, and this job "
            f"has {world.size} processes. Run one, or independent jobs with CUDA_VISIBLE_DEVICES of their own."
        )
    return {
        "device_map": device_map if isinstance(device_map, str) else dict(device_map),
        "offload_folder": tempfile.mkdtemp(prefix="thresher-offload-"),
    }


def is_spread(model: Any) -> bool:
    """Whether accelerate moves tensors about as a model runs."""
    return hasattr(model, "_hf_hook") or any(hasattr(module, "_hf_hook") for module in model.modules())


def first_device(model: Any) -> torch.device:
    """Where a model's inputs go."""
    embedding = model.get_input_embeddings()
    place = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if place is None else torch.device(place)
