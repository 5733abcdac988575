"""OpenMOSS's files are read as its own classes compute, in every layout, and refused where that has no form here."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.interop.conftest import LAYERS, WIDTH
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.interop import openmoss
from thresher.interop.canonical import codes, decoded
from thresher.interop.formats import Foreign, Reading
from thresher.interop.importing import Naming, import_dictionaries
from thresher.train.files import load_run

D, M, K = WIDTH, 48, 4
LOG = "activation_function.log_jumprelu_threshold"
NORM = "dataset_average_activation_norm"
Tensors = dict[str, Tensor]
Config = Mapping[str, Any]


def draws() -> Callable[..., Tensor]:
    rng = torch.Generator().manual_seed(7)
    return lambda *shape: torch.randn(shape, generator=rng)


def sae(act: str = "jumprelu", out: str = "hook_resid_post", **settings: Any) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and config of an SAE, or of a transcoder where `out` is another hook."""
    draw, hooks = draws(), ("blocks.1.hook_resid_post", f"blocks.1.{out}")
    tensors = {"W_E": draw(D, M) / 4, "b_E": draw(M) / 4, "W_D": draw(M, D), "b_D": draw(D)}
    tensors |= {f"{NORM}.{hook}": torch.tensor(3.0 + i) for i, hook in enumerate(dict.fromkeys(hooks))}
    if act == "jumprelu":
        tensors[LOG] = draw(M) - 1
    config = {
        "sae_type": "sae", "hook_point_in": hooks[0], "hook_point_out": hooks[1], "d_model": D, "expansion_factor": 3,
        "act_fn": act, "top_k": K, "use_decoder_bias": True, "norm_activation": "dataset-wise",
    }  # fmt: skip
    return tensors, config | settings


def clt(act: str = "jumprelu", **settings: Any) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and config of a CLT of all layers."""
    draw, layers = draws(), range(LAYERS)
    hooks = [[f"blocks.{i}.{name}" for i in layers] for name in ("mlp.hook_in", "hook_mlp_out")]
    tensors = {"W_E": draw(LAYERS, D, M) / 4, "b_E": draw(LAYERS, M) / 4}
    tensors |= {f"W_D.{t}": draw(t + 1, M, D) for t in layers} | {f"b_D.{t}": draw(D) for t in layers}
    tensors |= {f"{NORM}.{hook}": torch.tensor(2.0 + i) for i, hook in enumerate(hooks[0] + hooks[1])}
    if act == "jumprelu":
        tensors[LOG] = draw(LAYERS, M) - 1
    config = {
        "sae_type": "clt", "hook_points_in": hooks[0], "hook_points_out": hooks[1], "d_model": D, "expansion_factor": 3,
        "act_fn": act, "top_k": K, "norm_activation": "dataset-wise",
    }  # fmt: skip
    return tensors, config | settings


def stored(folder: Path, tensors: Tensors, config: Config, weights: str = "sae_weights.safetensors") -> Path:
    file = folder / weights
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def scales(t: Tensors, config: Config) -> tuple[list[float], list[float]]:
    """√d / norm, of hooks read and of hooks written."""
    sides = []
    for side in ("in", "out"):
        hooks = config.get(f"hook_points_{side}") or [config[f"hook_point_{side}"]]
        known = config["norm_activation"] == "dataset-wise"
        sides.append([math.sqrt(D) / float(t[f"{NORM}.{hook}"]) if known else 1.0 for hook in hooks])
    return sides[0], sides[1]


def activated(hidden: Tensor, config: Config, theta: Tensor | None) -> Tensor:
    """Its activation function, of what it calls hidden_pre."""
    if config["act_fn"] == "jumprelu":
        assert theta is not None
        return hidden * (hidden > theta)
    hidden = hidden * (hidden > 0)
    if config["act_fn"] == "relu":
        return hidden
    return hidden * (hidden >= hidden.topk(config["top_k"], dim=1).values[:, -1:])


def its_own(t: Tensors, config: Config, xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """normalize_activations, encode, decode and denormalize_activations: codes by source, outputs by target."""
    t = {name: tensor.double() for name, tensor in t.items()}
    if config["sae_type"] == "sae":
        t["W_E"], t["b_E"], t["W_D.0"] = t["W_E"][None], t["b_E"][None], t["W_D"][None]
        t["b_D.0"] = t.get("b_D", torch.zeros(D, dtype=torch.float64))
        if LOG in t:
            t[LOG] = t[LOG][None]
    s_in, s_out = scales(t, config)
    count = len(s_in)
    z = []
    for s in range(count):
        hidden = s_in[s] * xs[s] @ t["W_E"][s] + t["b_E"][s]
        n = sum(t[f"W_D.{to}"][s].square().sum(1) for to in range(s, count)).sqrt()
        n = n if config.get("sparsity_include_decoder_norm", True) else torch.ones(M, dtype=torch.float64)
        z.append(activated(hidden * n, config, t[LOG][s].exp() if LOG in t else None) / n)
    y = [(sum(z[s] @ t[f"W_D.{to}"][s] for s in range(to + 1)) + t[f"b_D.{to}"]) / s_out[to] for to in range(count)]
    return z, y


def norms(t: Tensors, config: Config, source: int) -> Tensor:
    """What codes that are counted by pre times norm are multiplied with here."""
    if config["act_fn"] != "topk" or not config.get("sparsity_include_decoder_norm", True):
        return torch.ones(M, dtype=torch.float64)
    if config["sae_type"] == "sae":
        return t["W_D"].double().norm(dim=1)
    return torch.cat([t[f"W_D.{to}"][source].double() for to in range(source, LAYERS)], dim=1).norm(dim=1)


def agree(reading: Reading, xs: Sequence[Tensor], z: Sequence[Tensor], y: Sequence[Tensor]) -> None:
    """The stored tensors' equation and the folded weights both give these codes and outputs."""
    shown, out = reading.forward(xs)
    ours = [codes(reading.dictionary, s, x) for s, x in enumerate(xs)]
    written = decoded(reading.dictionary, ours, xs)
    for expected, *others in [*zip(z, shown, ours, strict=True), *zip(y, out, written, strict=True)]:
        for other in others:
            torch.testing.assert_close(other, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
    for part in ours:
        assert 0.01 < float((part > 0).double().mean()) < 0.9, "codes that never or always fire prove nothing"


def inputs(rows: Tensor, count: int) -> list[Tensor]:
    return [rows + 0.1 * s for s in range(count)]


def read(folder: Path) -> Foreign:
    [foreign] = openmoss.read(folder)
    return foreign


@pytest.mark.parametrize("by_norm", [True, False, None])
@pytest.mark.parametrize("norm", ["dataset-wise", "inference"])
@pytest.mark.parametrize("act", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("made", [sae, clt])
def test_its_conventions_fold_exactly(
    made: Callable[..., Any], act: str, norm: str, by_norm: bool | None, rows: Tensor, tmp_path: Path
) -> None:
    settings = {} if by_norm is None else {"sparsity_include_decoder_norm": by_norm}
    tensors, config = made(act, norm_activation=norm, **settings)
    foreign = read(stored(tmp_path, tensors, config))
    assert (foreign.firing, foreign.k) == (act, float(K) if act == "topk" else None)
    xs = inputs(rows, LAYERS if made is clt else 1)
    z, y = its_own(tensors, config, xs)
    first = foreign.readings[0]
    assert first.label == "as its config says"
    agree(first, xs, [part * norms(tensors, config, s) for s, part in enumerate(z)], y)
    other = {r.label for r in foreign.readings[1:]}
    assert ("activations not scaled" in other) == (norm == "dataset-wise")
    assert any("in the gate" in label for label in other) == (act != "relu")


def test_a_transcoder_has_a_scale_for_each_side(rows: Tensor, tmp_path: Path) -> None:
    tensors, config = sae("jumprelu", out="hook_mlp_out")
    foreign = read(stored(tmp_path, tensors, config))
    dictionary = foreign.readings[0].dictionary
    assert (dictionary.kind, dictionary.writes, dictionary.layers) == ("transcoder", ("blocks.1.hook_mlp_out",), (1,))
    agree(foreign.readings[0], [rows], *its_own(tensors, config, [rows]))


def test_the_other_gate_is_the_other_readings(rows: Tensor, tmp_path: Path) -> None:
    tensors, config = sae("jumprelu")
    foreign = read(stored(tmp_path, tensors, config))
    [other] = [r for r in foreign.readings if r.label == "decoder norms not in the gate"]
    agree(other, [rows], *its_own(tensors, config | {"sparsity_include_decoder_norm": False}, [rows]))
    [raw] = [r for r in foreign.readings if r.label == "activations not scaled"]
    agree(raw, [rows], *its_own(tensors, config | {"norm_activation": "inference"}, [rows]))


def test_without_a_decoder_bias_there_is_none(rows: Tensor, tmp_path: Path) -> None:
    tensors, config = sae("relu", use_decoder_bias=False)
    del tensors["b_D"]
    agree(read(stored(tmp_path, tensors, config)).readings[0], [rows], *its_own(tensors, config, [rows]))


def its_folding(tensors: Tensors, config: Config) -> Tensors:
    """standardize_parameters_of_dataset_norm, which leaves an SAE's thresholds as they were."""
    t, (s_in, s_out) = dict(tensors), scales(tensors, config)
    if config["sae_type"] == "sae":
        return t | {"b_E": t["b_E"] / s_in[0], "b_D": t["b_D"] / s_out[0], "W_D": t["W_D"] * s_in[0] / s_out[0]}
    factors = torch.tensor(s_in)
    t["b_E"] = t["b_E"] / factors[:, None]
    if LOG in t:
        t[LOG] = (t[LOG].exp() / factors[:, None]).log()
    for to in range(LAYERS):
        t[f"b_D.{to}"] = t[f"b_D.{to}"] / s_out[to]
        t[f"W_D.{to}"] = t[f"W_D.{to}"] * (factors[: to + 1] / s_out[to])[:, None, None]
    return t


@pytest.mark.parametrize("act", ["jumprelu", "topk"])
@pytest.mark.parametrize("made", [sae, clt])
def test_its_own_folding_can_be_taken_back(made: Callable[..., Any], act: str, rows: Tensor, tmp_path: Path) -> None:
    """What it folded no longer computes what was trained; the reading that takes it back does."""
    tensors, config = made(act)
    folded = its_folding(tensors, config)
    foreign = read(stored(tmp_path, folded, {**config, "norm_activation": "inference"}))
    [back] = [r for r in foreign.readings if r.label == "its own folding taken back"]
    xs = inputs(rows, LAYERS if made is clt else 1)
    z, y = its_own(tensors, config, xs)
    for s, part in enumerate(z):
        expected = part * norms(tensors, config, s)
        torch.testing.assert_close(codes(back.dictionary, s, xs[s]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back.forward(xs)[1][-1], y[-1], rtol=1e-4, atol=1e-3)
    if act == "jumprelu":
        fired = codes(foreign.readings[0].dictionary, 0, xs[0]) > 0
        assert not torch.equal(fired, z[0] > 0), "as stored, other latents fire"


def test_a_latent_that_writes_nothing_never_fires(rows: Tensor, tmp_path: Path) -> None:
    tensors, config = sae("jumprelu")
    tensors["W_D"][:5] = 0.0
    tensors["b_E"][:5] = 9.0
    reading = read(stored(tmp_path, tensors, config)).readings[0]
    for z in (reading.forward([rows])[0][0], codes(reading.dictionary, 0, rows)):
        assert torch.isfinite(z).all()
        assert not z[:, :5].any()
        assert z[:, 5:].any()
    theta = reading.dictionary.sources[0].threshold
    assert theta is not None
    assert torch.isfinite(theta).all(), "an infinite one would read as damage once it is written"


def llama_scope(folder: Path, **settings: Any) -> tuple[Tensors, dict[str, Any]]:
    """A directory in the layout of Llama Scope, and its tensors by their new names."""
    t, _ = sae("relu", out="hook_mlp_out")
    old = {
        "encoder.weight": t["W_E"].T, "encoder.bias": t["b_E"], "decoder.weight": t["W_D"].T, "decoder.bias": t["b_D"],
    }  # fmt: skip
    config = {
        "hook_point_in": "blocks.1.mlp.hook_in", "hook_point_out": "blocks.1.hook_mlp_out", "d_model": D, "d_sae": M,
        "act_fn": "jumprelu", "jump_relu_threshold": 0.3, "top_k": 50, "norm_activation": "dataset-wise",
        NORM: {"in": 2.0, "out": 7.0}, "apply_decoder_bias_to_pre_encoder": False, "use_glu_encoder": False,
    }  # fmt: skip
    stored(folder, old, config | settings, "checkpoints/final.safetensors")
    (folder / "config.json").rename(folder / "hyperparams.json")
    return {name: tensor.double() for name, tensor in t.items()}, config


@pytest.mark.parametrize("subtracts", [False, True])
def test_llama_scopes_threshold_is_in_raw_units(subtracts: bool, rows: Tensor, tmp_path: Path) -> None:
    t, _ = llama_scope(tmp_path, apply_decoder_bias_to_pre_encoder=subtracts)
    foreign = read(tmp_path)
    s_in, s_out = math.sqrt(D) / 2.0, math.sqrt(D) / 7.0
    pre = (s_in * rows - (t["b_D"] if subtracts else 0)) @ t["W_E"] + t["b_E"]
    z = pre * (pre > 0.3 * s_in)
    agree(foreign.readings[0], [rows], [z], [(z @ t["W_D"] + t["b_D"]) / s_out])
    assert foreign.readings[0].dictionary.reads == ("blocks.1.mlp.hook_in",)
    [other] = [r for r in foreign.readings if r.label == "threshold for scaled activations"]
    z = pre * (pre > 0.3)
    agree(other, [rows], [z], [(z @ t["W_D"] + t["b_D"]) / s_out])
    [gated] = [r for r in foreign.readings if r.label == "decoder norms in the gate"]
    z = pre * (pre * t["W_D"].norm(dim=1) > 0.3 * s_in)
    agree(gated, [rows], [z], [(z @ t["W_D"] + t["b_D"]) / s_out])


@pytest.mark.parametrize("name", ["log_jumprelu_threshold", LOG])
def test_the_layout_between_has_old_names_and_a_threshold_per_latent(name: str, rows: Tensor, tmp_path: Path) -> None:
    tensors, config = sae("jumprelu")
    old = {
        "encoder.weight": tensors["W_E"].T, "encoder.bias": tensors["b_E"], "decoder.weight": tensors["W_D"].T,
        "decoder.bias": tensors["b_D"], name: tensors[LOG], f"{NORM}.in": torch.tensor(3.0),
        f"{NORM}.out": torch.tensor(3.0),
    }  # fmt: skip
    agree(read(stored(tmp_path, old, config)).readings[0], [rows], *its_own(tensors, config, [rows]))


@pytest.mark.parametrize("norm", [math.nan, math.inf, 0.0, -1.0, 0])
def test_norms_that_were_never_set_are_refused_where_they_count(norm: float, rows: Tensor, tmp_path: Path) -> None:
    tensors, config = sae("jumprelu")
    tensors[f"{NORM}.blocks.1.hook_resid_post"] = torch.tensor(float(norm))
    with pytest.raises(UserError, match="was never set"):
        read(stored(tmp_path, tensors, config))
    foreign = read(stored(tmp_path, tensors, config | {"norm_activation": "inference"}))
    assert "its own folding taken back" not in [r.label for r in foreign.readings]
    del tensors[f"{NORM}.blocks.1.hook_resid_post"]
    with pytest.raises(UserError, match="is missing, or not finite"):
        read(stored(tmp_path, tensors, config))


@pytest.mark.parametrize(
    ("made", "settings", "words"),
    [
        (sae, {"sae_type": "crosscoder"}, "sae_type is 'crosscoder'"),
        (sae, {"sae_type": "lorsa"}, "sae_type is 'lorsa'"),
        (sae, {"use_glu_encoder": True}, "products of two functions"),
        (sae, {"norm_activation": "token-wise"}, "norm_activation is 'token-wise'"),
        (sae, {"norm_activation": "batch-wise"}, "norm_activation is 'batch-wise'"),
        (sae, {"act_fn": "batchtopk"}, "other tokens of the batch.*topk_to_jumprelu_conversion"),
        (clt, {"act_fn": "batchtopk"}, "other tokens of the batch"),
        (clt, {"act_fn": "batchlayertopk"}, "other tokens and layers of the batch"),
        (clt, {"act_fn": "layertopk"}, "layers compete for k latents of a token"),
        (sae, {"act_fn": "swish"}, "act_fn is 'swish'"),
        (sae, {"expansion_factor": 2}, "W_E has shape"),
        (sae, {"hook_point_out": ""}, "has no hook_point_out"),
        (clt, {"hook_points_out": ["blocks.0.hook_mlp_out"]}, "3 hook_points_in and 1 hook_points_out"),
        (clt, {"hook_points_in": [], "hook_points_out": []}, "has no hook_points_in"),
    ],
)
def test_what_has_no_form_here_is_refused_with_the_reason(
    made: Callable[..., Any], settings: Config, words: str, tmp_path: Path
) -> None:
    tensors, config = made()
    with pytest.raises(UserError, match=words):
        read(stored(tmp_path, tensors, config | settings))


def test_layers_that_compete_are_no_matter_where_there_is_one(rows: Tensor, tmp_path: Path) -> None:
    tensors, config = clt("topk")
    keep = {name: tensor for name, tensor in tensors.items() if name.endswith(".0") or "blocks.0" in name}
    keep |= {"W_E": tensors["W_E"][:1], "b_E": tensors["b_E"][:1]}
    hooks = {f"hook_points_{side}": config[f"hook_points_{side}"][:1] for side in ("in", "out")}
    foreign = read(stored(tmp_path, keep, config | hooks | {"act_fn": "layertopk"}))
    z, y = its_own(keep, config | hooks, [rows])
    agree(foreign.readings[0], [rows], [z[0] * keep["W_D.0"][0].double().norm(dim=1)], y)


@pytest.mark.parametrize("top_k", [0, 49, None, 2.5])
def test_topk_needs_a_k(top_k: Any, tmp_path: Path) -> None:
    tensors, config = sae("topk", top_k=top_k)
    with pytest.raises(UserError, match="top_k is"):
        read(stored(tmp_path, tensors, config))


def test_directories_without_its_files_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        openmoss.read(tmp_path)
    tensors, config = sae()
    stored(tmp_path, tensors | {"W_E_glu": torch.zeros(2)}, config)
    with pytest.raises(UserError, match="does not know: W_E_glu"):
        openmoss.read(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds none of sae_weights\.safetensors"):
        openmoss.read(tmp_path)
    with pytest.raises(UserError, match="is no directory of OpenMOSS"):
        openmoss.read(tmp_path / "config.json")


def test_a_cross_layer_transcoder_becomes_a_run(cache: CacheReader, tmp_path: Path) -> None:
    tensors, config = clt("topk")
    folder = stored(tmp_path / "theirs", tensors, config)
    recipe = {"target": {}, "data": {}, "harvest": {}, "evaluate": {}}
    [done] = import_dictionaries(folder, "openmoss", cache, recipe, tmp_path / "runs", Naming("moss"))
    run = load_run(done.path)
    assert run.dictionary.reads == tuple(f"L0{i}.mlp_in" for i in range(LAYERS))
    assert run.config["dictionary"]["firing"] == "topk"
    assert all(row.folding < 1e-12 for row in done.readings)
    assert done.readings[0].l0 == pytest.approx(K)
