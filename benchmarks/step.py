"""One training step against its encoder matmul, timed in the same process, and the bars it is held to.

    python benchmarks/step.py [--device cuda] [--repeats 9] [--clock cpu] [--only NAME]
    python benchmarks/step.py --memory 1536

A step is everything that a batch costs once it is there: encode, select, decode, losses, backward, projection,
clipping, Adam, renormalisation, counters. The matmul is x W_encᵀ + b_enc in the precision of the step, summed over the
sources. The cases of one group alternate, each with its own matmul; medians are reported, and their ratios, which
carry to other machines better than the milliseconds do. Inputs are sparse mixtures of random directions; the
dictionary is trained on them for a few steps first. `--clock cpu` counts processor time in place of time, for a
machine that others use; it then takes one thread.

A 12-layer CLT is also timed against the ordinary dense way (benchmarks/step_dense.py), on the same weights and inputs;
before that, both must have the same loss. `--memory` trains it with so many latents per layer in this process alone
and tells its largest resident memory beyond what the interpreter and its libraries take.

On CUDA nothing may be read back within a step: synchronisation is an error there.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from step_dense import DenseCLT
from torch import Tensor

from thresher.cache.process import prepare_process
from thresher.train.config import TrainConfig
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.initial import initialise
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build
from thresher.train.losses import losses
from thresher.train.normalise import Affine
from thresher.train.optim import Optimiser

JUMP = {"firing": "jumprelu", "penalty": "target_l0", "sparsity": 0.3}
SAE: dict[str, Any] = {"kind": "sae", "d_in": 768, "n_latents": 6144, "k": 32}
SMALL: dict[str, Any] = {"d_in": 128, "n_latents": 1024, "k": 16}
CLT: dict[str, Any] = {"layers": 12, "d_in": 768, "n_latents": 1536, "k": 16, "firing": "batchtopk"}
WIDE: dict[str, Any] = {"kind": "sae", "d_in": 768, "n_latents": 24576, "k": 64}
Shape = tuple[str, int, dict[str, Any]]
GROUPS: dict[str, list[list[Shape]]] = {
    "cpu": [
        [
            ("SAE TopK", 1024, {**SAE, "firing": "topk"}),
            ("SAE BatchTopK", 1024, {**SAE, "firing": "batchtopk"}),
            ("SAE JumpReLU", 1024, {**SAE, **JUMP}),
            ("SAE TopK, 30 % dead", 1024, {**SAE, "firing": "topk"}),
        ],
        [
            ("transcoder TopK", 2048, {**SMALL, "firing": "topk"}),
            ("transcoder BatchTopK", 2048, {**SMALL, "firing": "batchtopk"}),
            ("transcoder JumpReLU", 2048, {**SMALL, **JUMP}),
            ("CLT, 4 layers", 2048, {**SMALL, "layers": 4, "firing": "batchtopk"}),
        ],
        [("CLT, 12 layers", 512, CLT)],
    ],
    "cuda": [
        [
            ("SAE TopK", 8192, {**WIDE, "firing": "topk"}),
            ("SAE BatchTopK", 8192, {**WIDE, "firing": "batchtopk"}),
            ("SAE JumpReLU", 8192, {**WIDE, **JUMP}),
            ("SAE TopK, 30 % dead", 8192, {**WIDE, "firing": "topk"}),
        ],
        [
            ("SAE TopK, N = 16384", 16384, {**WIDE, "firing": "topk"}),
            ("SAE BatchTopK, N = 16384", 16384, {**WIDE, "firing": "batchtopk"}),
        ],
        [("CLT, 12 layers", 1024, {**CLT, "n_latents": 10000})],
    ],
}


class Bar(NamedTuple):
    """A ratio that must hold; of medians of the paired ratios."""

    case: str
    against: str
    """Another case of its group, `matmul`, or `dense`, which is the dense step over this one."""
    most: float | None = None
    """Largest ratio."""
    least: float | None = None
    """Smallest ratio."""


BARS: dict[str, list[Bar]] = {
    "cpu": [
        Bar("SAE TopK", "matmul", most=2.5),
        Bar("SAE BatchTopK", "SAE TopK", most=1.15),
        Bar("SAE JumpReLU", "SAE TopK", most=1.5),
        Bar("SAE TopK, 30 % dead", "SAE TopK", most=1.3),
        Bar("CLT, 12 layers", "dense", least=6.0),
    ],
    "cuda": [Bar("SAE TopK", "matmul", most=1.5), Bar("SAE BatchTopK", "matmul", most=1.5)],
}


class Case:
    """A dictionary with a batch on a device."""

    def __init__(self, rows: int, settings: dict[str, Any], device: torch.device, dead: float) -> None:
        settings = dict(settings)
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

    def step(self) -> Tensor:
        """One training step; the loss before it."""
        out = self.coder(self.xs)
        terms = losses(self.coder, out, self.xs, self.ys, self.variances, 1.0)
        terms.total.backward()
        self.optimiser.step(3e-4, terms.total.detach().isfinite())
        if not self.dead:  # else the counters stay as they were set
            for source, fired in enumerate(out.fired):
                self.coder.encoder(source).observe(fired)
        return terms.total.detach()

    @torch.no_grad()
    def matmul(self) -> None:
        """The encoders' products alone."""
        for source, x_ND in enumerate(self.xs):
            encoder = self.coder.encoder(source)
            dtype = encoder.matmul_dtype or x_ND.dtype
            W_enc = encoder.W_enc if encoder.matmul_dtype is None else encoder.low_weight()
            torch.addmm(encoder.b_enc.to(dtype), x_ND.to(dtype), W_enc.T)


def _mixture(rows: int, width: int, rng: torch.Generator) -> Tensor:
    """Rows of unit variance: about twelve of 4·width random directions each."""
    code = torch.zeros(rows, 4 * width).scatter_(
        1, torch.randint(4 * width, (rows, 12), generator=rng), torch.rand(rows, 12, generator=rng) + 0.2
    )
    x = code @ torch.randn(4 * width, width, generator=rng)
    return (x - x.mean(0)) / x.std()


class Timer:
    """Milliseconds of one call."""

    def __init__(self, device: torch.device, clock: str) -> None:
        self.device = device
        self.clock = time.process_time if clock == "cpu" else time.perf_counter

    def __call__(self, run: Callable[[], object]) -> float:
        """Run once."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        began = self.clock()
        with NoSynchronisation() if cuda else nullcontext():
            run()
        if cuda:
            torch.cuda.synchronize()
        return 1e3 * (self.clock() - began)


class NoSynchronisation:
    """Makes reading back from the device an error."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


def measure(group: list[Shape], device: torch.device, timer: Timer, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every case and repeat, by what was timed: `step`, `matmul` and, for a 12-layer CLT, `dense`."""
    runs: dict[str, dict[str, Callable[[], object]]] = {}
    for name, rows, settings in group:
        case = Case(rows, settings, device, 0.3 if "dead" in name else 0.0)
        runs[name] = {"matmul": case.matmul, "step": case.step}
        if settings.get("layers", 1) == 12 and device.type == "cpu":
            dense = DenseCLT(case.coder)
            pair = float(case.step()), float(dense.step(case.xs, case.ys, case.variances))
            assert abs(pair[0] - pair[1]) < 1e-4 * pair[1], f"losses differ: {pair}"
            runs[name]["dense"] = lambda dense=dense, case=case: dense.step(case.xs, case.ys, case.variances)
        for _ in range(3):
            for run in runs[name].values():
                run()
    out: dict[str, dict[str, list[float]]] = {name: {what: [] for what in runs[name]} for name in runs}
    for _ in range(repeats):
        for name, parts in runs.items():
            for what, run in parts.items():
                out[name][what].append(timer(run))
    return out


def _paired(left: list[float], right: list[float]) -> list[float]:
    return sorted(a / b for a, b in zip(left, right, strict=True))


def verdicts(bars: list[Bar], times: dict[str, dict[str, list[float]]]) -> list[str]:
    """One line per bar whose cases were measured."""
    lines = []
    for bar in bars:
        if bar.case not in times or (bar.against not in (*times, "matmul", "dense")):
            continue
        mine = times[bar.case]
        if bar.against == "dense":
            ratios, what = _paired(mine["dense"], mine["step"]), f"dense step / {bar.case}"
        else:
            other = mine["matmul"] if bar.against == "matmul" else times[bar.against]["step"]
            ratios, what = _paired(mine["step"], other), f"{bar.case} / {bar.against}"
        ratio = statistics.median(ratios)
        held = ratio <= bar.most if bar.most is not None else ratio >= (bar.least or 0.0)
        limit = f"at most {bar.most}" if bar.most is not None else f"at least {bar.least}"
        lines.append(f"{what}: {ratio:.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}), {limit}: {'met' if held else 'MISSED'}")
    return lines


def memory(latents: int, steps: int = 3) -> str:
    """Train a 12-layer CLT of N = 512 in a process of its own; what it took."""
    code = f"import step; step.train_for_memory({latents}, {steps})"
    done = subprocess.run([sys.executable, "-c", code], cwd=sys.path[0], capture_output=True, text=True, check=False)
    return done.stdout.strip() or f"failed with {done.returncode}: {done.stderr.strip()[-500:]}"


def train_for_memory(latents: int, steps: int) -> None:
    """Print largest resident memory beyond that after importing everything, against its bar."""
    before = _peak()
    case = Case(512, {**CLT, "n_latents": latents}, torch.device("cpu"), 0.0)
    ready = time.perf_counter()
    seconds = []
    for _ in range(steps):
        case.step()
        seconds.append(time.perf_counter() - ready)
        ready = time.perf_counter()
    parameters = case.coder.n_parameters
    used, bar = _peak() - before, 16 * parameters + 10**9
    print(
        f"CLT of 12 × {latents} latents, {parameters / 1e6:.1f} M parameters: {used / 1e9:.2f} GB beyond the "
        f"{before / 1e9:.2f} GB of interpreter and libraries, at most {bar / 1e9:.2f}: "
        f"{'met' if used <= bar else 'MISSED'}; last step {seconds[-1]:.2f} s"
    )


def _peak() -> int:
    """Largest resident memory of this program so far, bytes.

    Linux: of /proc, since getrusage hands on what the process was before it became this program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    """Print one line per case, then the bars."""
    if prepare_process():  # as the command line does, which has not loaded torch by then
        os.execv(sys.executable, [sys.executable, *sys.argv])
    parser = argparse.ArgumentParser(description="One training step against its encoder matmul.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--only", default="", help="groups with a case of this name")
    parser.add_argument("--memory", type=int, help="measure memory alone, with so many latents per layer")
    arguments = parser.parse_args()
    console = Console(width=130)
    if arguments.memory:
        console.print(memory(arguments.memory))
        return
    device = torch.device(arguments.device)
    if arguments.clock == "cpu":
        torch.set_num_threads(1)
    precision = "bf16 matmul" if device.type == "cuda" else "fp32"
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"Training step / encoder matmul, {precision}, {where}, torch {torch.__version__}")
    for column in ("dictionary", "N × D × F", "k", "matmul ms", "step ms", "ratio", "spread", "tokens/s"):
        table.add_column(column, justify="left" if column == "dictionary" else "right")
    lines, timer = [], Timer(device, arguments.clock)
    for group in GROUPS[device.type]:
        if not any(arguments.only in name for name, _, _ in group):
            continue
        times = measure(group, device, timer, arguments.repeats)
        for name, rows, settings in group:
            step, matmul = times[name]["step"], times[name]["matmul"]
            ratios = _paired(step, matmul)
            table.add_row(
                name, f"{rows} × {settings['d_in']} × {settings['n_latents']}", str(settings["k"]),
                f"{statistics.median(matmul):.2f}", f"{statistics.median(step):.2f}",
                f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f}–{ratios[-1]:.2f}",
                f"{1e3 * rows / statistics.median(step):,.0f}",
            )  # fmt: skip
        lines += verdicts(BARS[device.type], times)
    if device.type == "cpu" and not arguments.only:
        lines.append(memory(CLT["n_latents"]))
    if device.type == "cuda":
        lines.append(f"largest memory allocated: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    console.print(table)
    for line in lines:
        console.print(line, highlight=False)


if __name__ == "__main__":
    main()
