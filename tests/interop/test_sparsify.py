"""sparsify's files say what the canonical form says, and are read as sparsify means them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.interop.conftest import LATENTS, WIDTH, K, Made, written
from thresher.cache.errors import UserError
from thresher.interop import sparsify
from thresher.interop.canonical import codes, decoded, from_coder, to_coder
from thresher.interop.formats import Exported

FORMS = [("sae", "topk", False), ("sae", "groupmax", False), ("transcoder", "topk", False),
         ("transcoder", "topk", True), ("transcoder", "groupmax", True)]  # fmt: skip


def equation(config: Mapping[str, Any], s: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Code and output of SparseCoder, as its source has them."""
    s = {name: tensor.double() for name, tensor in s.items()}
    pre = torch.relu((x if config["transcode"] else x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"])
    k, z = config["k"], torch.zeros_like(pre)
    for row, values in enumerate(pre):
        if config["activation"] == "topk":
            best = values.argsort(descending=True)[:k]
        else:
            best = torch.stack([g * (LATENTS // k) + group.argmax() for g, group in enumerate(values.chunk(k))])
        z[row, best] = values[best]
    y = z @ s["W_dec"] + s["b_dec"]
    return z, y + x @ s["W_skip"].T if "W_skip" in s else y


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "sae.safetensors")


@pytest.mark.parametrize(("kind", "firing", "skip"), FORMS)
def test_what_is_written_computes_the_same(
    kind, firing, skip: bool, made: Made, facts, rows: Tensor, tmp_path: Path
) -> None:
    dictionary = made(kind, firing, skip=skip)
    sparsify.write(tmp_path, [Exported(dictionary, facts)])
    assert written(tmp_path) == {"cfg.json", "sae.safetensors"}
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert {name: config[name] for name in ("activation", "num_latents", "k", "transcode", "skip_connection")} == {
        "activation": firing, "num_latents": LATENTS, "k": K, "transcode": kind == "transcoder",
        "skip_connection": skip,
    }  # fmt: skip
    assert (config["d_in"], config["expansion_factor"], config["multi_topk"]) == (WIDTH, LATENTS // WIDTH, False)
    stored = tensors_of(tmp_path)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        "encoder.weight": (LATENTS, WIDTH), "encoder.bias": (LATENTS,), "W_dec": (LATENTS, WIDTH), "b_dec": (WIDTH,),
        **({"W_skip": (WIDTH, WIDTH)} if skip else {}),
    }  # fmt: skip
    z, y = equation(config, stored, rows)
    expected = codes(dictionary, 0, rows)
    assert (expected > 0).any()
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
    whole = decoded(dictionary, [expected], [rows])[0]
    torch.testing.assert_close(y, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_its_files_are_read_as_it_computes(
    activation: str, skip: bool, transcode: bool, rows: Tensor, tmp_path: Path
) -> None:
    config, stored = theirs(tmp_path / "layers.2.mlp", activation=activation, skip=skip, transcode=transcode)
    [foreign] = sparsify.read(tmp_path / "layers.2.mlp")
    dictionary = foreign.readings[0].dictionary
    z, y = equation(config, stored, rows)
    assert (z > 0).any()
    torch.testing.assert_close(codes(dictionary, 0, rows), z)
    torch.testing.assert_close(decoded(dictionary, [z], [rows])[0], y)
    own_z, own_y = foreign.readings[0].forward([rows])
    torch.testing.assert_close(own_z[0], z)
    torch.testing.assert_close(own_y[0], y)
    assert dictionary.writes == ("blocks.2.hook_mlp_out",)
    assert dictionary.reads == (("blocks.2.mlp.hook_in",) if transcode else dictionary.writes)
    again = from_coder(to_coder(dictionary._replace(layers=(2,))))
    assert sparsify.refuse([again]) is None, "what came in goes out again"
    assert sparsify.config(Exported(again, {}))["transcode"] is transcode
    for name, tensor in sparsify.tensors(again).items():
        torch.testing.assert_close(tensor, stored[name], rtol=1e-4, atol=1e-5)


def theirs(
    folder: Path, activation: str = "topk", skip: bool = False, transcode: bool = False, **settings: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A directory as sparsify writes it."""
    rng = torch.Generator().manual_seed(8)
    shapes = {"encoder.weight": (LATENTS, WIDTH), "encoder.bias": (LATENTS,), "W_dec": (LATENTS, WIDTH),
              "b_dec": (WIDTH,), **({"W_skip": (WIDTH, WIDTH)} if skip else {})}  # fmt: skip
    stored = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    config = {
        "activation": activation, "expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K,
        "multi_topk": False, "skip_connection": skip, "transcode": transcode, "d_in": WIDTH, **settings,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(stored, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return config, stored


@pytest.mark.parametrize(
    ("module", "hook"),
    [
        ("layers.10", "blocks.10.hook_resid_post"),
        ("h.10.mlp", "blocks.10.hook_mlp_out"),
        ("gpt_neox.layers.10.attention", "blocks.10.hook_attn_out"),
        ("embed_in", "embed_in"),
    ],
)
def test_a_directory_is_named_after_a_module(module: str, hook: str, tmp_path: Path) -> None:
    theirs(tmp_path / module)
    [foreign] = sparsify.read(tmp_path / module)
    assert foreign.readings[0].dictionary.reads == (hook,)


def test_a_set_is_a_directory_per_module(made: Made, facts, tmp_path: Path) -> None:
    items = []
    for layer in range(3):
        sites = {"reads": (f"L{layer:02d}.mlp_in",), "writes": (f"L{layer:02d}.mlp_out",), "layers": (layer,)}
        own = {**facts["dictionary"], "reads": sites["reads"], "writes": sites["writes"]}
        items.append(Exported(made("transcoder", "topk", seed=layer)._replace(**sites), {**facts, "dictionary": own}))
    assert sparsify.refuse([item.dictionary for item in items]) is None
    sparsify.write(tmp_path, items)
    assert written(tmp_path) == {f"layers.{i}.mlp/{n}" for i in range(3) for n in ("cfg.json", "sae.safetensors")}
    found = [each.readings[0].dictionary for each in sparsify.read(tmp_path)]
    assert [each.reads for each in found] == [("L00.mlp_in",), ("L01.mlp_in",), ("L02.mlp_in",)]
    assert "layers.0.mlp" in (sparsify.refuse([items[0].dictionary] * 2) or "")


def test_a_set_comes_in_the_order_of_its_layers(tmp_path: Path) -> None:
    for module in ("layers.10.mlp", "layers.2.mlp"):
        theirs(tmp_path / module, transcode=True)
    assert [each.readings[0].dictionary.layers for each in sparsify.read(tmp_path)] == [(2,), (10,)]


def test_several_dtypes_are_refused_since_the_first_would_round_the_rest(tmp_path: Path) -> None:
    _, stored = theirs(tmp_path)
    stored["b_dec"] = stored["b_dec"].bfloat16()
    safetensors.torch.save_file(stored, tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match="bfloat16 and float32; expected one dtype"):
        sparsify.read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"k": 5, "activation": "groupmax"}, "expected a divisor of the 48 latents"),
        ({"k": 49}, "k is 49"),
        ({"num_latents": 40}, "encoder.weight has shape"),
        ({"skip_connection": True}, "no tensor 'W_skip'"),
        ({"signed": True}, "signed is true: the k largest magnitudes fire and codes may be negative"),
        ({"batch_topk": True, "groups": 3}, r"neither sparsify .* knows \(batch_topk: true, groups: 3\)"),
    ],
)
def test_what_it_cannot_be_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    theirs(tmp_path, **settings)
    with pytest.raises(UserError, match=words):
        sparsify.read(tmp_path)


def test_settings_of_other_versions_that_are_off_change_nothing(tmp_path: Path) -> None:
    theirs(tmp_path / "plain")
    theirs(tmp_path / "old", signed=False, group=None)
    plain, old = (sparsify.read(tmp_path / name)[0].readings[0].dictionary for name in ("plain", "old"))
    assert torch.equal(plain.sources[0].W_enc, old.sources[0].W_enc)
    assert (plain.firing, plain.k) == (old.firing, old.k)


def test_variants_without_a_form_name_the_route(made: Made) -> None:
    assert "--to circuit-tracer" in (sparsify.refuse([made("clt", "topk")]) or "")
    assert "--to saelens" in (sparsify.refuse([made("sae", "relu")]) or "")
    assert "--to saelens" in (sparsify.refuse([made("transcoder", "threshold")]) or "")
    assert "writes 12 from 16" in (sparsify.refuse([made("transcoder", "topk", out=12)]) or "")
    elsewhere = made("transcoder", "topk")._replace(reads=("L01.resid_mid",))
    assert "input and writes the output of one module" in (sparsify.refuse([elsewhere]) or "")
