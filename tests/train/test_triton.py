"""The Triton kernels: run in Triton's interpreter against their specifications, and compiled for a GPU not at hand.

Whether kernels are interpreted is settled when triton is first imported, so tests/train/triton_kernels.py runs in a
process of its own; where there is a CUDA device, once more on it.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_losses import RULES, batch, make
from tests.train.test_padded import ReadingBack
from thresher.train.config import TrainConfig
from thresher.train.kernels import cpu
from thresher.train.kernels.gradients import Facts
from thresher.train.kernels.padded import Padded
from thresher.train.losses import losses
from thresher.train.optim import Optimiser

HERE = Path(__file__).parent
WAYS = ["interpreter", *(["cuda"] if torch.cuda.is_available() else [])] if sys.platform == "linux" else []


@pytest.mark.parametrize("way", WAYS)
def test_kernels_equal_their_specifications(way: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "triton_kernels.py")]
    given = {**os.environ, "TRITON_INTERPRET": "1" if way == "interpreter" else "0", "OMP_NUM_THREADS": "1"}
    for name in [key for key in given if key.startswith("PYTEST_")]:
        del given[name]
    done = subprocess.run(command, cwd=HERE.parent.parent, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux")
@pytest.mark.parametrize(("unit", "rule"), [(True, "topk"), (False, "relu"), (True, "jumprelu tanh")])
def test_both_updates_reckon_the_same_multiples_and_norms_and_none_reads_back(
    unit: bool, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thresher.train.kernels.triton import adam

    coder = make("clt", unit_norm=unit, **RULES[rule])
    optimiser = Optimiser(coder, TrainConfig())
    xs, ys = batch(coder)
    losses(coder, coder(xs), xs, ys, [1.0] * 3, 1.0).total.backward()
    optimiser.parameters.sinks.settle()
    rows = []
    for parameter in coder.parameters():
        if parameter.grad is not None:
            along, facts, is_unit = optimiser.parameters.noted(parameter)
            matrices = optimiser.rule.matrices(parameter)
            rows.append(adam.Rows(*matrices, along, facts or cpu.facts_of(*matrices[:2]), is_unit))
            (multiples, square), turn = adam._along(rows[-1]), optimiser.parameters.turn(parameter)
            assert (multiples is None) == (turn.along is None)
            torch.testing.assert_close(multiples, turn.along)
            assert float(square) == pytest.approx(turn.square, rel=1e-12)
    assert any(row.along is not None for row in rows) == (rule != "topk")
    monkeypatch.setattr(adam, "_launch", lambda *arguments: None)  # the kernel itself
    finite = torch.tensor(True)
    with ReadingBack():
        norm = adam.step(rows, 1e-3, finite, 1.0, (0.9, 0.999), 1e-8)
    assert float(norm) == pytest.approx(float(optimiser.step(1e-3, finite)))


@pytest.fixture
def machine_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Launches compile for compute capability 9.0 and run nothing; PTX by kernel and argument types."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made: dict[str, str] = {}
    names = {
        torch.float32: "fp32",
        torch.float64: "fp64",
        torch.bfloat16: "bf16",
        torch.int64: "i64",
        torch.int32: "i32",
    }

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            signature, known = {}, {}
            for name, value in [*zip(kernel.arg_names, arguments, strict=False), *constants.items()]:
                if name in constants or value is None or (type(value) is int and value == 1):
                    signature[name], known[name] = "constexpr", value
                elif isinstance(value, torch.Tensor):
                    signature[name] = "*" + names[value.dtype]
                else:
                    signature[name] = "i32"
            key = f"{kernel.fn.__name__} {signature} {known}"
            if key not in made:
                source = ASTSource(kernel, signature, known)
                made[key] = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", launcher)
    return made


@pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux")
def test_every_kernel_compiles_and_none_adds_floats_atomically(machine_code: dict[str, str]) -> None:
    from thresher.train.kernels.triton import adam, decode, decoder_gradient, encoder_gradient, select

    for tokens, latents, width, dtype in ((600, 2, 37, torch.float32), (600, 1, 1, torch.float64)):
        selection = Padded(torch.arange(0, tokens * latents, latents), tokens, latents)
        z, g, W = (
            torch.zeros(tokens, dtype=dtype),
            torch.zeros(tokens, width, dtype=dtype),
            torch.zeros(latents, width, dtype=dtype),
        )
        facts = Facts(*torch.zeros(3, latents, dtype=torch.float64).unbind(0))
        decode(g, z, W, selection)
        decoder_gradient(z, g, W, selection, W, True, facts)
        encoder_gradient(z, g, selection, W, False)
        step = torch.tensor(1.0)
        moments = adam.Rows(W, W, W, W, step, None, None, True)
        adam.step([moments], 1e-3, torch.tensor(True), 1.0, (0.9, 0.999), 1e-8)
        adam.update(W, W, W, W, None, 1.0, adam.Numbers(0.9, 0.999, 1e-8, step, step, step > 0), False, W.bfloat16())
    for tokens, width, dtype in ((64, 256, torch.bfloat16), (1, 1, torch.float32)):
        a = torch.zeros(tokens, width, dtype=dtype)
        select.topk(a, 1)
        select.above(a, torch.zeros(width), 9)
    select.batch_topk(torch.zeros(64, 256), 64)
    kernels = {key.split(" ")[0] for key in machine_code}
    assert kernels >= {"_decode", "_short", "_pieces", "_join", "_sums", "_update", "_facts"}
    assert kernels >= {"_topk", "_count", "_place", "_digits", "_cut"}
    for key, text in machine_code.items():
        assert not re.search(r"\b(atom|red)\.\S*\.b?f(16|32|64)", text), key
