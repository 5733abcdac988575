"""sparsify: `SparseCoder.load_from_disk`, `save_to_disk`. Rows [N, D] only; on a CPU, where its forward pass is not
autocast."""

from pathlib import Path

import torch
from common import LATENTS, WIDTH, K, inputs, keep, main, weights
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

KEYS = (
    ("encoder.weight", (LATENTS, WIDTH)),
    ("encoder.bias", (LATENTS,)),
    ("W_dec", (LATENTS, WIDTH)),
    ("b_dec", (WIDTH,)),
)
HOOKPOINT = "layers.1.mlp"
SKIP = ("W_skip", (WIDTH, WIDTH))
VARIANTS = {
    "topk": {},
    "groupmax": {"activation": "groupmax"},
    "topk-skip": {"skip_connection": True},
    "transcode": {"transcode": True},
    "transcode-groupmax": {"transcode": True, "activation": "groupmax"},
    "transcode-skip": {"transcode": True, "skip_connection": True},
}


def load(directory: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Code and output of the object that sparsify makes of a directory."""
    coder = SparseCoder.load_from_disk(directory).to(x_ND.dtype)
    with torch.no_grad():
        values_NK, latents_NK, pre_NM = coder.encode(x_ND)
        return torch.zeros_like(pre_NM).scatter_(1, latents_NK, values_NK), coder(x_ND).sae_out


def make(root: Path) -> None:
    """Directories written by `save_to_disk`, under a module path as its trainer has them."""
    for seed, (variant, settings) in enumerate(VARIANTS.items()):
        coder = SparseCoder(WIDTH, SparseCoderConfig(num_latents=LATENTS, k=K, **settings))
        coder.load_state_dict(weights(seed, *KEYS, *([SKIP] if settings.get("skip_connection") else [])))
        coder.save_to_disk(root / variant / HOOKPOINT)
        keep(root, variant, load, inputs()[0], HOOKPOINT)


if __name__ == "__main__":
    main("eai-sparsify", load, make)
