"""One training step against its encoder matmul, timed in the same process.

    python benchmarks/step.py [--device cuda] [--repeats 9]

A step is everything that a batch costs once it is there: encode, select, decode, losses, backward, projection,
clipping, Adam, renormalisation, counters. The matmul is x W_encᵀ + b_enc in the precision of the step, summed over the
sources. Steps and matmuls alternate; medians are reported, and their ratio, which carries to other machines better
than the milliseconds do. Inputs are sparse mixtures of random directions; the dictionary is trained on them for a
few steps first.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from thresher.train.config import TrainConfig
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.crosslayer import build
from thresher.train.dictionary.initial import initialise
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.losses import losses
from thresher.train.normalise import Affine
from thresher.train.optim import Optimiser

JUMP = {"firing": "jumprelu", "penalty": "target_l0", "sparsity": 0.3}
CASES: dict[str, list[tuple[str, int, dict[str, Any]]]] = {
    "cpu": [
        ("SAE TopK", 1024, {"kind": "sae", "d_in": 768, "n_latents": 6144, "firing": "topk", "k": 32}),
        ("SAE BatchTopK", 1024, {"kind": "sae", "d_in": 768, "n_latents": 6144, "firing": "batchtopk", "k": 32}),
        ("SAE JumpReLU", 1024, {"kind": "sae", "d_in": 768, "n_latents": 6144, "k": 32, **JUMP}),
        ("SAE TopK, 30 % dead", 1024, {"kind": "sae", "d_in": 768, "n_latents": 6144, "firing": "topk", "k": 32}),
        ("transcoder TopK", 2048, {"kind": "transcoder", "d_in": 128, "n_latents": 1024, "firing": "topk", "k": 16}),
        ("transcoder BatchTopK", 2048, {"d_in": 128, "n_latents": 1024, "firing": "batchtopk", "k": 16}),
        ("transcoder JumpReLU", 2048, {"d_in": 128, "n_latents": 1024, "k": 16, **JUMP}),
        ("CLT, 4 layers", 2048, {"layers": 4, "d_in": 128, "n_latents": 1024, "firing": "batchtopk", "k": 16}),
        ("CLT, 12 layers", 512, {"layers": 12, "d_in": 768, "n_latents": 1536, "firing": "batchtopk", "k": 16}),
    ],
    "cuda": [
        ("SAE TopK", 8192, {"kind": "sae", "d_in": 768, "n_latents": 24576, "firing": "topk", "k": 64}),
        ("SAE BatchTopK", 8192, {"kind": "sae", "d_in": 768, "n_latents": 24576, "firing": "batchtopk", "k": 64}),
        ("SAE JumpReLU", 8192, {"kind": "sae", "d_in": 768, "n_latents": 24576, "k": 64, **JUMP}),
        ("CLT, 12 layers", 1024, {"layers": 12, "d_in": 768, "n_latents": 10000, "firing": "batchtopk", "k": 16}),
    ],
}  # fmt: skip


class Case:
    """A dictionary with a batch on a device."""

    def __init__(self, rows: int, settings: dict[str, Any], device: torch.device, dead: float) -> None:
        layers = settings.pop("layers", 1)
        kind = settings.pop("kind", "clt" if layers > 1 else "transcoder")
        width = settings["d_in"]
        names = tuple(f"L{layer:02d}" for layer in range(layers))
        spec = DictionarySpec(
            kind=kind, reads=names, writes=names, layers=tuple(range(layers)), d_out=width, unit_norm=kind == "sae",
            dead_after=1 << 40, **settings,
        )  # fmt: skip
        rng = torch.Generator().manual_seed(0)
        xs = [_mixture(rows, width, rng) for _ in names]
        ys = xs if kind == "sae" else [_mixture(rows, width, rng) for _ in names]
        unit = Affine(torch.zeros(width).double(), torch.ones(width).double(), torch.zeros(width).double(), width)
        self.coder: Coder = build(spec)
        initialise(self.coder, 0, [unit] * layers, [unit] * layers, xs)
        self.coder.to(device)
        for source in range(layers):
            self.coder.encoder(source).matmul_dtype = torch.bfloat16 if device.type == "cuda" else None
            self.coder.encoder(source).tokens_since_fired[: int(dead * spec.n_latents)] = 1 << 41
        self.xs, self.ys = [x.to(device) for x in xs], [y.to(device) for y in ys]
        self.variances = [float(width)] * layers
        self.optimiser = Optimiser(self.coder, TrainConfig())
        self.dead = dead > 0

    def step(self) -> None:
        """One training step."""
        out = self.coder(self.xs)
        terms = losses(self.coder, out, self.xs, self.ys, self.variances, 1.0)
        terms.total.backward()
        self.optimiser.step(3e-4, terms.total.detach().isfinite())
        if not self.dead:  # else the counters stay as they were set
            for source, fired in enumerate(out.fired):
                self.coder.encoder(source).observe(fired)

    @torch.no_grad()
    def matmul(self) -> None:
        """The encoders' products alone."""
        for source, x_ND in enumerate(self.xs):
            encoder = self.coder.encoder(source)
            dtype = encoder.matmul_dtype or x_ND.dtype
            torch.addmm(encoder.b_enc.to(dtype), x_ND.to(dtype), encoder.W_enc.to(dtype).T)


def _mixture(rows: int, width: int, rng: torch.Generator) -> Tensor:
    """Rows of unit variance: about twelve of 4·width random directions each."""
    code = torch.zeros(rows, 4 * width).scatter_(
        1, torch.randint(4 * width, (rows, 12), generator=rng), torch.rand(rows, 12, generator=rng) + 0.2
    )
    x = code @ torch.randn(4 * width, width, generator=rng)
    return (x - x.mean(0)) / x.std()


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description="One training step against its encoder matmul.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    precision = "bf16 matmul" if device.type == "cuda" else "fp32"
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"Training step / encoder matmul, {precision}, {where}, torch {torch.__version__}")
    for column in ("dictionary", "N × D × F", "k", "matmul ms", "step ms", "ratio", "spread"):
        table.add_column(column, justify="left" if column == "dictionary" else "right")
    console = Console(width=120)
    for name, rows, settings in CASES[device.type]:
        shape, k = f"{rows} × {settings['d_in']} × {settings['n_latents']}", settings["k"]
        case = Case(rows, dict(settings), device, 0.3 if "dead" in name else 0.0)
        for _ in range(3):
            case.step()
            case.matmul()
        pairs = [(timed(case.matmul, device), timed(case.step, device)) for _ in range(arguments.repeats)]
        matmul, step = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        ratio = statistics.median(ratios)
        table.add_row(
            name, shape, str(k), f"{matmul:.2f}", f"{step:.2f}", f"{ratio:.2f}", f"{ratios[0]:.2f}–{ratios[-1]:.2f}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
