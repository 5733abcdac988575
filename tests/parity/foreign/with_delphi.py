"""delphi: `LatentDataset` on a latent cache. Latents are compared as its loader gives them out: every (sequence,
position, activation) of every latent, spread over a dense code; there is no forward pass."""

import json
from pathlib import Path

import torch
from common import main
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents.loader import LatentDataset
from torch import Tensor


class NoTokenizer:
    """The loader wants one; only text, which is not looked at, would ask it."""


def load(directory: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Code [hookpoints, sequences · positions, latents] and, in the place of an output, the tokens."""
    dataset = LatentDataset(directory, SamplerConfig(), ConstructorConfig(), tokenizer=NoTokenizer())
    assert dataset.tokens is not None, "tokens lie beside the activations"
    sequences, context = dataset.tokens.shape
    assert json.loads((directory / dataset.modules[0] / "config.json").read_text())["cache_ctx_len"] == context
    modules = sorted(dataset.modules)
    code = torch.zeros(len(modules), sequences, context, x.shape[-1])
    for buffer in dataset.buffers:
        for item in buffer:
            at = item.activation_data
            code[modules.index(item.module), at.locations[:, 0], at.locations[:, 1], item.latent.latent_index] = (
                at.activations.float()
            )
    return code.flatten(1, 2), dataset.tokens.flatten().float()[:, None]


if __name__ == "__main__":
    main("eai-delphi", load)
