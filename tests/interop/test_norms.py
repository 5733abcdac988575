"""A dictionary of an MLP's input is written for the hook before its norm's gain and shift."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from tests.interop.conftest import WIDTH, Made
from tests.interop.tracer import layer_set, of_layer, saved
from thresher.cache.errors import UserError
from thresher.interop.adapting import Moved
from thresher.interop.canonical import codes, decoded
from thresher.interop.export import export
from thresher.interop.norms import Norm, norms_of, reading_at


@pytest.mark.parametrize("kind", ["transcoder", "clt"])
def test_a_norms_gain_and_shift_go_into_the_encoder(kind, made: Made, rows: Tensor) -> None:
    """Read before the gain, codes and outputs are those of the MLP's own input."""
    dictionary = made(kind, "threshold", skip=kind == "transcoder")
    rng = torch.Generator().manual_seed(8)
    norms = {
        layer: Norm(*(torch.randn(WIDTH, generator=rng, dtype=torch.float64) for _ in range(2)))
        for layer in dictionary.layers
    }
    norms[dictionary.layers[0]].gamma[3] = 0.0
    moved = reading_at(dictionary, "ln2.hook_normalized", norms)
    assert moved.reads == tuple(f"blocks.{layer}.ln2.hook_normalized" for layer in dictionary.layers)
    plain = [rows + s for s in range(len(dictionary.sources))]
    inputs = [x * norms[layer].gamma + norms[layer].beta for x, layer in zip(plain, dictionary.layers, strict=True)]
    z = [codes(dictionary, s, x) for s, x in enumerate(inputs)]
    again = [codes(moved, s, x) for s, x in enumerate(plain)]
    pairs = [*zip(z, again, strict=True)]
    pairs += zip(decoded(dictionary, z, inputs), decoded(moved, again, plain), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)
    assert reading_at(dictionary, "mlp.hook_in", norms) is dictionary


def test_another_tensor_is_no_hook_to_export_for(made: Made) -> None:
    dictionary = made("transcoder", "threshold")
    with pytest.raises(UserError, match=r"--hook is 'hook_resid_mid'.*another tensor"):
        reading_at(dictionary, "hook_resid_mid", {})
    with pytest.raises(UserError, match="another tensor"):
        reading_at(dictionary._replace(reads=("L01.resid_mid",)), "ln2.hook_normalized", {})
    with pytest.raises(UserError, match=r"layers \[1\] are not known"):
        reading_at(dictionary, "ln2.hook_normalized", {})
    with pytest.raises(UserError, match="has width 3, but transcoder-threshold reads 16"):
        reading_at(dictionary, "ln2.hook_normalized", {1: Norm(torch.ones(3), torch.zeros(3))})


def test_an_export_can_be_made_for_the_hook_before_the_gain(made: Made, rows: Tensor, tmp_path: Path) -> None:
    those = layer_set(made)
    runs = [saved(tmp_path / "runs", each, "t") for each in those]
    gamma, beta = torch.rand(WIDTH, dtype=torch.float64) + 0.5, torch.rand(WIDTH, dtype=torch.float64)
    moved = Moved("ln2.hook_normalized", {layer: Norm(gamma, beta) for layer in range(3)})
    export(runs, "circuit-tracer", tmp_path / "out", moved=moved)
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["feature_input_hook"] == "ln2.hook_normalized"
    a, _ = of_layer(tmp_path / "out", 1, rows)
    torch.testing.assert_close(a, codes(those[1], 0, rows * gamma + beta), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "stem", "offset", "shifted"),
    [
        ("gpt2", "transformer.h.{}.ln_2", 0.0, True),
        ("llama", "model.layers.{}.post_attention_layernorm", 0.0, False),
        ("gemma2", "model.layers.{}.pre_feedforward_layernorm", 1.0, False),
    ],
)
def test_norms_are_read_from_the_targets_files(
    kind: str, stem: str, offset: float, shifted: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    weights = {f"{stem.format(i)}.weight": torch.full((4,), i + 0.5) for i in (0, 1, 11)}
    biases = {f"{stem.format(i)}.bias": torch.full((4,), -float(i)) for i in (0, 1, 11)} if shifted else {}
    safetensors.torch.save_file(weights | biases, tmp_path / "model.safetensors")
    found = norms_of(tmp_path)
    assert {layer: norm.gamma.tolist() for layer, norm in found.items()} == {
        layer: [layer + 0.5 + offset] * 4 for layer in (0, 1, 11)
    }
    assert found[11].beta.tolist() == [-11.0 if shifted else 0.0] * 4
    safetensors.torch.save_file({"wte.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="hold no"):
        norms_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UserError, match="'mamba'"):
        norms_of(tmp_path)
