"""Gemma Scope 1 and 2 files, as circuit-tracer's own readers understand them. No package writes them: they are laid out
here by hand, as published."""

from pathlib import Path

import numpy as np
import torch
from circuit_tracer.transcoder.cross_layer_transcoder import load_gemma_scope_2_clt
from circuit_tracer.transcoder.single_layer_transcoder import (
    load_gemma_scope_2_transcoder,
    load_gemma_scope_transcoder,
)
from common import LATENTS, LAYERS, WIDTH, inputs, keep, main, weights
from safetensors.torch import save_file
from torch import Tensor

KEYS = (
    ("W_enc", (WIDTH, LATENTS)),
    ("W_dec", (LATENTS, WIDTH)),
    ("b_enc", (LATENTS,)),
    ("b_dec", (WIDTH,)),
    ("threshold", (LATENTS,)),
)
LOWER = {"W_enc": "w_enc", "W_dec": "w_dec"}
CPU = torch.device("cpu")


def load(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Code and output. A directory of several files is a CLT."""
    with torch.no_grad():
        if path.is_dir():
            files = {i: str(path / f"params_layer_{i}.safetensors") for i in range(LAYERS)}
            # The reader (0.5.0) leaves out the file of the highest key: it gets one more that is never opened.
            made = load_gemma_scope_2_clt(files | {LAYERS: ""}, device=CPU, dtype=x.dtype)
            code = made.encode(x)
            return code, made.decode(code, x)
        read = load_gemma_scope_transcoder if path.suffix == ".npz" else load_gemma_scope_2_transcoder
        made = read(str(path), 1, device=CPU, dtype=x.dtype)
        code = made.encode(x)
        return code, made.decode(code, x)


def make(root: Path) -> None:
    """One npz, one safetensors file with a skip connection and one CLT."""
    folder = "layer_1/width_48/average_l0_9"
    (root / "npz" / folder).mkdir(parents=True, exist_ok=True)
    np.savez(root / "npz" / folder / "params.npz", **{name: v.numpy() for name, v in weights(1, *KEYS).items()})
    keep(root, "npz", load, inputs()[0], f"{folder}/params.npz")

    folder = "transcoder_all/layer_1_width_48_l0_small_affine"
    (root / "scope2-skip" / folder).mkdir(parents=True, exist_ok=True)
    _save(root / "scope2-skip" / folder / "params.safetensors", weights(2, *KEYS, ("skip", (WIDTH, WIDTH))))
    keep(root, "scope2-skip", load, inputs()[0], f"{folder}/params.safetensors")

    folder = "clt/width_48_l0_small"
    (root / "scope2-clt" / folder).mkdir(parents=True, exist_ok=True)
    decoders = ("W_dec", (LATENTS, LAYERS, WIDTH))
    for i in range(LAYERS):
        tensors = weights(3 + i, *(decoders if key[0] == "W_dec" else key for key in KEYS))
        _save(root / "scope2-clt" / folder / f"params_layer_{i}.safetensors", tensors)
    # Last rows that fire nothing in any layer are left out by its decode, so only rows up to the one before are kept.
    keep(root, "scope2-clt", load, inputs()[:, :-1], folder)


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    names = LOWER | {"skip": "affine_skip_connection"}
    save_file({names.get(name, name): value for name, value in tensors.items()}, path)


if __name__ == "__main__":
    main("circuit-tracer", load, make)
