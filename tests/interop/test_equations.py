"""Each library's own output of the files it wrote is what the equations say of those files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.interop import equations
from tests.interop.equations import Array, Forward

FIXTURES = Path(__file__).parent / "fixtures"


def wide(tensors: dict[str, torch.Tensor]) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def saelens(folder: Path, x: Array) -> Forward:
    config = json.loads((folder / "cfg.json").read_text())
    if "activation_fn_str" in config:  # as releases before 6 wrote it
        kind = "topk" if config["activation_fn_str"] == "topk" else config["architecture"]
        config |= {"architecture": kind, **config.get("activation_fn_kwargs", {})}
    return equations.saelens(wide(load_file(folder / "sae_weights.safetensors")), config, x)


def sparsify(folder: Path, x: Array) -> Forward:
    [own] = folder.iterdir()
    return equations.sparsify(wide(load_file(own / "sae.safetensors")), json.loads((own / "cfg.json").read_text()), x)


def circuit_tracer(folder: Path, x: Array) -> Forward:
    tensors: dict[str, Array] = {}
    for path in sorted(folder.glob("W_*.safetensors")):
        tensors |= wide(load_file(path))
    if tensors:
        return equations.circuit_tracer_clt(tensors, x)
    layers = []
    for i, rows in enumerate(x):
        own = wide(load_file(folder / f"layer_{i}.safetensors"))
        if folder.name.endswith("-old"):
            own["W_dec"] = own["W_dec"].T
        layers.append(equations.circuit_tracer_layer(own, rows))
    return stacked(layers)


def dictionary_learning(folder: Path, x: Array) -> Forward:
    [own] = folder.iterdir()
    tensors = wide(torch.load(own / "ae.pt", weights_only=True))
    return equations.dictionary_learning(tensors, json.loads((own / "config.json").read_text()), x)


def gemma_scope(folder: Path, x: Array) -> Forward:
    for path in folder.rglob("*.npz"):
        return equations.gemma_scope({name: value.astype(np.float64) for name, value in np.load(path).items()}, x)
    files = [wide(load_file(path)) for path in sorted(folder.rglob("*.safetensors"))]
    return equations.gemma_scope_2_clt(files, x) if len(files) > 1 else equations.gemma_scope_2(files[0], x)


def openmoss(folder: Path, x: Array) -> Forward:
    tensors = wide(load_file(folder / "sae_weights.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    return (equations.openmoss_clt if config["sae_type"] == "clt" else equations.openmoss)(tensors, config, x)


def stacked(layers: Sequence[Forward]) -> Forward:
    return Forward(np.stack([layer.code for layer in layers]), np.stack([layer.output for layer in layers]))


READERS: dict[str, Callable[[Path, Array], Forward]] = {
    "saelens": saelens,
    "circuit_tracer": circuit_tracer,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "gemma_scope": gemma_scope,
    "openmoss": openmoss,
}
OUTPUTS = ".outputs.safetensors"
CASES = sorted((path.parent.name, path.name.removesuffix(OUTPUTS)) for path in FIXTURES.glob(f"*/*{OUTPUTS}"))


def test_every_tool_has_fixtures() -> None:
    assert {tool for tool, _ in CASES} == set(READERS)


@pytest.mark.parametrize(("tool", "variant"), CASES)
def test_the_library_computes_what_the_equation_says(tool: str, variant: str) -> None:
    stored = load_file(FIXTURES / tool / f"{variant}{OUTPUTS}")
    says = READERS[tool](FIXTURES / tool / variant, stored["x"].double().numpy())
    for name, expected in (("code", says.code), ("output", says.output)):
        got = stored[name].double().numpy()
        assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max(), name
    np.testing.assert_array_equal(stored["l0"].numpy(), (says.code != 0).sum(-1))
