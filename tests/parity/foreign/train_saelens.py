"""Train a BatchTopK SAE with SAELens's own training class and loop, on rows that Thresher cached.

    python train_saelens.py ROWS SETTINGS DIRECTORY

ROWS: safetensors with `x` [N, d]. SETTINGS: JSON with d_sae, k, batch, steps, lr, seed, model_name, hook_name. Rows are
drawn without replacement, in a new order every epoch. DIRECTORY gets what its `save_inference_model` writes: a JumpReLU
SAE whose activation scale is folded in.
"""

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from torch import Tensor


def batches(x_ND: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of rows."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x_ND), generator=rng)
        for start in range(0, len(order) - size + 1, size):
            yield x_ND[order[start : start + size]]


def main(rows: Path, settings: Path, directory: Path) -> None:
    """Train and save."""
    wanted = json.loads(settings.read_text())
    x_ND = load_file(rows)["x"]
    torch.manual_seed(wanted["seed"])
    config = BatchTopKTrainingSAEConfig(
        d_in=x_ND.shape[1],
        d_sae=wanted["d_sae"],
        k=wanted["k"],
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(model_name=wanted["model_name"], hook_name=wanted["hook_name"]),
    )
    steps, batch = wanted["steps"], wanted["batch"]
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            lr=wanted["lr"],
            lr_end=0.1 * wanted["lr"],
            lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 5,
            dead_feature_window=max(1, steps // 10),
            n_batches_for_norm_estimate=20,
        ),
        BatchTopKTrainingSAE(config),
        batches(x_ND, batch, wanted["seed"]),
    )
    trained = trainer.fit()
    trained.save_inference_model(directory)
    print("sae-lens", importlib.metadata.version("sae-lens"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
