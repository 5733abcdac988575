"""What a dense product and a copy come to on this machine: the two rates that the cost model rests on."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_ROUNDS = 5
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}


class Measured(NamedTuple):
    """Of one processor; of a CPU with as many threads as torch has."""

    low: float
    """FLOP a second of a product in bfloat16."""
    full: float
    """The same in float32."""
    bandwidth: float
    """Bytes a second of a copy, read and written together."""
    memory: int
    """Bytes that can be taken."""


def measure(device: torch.device, rows: int, width: int, latents: int) -> Measured:
    """Time x W_encᵀ of that shape and a copy, for about a second; medians."""
    from thresher.cache.memory import available_memory

    flop = 2 * rows * width * latents
    low, full = (flop / _seconds(_product(device, rows, width, latents, t), device) for t in _DTYPES)
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else available_memory()
    return Measured(low, full, moved, memory)


_DTYPES = (torch.bfloat16, torch.float32)


def _product(device: torch.device, rows: int, width: int, latents: int, dtype: torch.dtype) -> Callable[[], object]:
    rng = torch.Generator().manual_seed(0)
    x_ND, W_FD = (torch.randn(count, width, generator=rng).to(device, dtype) for count in (rows, latents))
    out_NF = torch.empty(rows, latents, dtype=dtype, device=device)
    return lambda: torch.mm(x_ND, W_FD.T, out=out_NF)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Median of a few rounds, after one that does not count."""
    taken = []
    for _ in range(_ROUNDS + 1):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])
