"""A TopK training step of ours and of two public trainers, against the encoder matmul, all in one process.

    python benchmarks/step_peers.py [--repeats 9] [--venv DIR] [--clock cpu]

The packages `eai-sparsify` and `dictionary-learning` and this checkout are installed from a package index into an
environment of their own, in a temporary folder unless `--venv` names one to keep, with this project's pinned versions.
Both bring a large part of an ecosystem along and are no dependencies of ours.

D = 768, F = 6144, k = 32, N = 1024, float32, CPU, the same random mixture for all, no dead latents. A step is what each
trainer does with one batch once it is there, as its own training loop does it:

- sparsify: unit decoder rows, total variance, forward, backward, projection, optimiser, counters. Signum through the
  schedule-free wrapper is the default of the released package, Adam its alternative; AuxK is off by default.
- dictionary_learning: `TopKTrainer.update`, all in it.

Every timing is preceded by one of the matmul x W_encᵀ + b_enc; the median of these ratios is reported.
"""

import argparse
import importlib.metadata
import statistics
import subprocess
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from step import SAE, Case, Timer
from torch import Tensor

ROOT = Path(__file__).parents[1]
PACKAGES = ("eai-sparsify", "dictionary-learning")
UNNEEDED = "torchvision"  # comes with a dependency; if built for another torch, importing transformers fails
N, WARM_UP = 1024, 3


def sparsify_step(x_ND: Tensor, optimiser: str) -> Callable[[], object]:
    """One step of sparsify's Trainer on given activations, without its hooks and logs."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify.config import SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from sparsify.sparse_coder import SparseCoder

    latents = SAE["n_latents"]
    coder = SparseCoder(x_ND.shape[1], SparseCoderConfig(k=SAE["k"], num_latents=latents))
    coder.b_dec.data = x_ND.mean(0)
    width = (latents / 2**14) ** 0.5
    if optimiser == "adam":
        update: torch.optim.Optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4 / width)
    else:
        update = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=5e-3 / width), momentum=0.95)
        update.train()
    since_fired, fired = torch.zeros(latents, dtype=torch.long), torch.zeros(latents, dtype=torch.bool)

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x_ND, total_variance=(x_ND - x_ND.mean(0)).pow(2).sum())
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        update.step()
        update.zero_grad()
        since_fired.add_(len(x_ND))
        since_fired[fired] = 0
        fired.zero_()

    return step


def dictionary_learning_step(x_ND: Tensor) -> Callable[[], object]:
    """One step of dictionary_learning's TopKTrainer; the first one also finds the geometric median."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    sizes = {"activation_dim": x_ND.shape[1], "dict_size": SAE["n_latents"], "k": SAE["k"]}
    trainer = TopKTrainer(steps=10**6, layer=0, lm_name="", device="cpu", seed=0, **sizes)
    steps: Iterator[int] = iter(range(1000))  # from then on it would also follow a threshold
    return lambda: trainer.update(next(steps), x_ND)


def measure(repeats: int, clock: str) -> None:
    """Time all in turns; runs where the packages are."""
    if clock == "cpu":
        torch.set_num_threads(1)
    case, timer = Case(N, {**SAE, "firing": "topk"}, torch.device("cpu"), 0.0), Timer(torch.device("cpu"), clock)
    x_ND = case.xs[0]
    release = {name: importlib.metadata.version(name) for name in PACKAGES}
    steps: dict[str, Callable[[], object]] = {
        "ours, Adam": case.step,
        f"eai-sparsify {release['eai-sparsify']}, signum": sparsify_step(x_ND, "signum"),
        f"eai-sparsify {release['eai-sparsify']}, Adam": sparsify_step(x_ND, "adam"),
        f"dictionary-learning {release['dictionary-learning']}, Adam": dictionary_learning_step(x_ND),
    }
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            found[name].append((timer(case.matmul), timer(step)))
    threads = torch.get_num_threads()
    table = Table(title=f"TopK step / encoder matmul, CPU, {threads} threads, {clock} time, torch {torch.__version__}")
    for column in ("trainer", "matmul ms", "step ms", "ratio", "spread", "× ours"):
        table.add_column(column, justify="left" if column == "trainer" else "right")
    own = statistics.median(step / matmul for matmul, step in found["ours, Adam"])
    for name, pairs in found.items():
        ratios = sorted(step / matmul for matmul, step in pairs)
        matmul_ms, step_ms = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(ratios)
        table.add_row(
            name, f"{matmul_ms:.1f}", f"{step_ms:.1f}", f"{ratio:.2f}", f"{ratios[0]:.2f}–{ratios[-1]:.2f}",
            f"{ratio / own:.1f}",
        )  # fmt: skip
    Console(width=110).print(table)


def installed(folder: Path) -> Path:
    """The interpreter of an environment with the packages, made if it is not there."""
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        constraints = ["-c", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, "install", *constraints, "-e", str(ROOT), *PACKAGES], check=True)
        subprocess.run([*pip, "uninstall", "-y", UNNEEDED], check=True)
    return python


def main() -> None:
    """Install what is missing, then measure over there."""
    parser = argparse.ArgumentParser(description="A TopK training step of ours beside those of public trainers.")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--venv", type=Path, help="Keep the environment here, or use the one that is here.")
    parser.add_argument("--measure", action="store_true", help="measure with the packages of this interpreter")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.repeats, arguments.clock)
        return
    with tempfile.TemporaryDirectory() as temporary:
        python = installed(arguments.venv or Path(temporary) / "venv")
        own = [str(Path(__file__).resolve()), "--measure", "--repeats", str(arguments.repeats)]
        subprocess.run([str(python), *own, "--clock", arguments.clock], check=True)


if __name__ == "__main__":
    main()
