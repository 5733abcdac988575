"""Checkpoints of a language model's training: weights, AdamW's moments, place in the text, generator states, log.

One safetensors file that appears whole or not at all. A training that goes on from it ends, on a CPU, bit for bit where
it would have ended.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from thresher.cache.errors import UserError
from thresher.cache.publish import publish
from thresher.harvest.pretraining.feed import Cursor

FILE = "checkpoint.safetensors"


class Progress(NamedTuple):
    """How far a training is."""

    step: int = 0
    """Steps done."""
    cursor: Cursor = Cursor()
    loss_sum: float = 0.0
    """Of the steps since the last line of the log."""
    seconds: float = 0.0
    """Spent on steps."""


def save_checkpoint(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
    """Write the state between two steps, in the place of the one before."""
    tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        tensors |= {f"adamw.{key}.{name}": value for key, value in optimiser.state[parameter].items()}
    record = progress._asdict() | {"cursor": progress.cursor._asdict()}
    pieces = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    publish(folder / FILE, [save(pieces, metadata={"progress": json.dumps(record)})])


def load_checkpoint(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> Progress:
    """Put the saved state into a fresh model and optimiser; a `Progress` of nothing when there is none.

    Raises UserError for a file that is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return Progress()
    try:
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping, it has keys
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}). Remove {folder} to train from the beginning."
        ) from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors[f"adamw.{key}.{name}"]
                where = parameter.device if key != "step" or optimiser.defaults["fused"] else "cpu"
                optimiser.state[parameter][key] = value.to(where)
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and next(model.parameters()).device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], next(model.parameters()).device)
    return Progress(**record | {"cursor": Cursor(**record["cursor"])})
