"""SAELens's files say what the canonical form says, and are read as SAELens means them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.interop.conftest import Made, written
from thresher.cache.errors import UserError
from thresher.interop import saelens
from thresher.interop.canonical import codes, decoded
from thresher.interop.formats import Exported

FORMS = [("sae", "relu", "standard"), ("sae", "threshold", "jumprelu"), ("sae", "topk", "topk"),
         ("transcoder", "relu", "transcoder"), ("transcoder", "threshold", "jumprelu_transcoder")]  # fmt: skip


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("kind", "firing", "name"), FORMS)
def test_what_is_written_reads_back_the_same(
    kind, firing, name: str, skip: bool, made: Made, facts: Mapping[str, Any], rows: Tensor, tmp_path: Path
) -> None:
    skip = skip and kind == "transcoder"
    dictionary = made(kind, firing, skip=skip, out=12 if kind == "transcoder" else 16)
    saelens.write(tmp_path, [Exported(dictionary, facts)])
    assert written(tmp_path) == {"cfg.json", "sae_weights.safetensors"}
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == (name.replace("transcoder", "skip_transcoder") if skip else name)
    assert config["apply_b_dec_to_input"] is False
    assert config["normalize_activations"] == "none"
    new = config["architecture"] == "jumprelu_skip_transcoder"
    assert config["metadata"]["sae_lens_version"] == ("6.54.12" if new else "6.18.0"), "one that can load it"
    assert config["metadata"]["thresher"]["weights_sha256"] == "00"
    assert config["metadata"]["hook_name"] == {"sae": "blocks.1.hook_resid_post"}.get(kind, "blocks.1.mlp.hook_in")
    [foreign] = saelens.read(tmp_path)
    z, y = foreign.readings[0].forward([rows])
    expected = codes(dictionary, 0, rows)
    torch.testing.assert_close(z[0], expected, rtol=1e-6, atol=1e-6 * float(expected.max()))
    torch.testing.assert_close(y[0], decoded(dictionary, [expected], [rows])[0], rtol=1e-6, atol=1e-3)


def stored(path: Path, architecture: str, **settings: Any) -> dict[str, Tensor]:
    """A directory as SAELens would write it."""
    rng = torch.Generator().manual_seed(6)
    d, m = 16, 48
    tensors = {"W_enc": (d, m), "W_dec": (m, d), "b_dec": (d,), "b_enc": (m,)}
    if architecture == "gated":
        tensors = {**tensors, "b_gate": (m,), "r_mag": (m,), "b_mag": (m,)}
        del tensors["b_enc"]
    made = {name: torch.randn(shape, generator=rng) for name, shape in tensors.items()}
    config = {"architecture": architecture, "d_in": d, "d_sae": m, "normalize_activations": "none", **settings}
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file(made, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps(config))
    return {name: tensor.double() for name, tensor in made.items()}


@pytest.mark.parametrize("subtracts", [False, True])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("standard", {}), ("gated", {}), ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}), ("topk", {"k": 4})],
)
def test_its_conventions_fold_exactly(
    architecture: str, settings: dict[str, Any], subtracts: bool, rows: Tensor, tmp_path: Path
) -> None:
    stored(tmp_path, architecture, apply_b_dec_to_input=subtracts, **settings)
    [foreign] = saelens.read(tmp_path)
    assert foreign.readings[1].label == ("b_dec not subtracted" if subtracts else "b_dec subtracted from the input")
    for reading in foreign.readings:
        z, y = reading.forward([rows])
        ours = codes(reading.dictionary, 0, rows)
        assert float((ours > 0).double().mean()) > 0.02
        torch.testing.assert_close(ours, z[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(decoded(reading.dictionary, [ours], [rows])[0], y[0], rtol=1e-9, atol=1e-9)


def test_b_dec_is_subtracted_where_the_config_is_silent(rows: Tensor, tmp_path: Path) -> None:
    tensors = stored(tmp_path, "standard")
    [foreign] = saelens.read(tmp_path)
    expected = torch.relu((rows - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"])
    torch.testing.assert_close(codes(foreign.readings[0].dictionary, 0, rows), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "batchtopk"}, "architecture is 'batchtopk'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"d_sae": 40}, "W_enc has shape"),
        ({"architecture": "jumprelu"}, "no tensor 'threshold'"),
        ({"architecture": "topk"}, "says nothing of k, which a topk dictionary needs"),
        ({"d_in": None}, "says nothing of d_in"),
    ],
)
def test_what_it_cannot_be_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    stored(tmp_path, "standard")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        saelens.read(tmp_path)


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    tensors = stored(tmp_path, "standard")
    safetensors.torch.save_file({**tensors, "W_extra": torch.zeros(2)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match="W_extra"):
        saelens.read(tmp_path)


def test_a_scaling_factor_of_before_version_6_means_nothing_unless_it_was_tuned(tmp_path: Path) -> None:
    tensors = stored(tmp_path, "standard")
    m = len(tensors["b_enc"])
    for factor in (torch.ones(m), torch.full((m,), 2.0)):
        safetensors.torch.save_file({**tensors, "scaling_factor": factor}, tmp_path / "sae_weights.safetensors")
        if factor[0] == 1:
            assert len(saelens.read(tmp_path)) == 1
        else:
            with pytest.raises(UserError, match="scaling_factor is not 1"):
                saelens.read(tmp_path)


def test_variants_without_a_form_name_the_route(made: Made) -> None:
    assert "circuit-tracer" in (saelens.refuse([made("clt", "threshold")]) or "")
    assert "--thresholds" in (saelens.refuse([made("transcoder", "topk")]) or "")
    assert "sparsify" in (saelens.refuse([made("sae", "groupmax")]) or "")
    assert saelens.refuse([made("sae", "topk")]) is None
