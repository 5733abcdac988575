"""circuit-tracer's equations on its files as they are stored, and dictionaries to write into them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tests.interop.conftest import LATENTS, Made
from thresher.cache.records import to_dict
from thresher.interop.canonical import Canonical, to_coder
from thresher.train.files import save_run

Facts = Mapping[str, Any]
JUMP = "activation_function.threshold"
"""Name of a transcoder file's thresholds."""


def layer_set(made: Made, firing: str = "threshold", skip: bool = False, layers: Sequence[int] = (0, 1, 2)) -> list:
    """Transcoders of several layers, all with other weights."""
    out = []
    for layer in layers:
        one = made("transcoder", firing, skip=skip, seed=layer)
        sites = {"reads": (f"L{layer:02d}.mlp_in",), "writes": (f"L{layer:02d}.mlp_out",), "layers": (layer,)}
        out.append(one._replace(name=f"t-L{layer:02d}", **sites))
    return out


def loaded(file: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in safetensors.torch.load_file(file).items()}


def gate(pre: Tensor, theta: Tensor | None) -> Tensor:
    """Its activation: no ReLU beside a threshold."""
    return torch.relu(pre) if theta is None else pre * (pre > theta)


def of_layer(folder: Path, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Code and output of a transcoder file."""
    t = loaded(folder / f"layer_{layer}.safetensors")
    assert set(t) <= {"W_enc", "W_dec", "b_enc", "b_dec", JUMP, "W_skip"}, "any other tensor raises there"
    a = gate(x @ t["W_enc"].T + t["b_enc"], t.get(JUMP))
    y = a @ t["W_dec"] + t["b_dec"]
    return a, y + x @ t["W_skip"].T if "W_skip" in t else y


def of_cross(folder: Path, xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Codes by layer and outputs by layer of a directory with a CLT."""
    count = len(list(folder.glob("W_enc_*.safetensors")))
    files = [loaded(folder / f"W_enc_{i}.safetensors") for i in range(count)]
    jumps = "threshold_0" in files[0]
    a, decoders = [], []
    for i, t in enumerate(files):
        a.append(gate(xs[i] @ t[f"W_enc_{i}"].T + t[f"b_enc_{i}"], t[f"threshold_{i}"] if jumps else None))
        decoders.append(loaded(folder / f"W_dec_{i}.safetensors")[f"W_dec_{i}"])
        assert decoders[i].shape[1] == count - i
    y = [sum(a[s] @ decoders[s][:, t - s] for s in range(t + 1)) + files[t][f"b_dec_{t}"] for t in range(count)]
    return a, y


def same(a: Tensor, b: Tensor) -> None:
    """To the rule of the parity tests."""
    assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())
    assert torch.equal((a > 0).sum(1), (b > 0).sum(1)) or a.shape[1] != LATENTS


def saved(folder: Path, dictionary: Canonical, group: str) -> Path:
    """A run directory, as training leaves it."""
    identity = {"target": {"model": "gpt2"}, "data": {"context": 128}}
    path = folder / dictionary.name
    coder = to_coder(dictionary)
    spec = {"kind": dictionary.kind, "firing": "jumprelu", "k": None, "reads": [], "writes": []}
    config = {
        "name": dictionary.name, "group": group, "dictionary": spec | to_dict(coder.spec),
        "cache": {"path": "none", "fingerprint": "f", "identity": identity}, "training": {"finished": True},
    }  # fmt: skip
    save_run(path, coder, config)
    return path
