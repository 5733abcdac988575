"""What every script here shares. They run in the environment of a foreign package, without Thresher.

    python with_TOOL.py load DIRECTORY INPUTS OUTPUTS …  the library's own reader and class on the rows of INPUTS
    python with_TOOL.py make DIRECTORY                   directories that the library's own code saves, one per variant
    python with_TOOL.py version                          name and version of the package

Importing such a package takes many seconds, so `load` takes any number of triples. Where one fails, what was raised is
written in the place of OUTPUTS with the suffix .error.

INPUTS is a safetensors file with `x` [N, D], or [L, N, D] where a directory holds L layers; the library computes in its
dtype. OUTPUTS gets `code` [N, M], `output` [N, E] and `l0` [N] int64 (each [L, ...] with layers).
"""

import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS, ROWS, WIDTH, LATENTS, K = 3, 24, 16, 48, 6
Load = Callable[[Path, Tensor], tuple[Tensor, Tensor]]


def main(package: str, load: Load, make: Callable[[Path], None] | None = None) -> None:
    """Carry out the command line. `load` gives code and output of the rows of a directory."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["load", *paths] if paths and len(paths) % 3 == 0:
            for directory, rows, outputs in zip(paths[::3], paths[1::3], paths[2::3], strict=True):
                try:
                    write(Path(outputs), *load(Path(directory).resolve(), load_file(rows)["x"]))
                except Exception:  # whatever a library raises of a directory, the others are still read
                    Path(outputs).with_suffix(".error").write_text(traceback.format_exc())
        case ["make", directory] if make is not None:
            make(Path(directory))
            (Path(directory) / "VERSION").write_text(f"{package} {importlib.metadata.version(package)}\n")
        case ["version"]:
            pass
        case other:
            raise SystemExit(f"{other}: expected `load DIRECTORY INPUTS OUTPUTS …`, `make DIRECTORY` or `version`")
    print(package, importlib.metadata.version(package))


@torch.no_grad()
def write(path: Path, code: Tensor, output: Tensor, **also: Tensor) -> None:
    """Save what a library computed."""
    tensors = {"code": code, "output": output, "l0": (code != 0).sum(-1), **also}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def keep(root: Path, variant: str, load: Load, x: Tensor, folder: str = "") -> None:
    """Save what the library computes of the rows x from what it wrote to ROOT/VARIANT, as VARIANT.outputs.safetensors
    beside that directory."""
    write(root / f"{variant}.outputs.safetensors", *load((root / variant / folder).resolve(), x), x=x)


def inputs() -> Tensor:
    """[L, N, D] rows with a mean; an outlier first, and last a row of zeros."""
    x_LND = _normal(1, LAYERS, ROWS, WIDTH) + 0.3
    x_LND[:, 0] *= 40
    x_LND[:, -1] = 0
    return x_LND


def weights(seed: int, *shapes: tuple[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random tensors by name: encoders and decoders with rows of different norms, encoder biases below 0 so that a row
    of zeros fires nothing, thresholds above 0."""
    out = {}
    for index, (name, shape) in enumerate(shapes):
        values = _normal(100 * seed + index, *shape)
        if name.startswith("threshold"):
            values = 0.2 + 0.3 * values.abs()
        elif len(shape) == 1:
            values = -0.1 - 0.2 * values.abs() if shape[0] == LATENTS else 0.3 * values
        out[name] = values if len(shape) == 1 else 0.3 * values
    return out


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite a JSON file."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
