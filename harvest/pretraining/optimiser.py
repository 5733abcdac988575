"""AdamW with warm-up and cosine, and what a step does.

Decoupled weight decay of matrices alone (Loshchilov and Hutter, arXiv 1711.05101); moments with β = 0.9, 0.95, as is
usual for language models since GPT-3 (Brown et al., arXiv 2005.14165).
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from thresher.harvest.pretraining.models import cross_entropy_sum
from thresher.harvest.pretraining.settings import PretrainConfig

BETAS = (0.9, 0.95)


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Of the step after `step` others: linear to lr over `warmup` steps, then half a cosine to lr · final_lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - 1 - config.warmup, 1)
    low = config.lr * config.final_lr
    return low + (config.lr - low) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def adamw(model: nn.Module, config: PretrainConfig, device: torch.device) -> torch.optim.AdamW:
    """Two groups: matrices, which decay, and the rest, which does not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=device.type == "cuda")


def autocast(config: PretrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """The block's matrix products in bfloat16, where that is asked for."""
    wanted = config.precision == "bfloat16"
    if config.precision == "auto":
        wanted = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def optimise(
    model: nn.Module, optimiser: torch.optim.Optimizer, rows: Tensor, config: PretrainConfig, step: int
) -> tuple[Tensor, Tensor]:
    """One step on rows [B, T + 1]; the mean loss before it (nats) and the length of its gradient, on the device."""
    targets = (rows[:, 1:] >= 0).sum()
    loss = torch.zeros((), device=rows.device)
    optimiser.zero_grad(set_to_none=True)
    for some in rows.split(config.pass_contexts or len(rows)):
        with autocast(config, rows.device):
            part = cross_entropy_sum(model, some) / targets
        part.backward()
        loss += part.detach()
    length = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(step, config)
    optimiser.step()
    return loss, length
