"""Gemma Scope's arrays are canonical already; what their paths leave open is guessed and can be overruled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.interop.conftest import LATENTS, LAYERS, WIDTH, Made, written
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.interop import npz
from thresher.interop.canonical import codes, decoded
from thresher.interop.formats import Exported, Foreign
from thresher.interop.importing import Naming, import_dictionaries
from thresher.train.files import load_run

RECIPE = {"target": {}, "data": {}, "harvest": {}, "evaluate": {}}


@pytest.fixture
def scope(tmp_path: Path) -> Path:
    """Far enough down that the test's own name is no part of what paths say."""
    return tmp_path / "a" / "b" / "c" / "d" / "e" / "f" / "g"


def arrays(seed: int = 9, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random weights, thresholds above 0."""
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (WIDTH, LATENTS), "W_dec": (LATENTS, WIDTH), "b_enc": (LATENTS,), "b_dec": (WIDTH,),
              "threshold": (LATENTS,), **shapes}  # fmt: skip
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return made | {"threshold": np.abs(made["threshold"])}


def equation(s: Mapping[str, np.ndarray], x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """JumpReLU on raw activations."""
    pre = x.numpy() @ s["W_enc"].astype(np.float64) + s["b_enc"]
    code = np.maximum(pre, 0) * (pre > s["threshold"])
    return code, code @ s["W_dec"].astype(np.float64) + s["b_dec"]


def save(folder: Path, stored: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **stored)
    return folder / "params.npz"


def save_second(file: Path, stored: Mapping[str, np.ndarray]) -> None:
    """As Gemma Scope 2: safetensors with small letters."""
    file.parent.mkdir(parents=True, exist_ok=True)
    small = {name.lower(): torch.from_numpy(array).contiguous() for name, array in stored.items()}
    safetensors.torch.save_file(small, file)


def only(path: Path) -> Foreign:
    [foreign] = npz.read(path)
    return foreign


def assert_computes(foreign: Foreign, expected: tuple[np.ndarray, np.ndarray], x: Tensor, reading: int = 0) -> None:
    """Both the canonical form and the tool's own equation."""
    one = foreign.readings[reading]
    z = codes(one.dictionary, 0, x)
    assert (z > 0).any()
    for got in ((z, decoded(one.dictionary, [z], [x])[0]), tuple(part[0] for part in one.forward([x]))):
        for tensor, array in zip(got, expected, strict=True):
            torch.testing.assert_close(tensor, torch.from_numpy(array), rtol=1e-9, atol=1e-9 * np.abs(array).max())


@pytest.mark.parametrize("form", ["relu", "threshold"])
@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_what_is_written_reads_back_the_same(kind, form, made: Made, facts, rows: Tensor, scope: Path) -> None:
    dictionary = made(kind, form)
    own = {**facts["dictionary"], "reads": dictionary.reads, "writes": dictionary.writes}
    scope.mkdir(parents=True)
    npz.write(scope, [Exported(dictionary, {**facts, "dictionary": own})])
    assert written(scope) == {"params.npz", "thresher.json"}
    with np.load(scope / "params.npz") as archive:
        stored = {name: archive[name] for name in archive.files}
    assert {name: (array.dtype, array.shape) for name, array in stored.items()} == {
        name: (array.dtype, array.shape) for name, array in arrays().items()
    }
    z, y = equation(stored, rows)
    expected = codes(dictionary, 0, rows)
    np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
    np.testing.assert_allclose(y, decoded(dictionary, [expected], [rows])[0], rtol=1e-5, atol=1e-3)
    assert_computes(only(scope), (z, y), rows)
    again = only(scope).readings[0].dictionary
    assert (again.kind, again.reads, again.writes) == (kind, dictionary.reads, dictionary.writes)
    assert json.loads((scope / "thresher.json").read_text())["weights_sha256"] == "00"


@pytest.mark.parametrize("small", [False, True])
def test_names_are_taken_in_either_case(small: bool, rows: Tensor, scope: Path) -> None:
    stored = arrays()
    path = save(scope, {name.lower() if small else name: array for name, array in stored.items()})
    assert_computes(only(path), equation(stored, rows), rows)


PATHS = [
    ("gemma-scope-2b-pt-res/layer_2/width_16k/average_l0_71", "blocks.2.hook_resid_post", 71),
    ("gemma-scope-2b-pt-att/layer_2/width_16k/average_l0_5", "blocks.2.attn.hook_z", 5),
    ("gemma-scope-2b-pt-mlp/layer_2/width_16k/average_l0_5", "blocks.2.hook_mlp_out", 5),
    ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "hook_embed", 6),
    ("somewhere/layer_2", "blocks.2.hook_resid_post", None),
]


@pytest.mark.parametrize(("path", "hook", "l0"), PATHS)
def test_a_path_says_what_it_can(path: str, hook: str, l0: int | None, scope: Path) -> None:
    foreign = only(save(scope / path, arrays()))
    dictionary = foreign.readings[0].dictionary
    assert (dictionary.kind, dictionary.reads, dictionary.writes) == ("sae", (hook,), (hook,))
    assert foreign.facts["average_l0"] == l0
    assert foreign.sites_guessed


def test_translators_of_the_first_scope_read_the_normalised_residual(scope: Path) -> None:
    foreign = only(save(scope / "gemma-scope-2b-pt-transcoders/layer_2/width_16k/average_l0_5", arrays()))
    dictionary = foreign.readings[0].dictionary
    assert (dictionary.kind, dictionary.reads) == ("transcoder", ("blocks.2.ln2.hook_normalized",))
    assert dictionary.writes == ("blocks.2.hook_mlp_out",)


def test_rows_of_an_embedding_are_read_before_the_model_scales_them(rows: Tensor, scope: Path) -> None:
    stored = arrays()
    foreign = only(save(scope / "embedding" / "width_4k", stored))
    assert [one.label for one in foreign.readings] == [
        "embedding, weights times √d", "embedding, b_dec times √d too", "as it is stored",
    ]  # fmt: skip
    scaled = {**stored, "W_enc": stored["W_enc"].astype(np.float64) / 4, "W_dec": stored["W_dec"] * 4}  # √16
    assert_computes(foreign, equation(scaled, rows), rows, 0)
    assert_computes(foreign, equation({**scaled, "b_dec": stored["b_dec"] * 4}, rows), rows, 1)
    assert_computes(foreign, equation(stored, rows), rows, 2)
    assert only(save(scope / "layer_0", stored)).readings[0].label == "as it is stored"


def test_a_skip_connection_of_the_second_scope_is_applied_from_the_right(rows: Tensor, scope: Path) -> None:
    stored = arrays(affine_skip_connection=(WIDTH, 12), W_dec=(LATENTS, 12), b_dec=(12,))
    file = scope / "transcoder" / "layer_2_width_16k_l0_small_affine" / "params.safetensors"
    save_second(file, stored)
    foreign = only(file.parent)
    code, output = equation(stored, rows)
    assert_computes(foreign, (code, output + rows.numpy() @ stored["affine_skip_connection"]), rows)
    dictionary = foreign.readings[0].dictionary
    assert (dictionary.kind, dictionary.reads) == ("transcoder", ("blocks.2.mlp.hook_in",))
    assert dictionary.W_skip is not None
    assert dictionary.W_skip[0].shape == (12, WIDTH)


def test_a_config_beside_the_second_scope_names_the_sites(scope: Path) -> None:
    save_second(scope / "layer_2" / "params.safetensors", arrays())
    config = {"hf_hook_point_in": "model.layers.2.self_attn.o_proj.input", "model_name": "gemma-3-270m"}
    (scope / "layer_2" / "config.json").write_text(json.dumps(config))
    foreign = only(scope / "layer_2")
    assert foreign.readings[0].dictionary.reads == ("blocks.2.attn.hook_z",)
    assert foreign.facts["model"] == "gemma-3-270m"
    assert not foreign.sites_guessed


@pytest.mark.parametrize("skip", [False, True])
def test_layers_of_one_dictionary_use_the_slots_from_their_own(skip: bool, rows: Tensor, scope: Path) -> None:
    extra = {"affine_skip_connection": (WIDTH, WIDTH)} if skip else {}
    each = [arrays(20 + i, W_dec=(LATENTS, LAYERS, WIDTH), **extra) for i in range(LAYERS)]
    for i, stored in enumerate(each):
        stored["W_dec"][:, :i] = 1e6  # noise where a layer would write to earlier ones
        save_second(scope / "clt" / "width_262k" / f"params_layer_{i}.safetensors", stored)
    foreign = only(scope / "clt" / "width_262k")
    dictionary = foreign.readings[0].dictionary
    xs = [rows + i for i in range(LAYERS)]
    pre = [x.numpy() @ s["W_enc"].astype(np.float64) + s["b_enc"] for x, s in zip(xs, each, strict=True)]
    code = [np.maximum(p, 0) * (p > s["threshold"]) for p, s in zip(pre, each, strict=True)]
    z = [codes(dictionary, s, x) for s, x in enumerate(xs)]
    own_z, own_y = foreign.readings[0].forward(xs)
    for t, y in enumerate(decoded(dictionary, z, xs)):
        expected = each[t]["b_dec"] + sum(code[s] @ each[s]["W_dec"][:, t].astype(np.float64) for s in range(t + 1))
        if skip:
            expected = expected + xs[t].numpy() @ each[t]["affine_skip_connection"]
        np.testing.assert_allclose(z[t], code[t], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-6)
        np.testing.assert_allclose(own_y[t], expected, rtol=1e-9, atol=1e-6)
        np.testing.assert_allclose(own_z[t], code[t], rtol=1e-9, atol=1e-9)
    assert dictionary.kind == "clt"
    assert dictionary.reads[2] == "blocks.2.mlp.hook_in"
    (scope / "clt" / "width_262k" / "params_layer_1.safetensors").unlink()
    with pytest.raises(UserError, match="of layers 0, 2, with W_dec for 3 layers"):
        npz.read(scope)


def test_layers_below_a_directory_are_a_set(scope: Path) -> None:
    for layer in (1, 0):
        save(scope / f"layer_{layer}" / "width_16k" / "average_l0_7", arrays(layer))
    assert [each.readings[0].dictionary.reads for each in npz.read(scope)] == [
        ("blocks.0.hook_resid_post",), ("blocks.1.hook_resid_post",),
    ]  # fmt: skip
    save(scope / "layer_1" / "width_16k" / "average_l0_70", arrays(3))
    with pytest.raises(UserError, match="dictionaries of layer 1"):
        npz.read(scope)


def test_writes_makes_a_transcoder_of_files_that_name_no_sites(cache: CacheReader, rows: Tensor, scope: Path) -> None:
    stored = arrays()
    path = save(scope / "average_l0_9", stored)
    naming = Naming("moved", reads="L01.mlp_in", writes="L01.mlp_out")
    [done] = import_dictionaries(path, "npz", cache, RECIPE, scope / "runs", naming)
    run = load_run(done.path)
    assert (run.dictionary.spec.kind, run.dictionary.reads, run.dictionary.writes) == (
        "transcoder", ("L01.mlp_in",), ("L01.mlp_out",),
    )  # fmt: skip
    code = run.dictionary.encode(0, rows.float())
    np.testing.assert_allclose(code.dense(), equation(stored, rows)[0], rtol=1e-4, atol=1e-3)
    assert run.config["imported"]["average_l0"] == 9
    assert run.config["training"]["held_out"]["l0"] == [done.readings[0].l0]
    [plain] = import_dictionaries(path, "npz", cache, RECIPE, scope / "runs", Naming("plain", reads="L01.mlp_in"))
    assert load_run(plain.path).dictionary.writes == ("L01.mlp_in",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b_enc": np.zeros(3, np.float32)}, "b_enc has shape"),
        ({"scaling_factor": np.full(LATENTS, 2.0)}, "scaling_factor is not 1 everywhere"),
        ({"W_more": np.zeros(3)}, "w_more"),
        ({"threshold": np.full(LATENTS, np.nan)}, "threshold is not finite"),
        ({"b_dec": np.array([None] * WIDTH)}, "no readable archive"),
    ],
)
def test_what_it_cannot_be_is_refused(change: dict[str, Any], words: str, scope: Path) -> None:
    path = save(scope, arrays() | change)
    with pytest.raises(UserError, match=words):
        npz.read(path)


def test_a_scaling_factor_of_one_means_nothing(rows: Tensor, scope: Path) -> None:
    stored = arrays()
    path = save(scope, stored | {"scaling_factor": np.ones(LATENTS, np.float32)})
    assert_computes(only(path), equation(stored, rows), rows)


def test_variants_without_a_form_name_the_route(made: Made) -> None:
    assert "--to circuit-tracer" in (npz.refuse([made("clt", "threshold")]) or "")
    assert "--thresholds" in (npz.refuse([made("sae", "topk")]) or "")
    assert "--to saelens" in (npz.refuse([made("transcoder", "threshold", skip=True)]) or "")
    assert "--to saelens" in (npz.refuse([made("transcoder", "threshold", out=12)]) or "")
    assert npz.refuse([made("sae", "relu")]) is None
