"""The files of other tools: JSON and tensors by name, every one of them accounted for.

Formats that keep tensors in pickles are read with torch's `weights_only` loader, and NumPy archives without pickles:
neither runs code.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from thresher.cache.errors import UserError


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object. Raises UserError, saying what was expected, where there is none."""
    if not path.is_file():
        raise UserError(
            f"{path.parent} is not {what}: it holds no {path.name}. Give the directory that the tool wrote."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Restore the file.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}; expected a JSON object.")
    return found


def save_pickled(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save tensors by name as torch does, in a plain dict of tensors of their own memory, durably."""
    with path.open("wb") as handle:
        torch.save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, handle)
        handle.flush()
        os.fsync(handle.fileno())


class Stored:
    """Tensors of one file, taken one by one."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self.tensors = dict(tensors)

    @classmethod
    def safetensors(cls, path: Path) -> "Stored":
        """Raises UserError for a missing or damaged file."""
        if not path.is_file():
            raise UserError(f"{path} is missing. Give the directory that the tool wrote, with its weights.")
        try:
            return cls(path, safetensors.torch.load_file(path))
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} is no readable safetensors file ({error}). Restore it.") from error

    @classmethod
    def pickled(cls, path: Path) -> "Stored":
        """A state dict that torch saved: tensors only. Raises UserError for anything else."""
        if not path.is_file():
            raise UserError(f"{path} is missing. Give the directory that the tool wrote, with its weights.")
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{path} holds more than tensors, or is damaged ({first}). Expected a state dict."
            ) from error
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise UserError(f"{path} holds no state dict. Expected tensors by name, as the tool saves them.")
        return cls(path, found)

    @classmethod
    def npz(cls, path: Path) -> "Stored":
        """A NumPy archive of numbers. Raises UserError for anything else."""
        if not path.is_file():
            raise UserError(f"{path} is missing. Give the file that the tool wrote.")
        try:
            with np.load(path, allow_pickle=False) as archive:
                return cls(path, {name: torch.from_numpy(np.array(archive[name])) for name in archive.files})
        except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no readable archive of arrays ({error}). Restore it.") from error

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A tensor in float64, no longer among those left; `shape` with None where any size will do.

        Raises UserError where it is missing, of another shape, or not finite.
        """
        if name not in self.tensors:
            raise UserError(
                f"{self.path} has no tensor {name!r}; it holds {', '.join(sorted(self.tensors)) or 'none'}."
            )
        found = self.tensors.pop(name)
        fits = len(found.shape) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, found.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            raise UserError(f"{self.path}: {name} has shape {list(found.shape)}; expected [{wanted}].")
        if not bool(torch.isfinite(found).all()):
            raise UserError(
                f"{self.path}: {name} is not finite everywhere. The dictionary was damaged or never trained."
            )
        return found.double()

    def done(self) -> None:
        """Raise UserError when tensors are left, which would have been ignored."""
        if self.tensors:
            raise UserError(
                f"{self.path} holds tensors that the format does not know: {', '.join(sorted(self.tensors))}. It may "
                "be of a newer version of the tool, or of another one."
            )
