"""dictionary_learning: `load_dictionary`; dictionaries are saved as its training loop does, by torch.save of the state
dict beside config.json."""

import json
from pathlib import Path

import torch
from common import LATENTS, WIDTH, K, inputs, keep, main, weights
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from torch import Tensor

GROUPS = [12, 36]
VARIANTS = {
    "AutoEncoder": (lambda: AutoEncoder(WIDTH, LATENTS), "StandardTrainer"),
    "AutoEncoderNew": (lambda: AutoEncoderNew(WIDTH, LATENTS), "PAnnealTrainer"),
    "GatedAutoEncoder": (lambda: GatedAutoEncoder(WIDTH, LATENTS), "GatedSAETrainer"),
    "AutoEncoderTopK": (lambda: AutoEncoderTopK(WIDTH, LATENTS, K), "TopKTrainer"),
    "BatchTopKSAE": (lambda: BatchTopKSAE(WIDTH, LATENTS, K), "BatchTopKTrainer"),
    "BatchTopKSAE-uncalibrated": (lambda: BatchTopKSAE(WIDTH, LATENTS, K), "BatchTopKTrainer"),
    "MatryoshkaBatchTopKSAE": (
        lambda: MatryoshkaBatchTopKSAE(WIDTH, LATENTS, K, GROUPS),
        "MatryoshkaBatchTopKTrainer",
    ),
    "JumpReluAutoEncoder": (lambda: JumpReluAutoEncoder(WIDTH, LATENTS), "JumpReluTrainer"),
}
BUFFERS = ("k", "group_sizes", "threshold")
FOLDER = "trainer_0"


def load(directory: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Code and output of the object that dictionary_learning makes of a directory."""
    dictionary, _ = load_dictionary(str(directory), "cpu")
    dictionary.to(x_ND.dtype)
    with torch.no_grad():
        return dictionary.encode(x_ND), dictionary(x_ND)


def make(root: Path) -> None:
    """Directories as `trainSAE` lays them out."""
    for seed, (variant, (build, trainer)) in enumerate(VARIANTS.items()):
        dictionary = build()
        scalars = {name for name, value in dictionary.named_buffers() if name in BUFFERS}
        shapes = [(name, tuple(value.shape)) for name, value in dictionary.state_dict().items() if name not in scalars]
        dictionary.load_state_dict(weights(seed, *shapes), strict=False)
        if "threshold" in scalars and not variant.endswith("uncalibrated"):
            dictionary.threshold.fill_(0.35)
        folder = root / variant / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({name: value.cpu() for name, value in dictionary.state_dict().items()}, folder / "ae.pt")
        config = {
            "dict_class": type(dictionary).__name__,
            "trainer_class": trainer,
            "activation_dim": WIDTH,
            "dict_size": LATENTS,
            **({"k": K} if "k" in scalars else {}),
            "layer": 1,
            "lm_name": "EleutherAI/pythia-160m-deduped",
            "submodule_name": "resid_post_layer_1",
        }
        buffer = {"d_submodule": WIDTH, "io": "out", "n_ctxs": 64, "ctx_len": 64, "refresh_batch_size": 16}
        (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": buffer}, indent=4))
        keep(root, variant, load, inputs()[0], FOLDER)


if __name__ == "__main__":
    main("dictionary-learning", load, make)
