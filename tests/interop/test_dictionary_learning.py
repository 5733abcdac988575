"""dictionary_learning's files say what the canonical form says, and are read as its classes mean them."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.interop.conftest import LATENTS, WIDTH, K, Made, written
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.interop import dictionary_learning as dl
from thresher.interop.canonical import Canonical, codes, decoded, from_coder
from thresher.interop.formats import Exported, Foreign
from thresher.interop.importing import Naming, import_dictionaries
from thresher.train.files import load_run

CLASSES = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
           "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")  # fmt: skip
LINEAR = {"encoder.weight": (LATENTS, WIDTH), "decoder.weight": (WIDTH, LATENTS)}
PLAIN = {"W_enc": (WIDTH, LATENTS), "W_dec": (LATENTS, WIDTH), "b_enc": (LATENTS,), "b_dec": (WIDTH,)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "AutoEncoder": {**LINEAR, "encoder.bias": (LATENTS,), "bias": (WIDTH,)},
    "AutoEncoderNew": {**LINEAR, "encoder.bias": (LATENTS,), "decoder.bias": (WIDTH,)},
    "GatedAutoEncoder": {
        **LINEAR, "decoder_bias": (WIDTH,), "r_mag": (LATENTS,), "gate_bias": (LATENTS,), "mag_bias": (LATENTS,),
    },
    "AutoEncoderTopK": {**LINEAR, "encoder.bias": (LATENTS,), "b_dec": (WIDTH,)},
    "BatchTopKSAE": {**LINEAR, "encoder.bias": (LATENTS,), "b_dec": (WIDTH,)},
    "MatryoshkaBatchTopKSAE": PLAIN,
    "JumpReluAutoEncoder": {**PLAIN, "threshold": (LATENTS,)},
}  # fmt: skip


def equation(kind: str, s: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Code and output of the library's class, as its source has them."""
    s = {name: tensor.double() for name, tensor in s.items()}
    if kind == "JumpReluAutoEncoder":
        pre = x @ s["W_enc"] + s["b_enc"]
        f = torch.relu(pre * (pre > s["threshold"]))
        return f, f @ s["W_dec"] + s["b_dec"]
    if kind == "MatryoshkaBatchTopKSAE":
        post = torch.relu((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"])
        f = post * (post > s["threshold"])
        return f, f @ s["W_dec"] + s["b_dec"]
    W, D = s["encoder.weight"], s["decoder.weight"]
    if kind == "AutoEncoderNew":
        f = torch.relu(x @ W.T + s["encoder.bias"])
        return f, f @ D.T + s["decoder.bias"]
    if kind == "AutoEncoder":  # loading moves the columns' norms into the encoder
        norms = D.norm(dim=0)
        f = torch.relu((x - s["bias"]) @ (W * norms[:, None]).T + s["encoder.bias"] * norms)
        return f, f @ (D / norms).T + s["bias"]
    if kind == "GatedAutoEncoder":
        inner = (x - s["decoder_bias"]) @ W.T
        gate = (inner + s["gate_bias"] > 0).double()
        f = gate * torch.relu(s["r_mag"].exp() * inner + s["mag_bias"])
        return f, f @ D.T + s["decoder_bias"]
    post = torch.relu((x - s["b_dec"]) @ W.T + s["encoder.bias"])
    if kind == "AutoEncoderTopK":
        values, places = post.topk(int(s["k"]), dim=-1)
        f = torch.zeros_like(post).scatter_(-1, places, values)
    else:
        f = post * (post > s["threshold"])
    return f, f @ D.T + s["b_dec"]


def same(dictionary: Canonical, expected: tuple[Tensor, Tensor], x: Tensor, rtol: float = 1e-9) -> None:
    z = codes(dictionary, 0, x)
    assert float((z > 0).double().mean()) > 0.02, "codes that never fire prove nothing"
    torch.testing.assert_close(z, expected[0], rtol=rtol, atol=rtol * float(expected[0].max()))
    y = decoded(dictionary, [z], [x])[0]
    torch.testing.assert_close(y, expected[1], rtol=rtol, atol=rtol * float(expected[1].abs().max()))


def stored(path: Path, kind: str, threshold: float = 0.7, **trainer: Any) -> dict[str, Tensor]:
    """A directory as the library writes it."""
    rng = torch.Generator().manual_seed(7)
    state = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES[kind].items()}
    if "TopK" in kind:
        state |= {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(threshold)}
    if kind == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = torch.tensor([16, 32])
    config = {
        "dict_class": kind, "trainer_class": "T", "activation_dim": WIDTH, "dict_size": LATENTS, "k": K, "layer": 1,
        "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_1", **trainer,
    }  # fmt: skip
    torch.save(state, path / "ae.pt")
    (path / "config.json").write_text(json.dumps({"trainer": config, "buffer": {}}))
    return state


def only(path: Path) -> Foreign:
    [foreign] = dl.read(path)
    return foreign


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_is_read_as_it_computes(kind: str, rows: Tensor, tmp_path: Path) -> None:
    state = stored(tmp_path, kind)
    foreign = only(tmp_path)
    reading = foreign.readings[0]
    expected = equation(kind, state, rows)
    same(reading.dictionary, expected, rows)
    z, y = reading.forward([rows])
    torch.testing.assert_close(z[0], expected[0])
    torch.testing.assert_close(y[0], expected[1])
    assert reading.dictionary.reads == reading.dictionary.writes == ("blocks.1.hook_resid_post",)
    assert foreign.facts["model"] == "EleutherAI/pythia-70m"


EXPORTS = [
    ("relu", "l1", None, "AutoEncoderNew", "StandardTrainerAprilUpdate"),
    ("threshold", "jumprelu", None, "JumpReluAutoEncoder", "JumpReluTrainer"),
    ("threshold", "batchtopk", 4.4, "JumpReluAutoEncoder", "JumpReluTrainer"),
    ("threshold", "gated", None, "GatedAutoEncoder", "GatedSAETrainer"),
    ("threshold", "imported gated", None, "GatedAutoEncoder", "GatedSAETrainer"),
    ("topk", "topk", 4, "AutoEncoderTopK", "TopKTrainer"),
    ("one", "batchtopk", 4.4, "BatchTopKSAE", "BatchTopKTrainer"),
    ("one", "jumprelu", None, "JumpReluAutoEncoder", "JumpReluTrainer"),
]


@pytest.mark.parametrize(("form", "firing", "k", "kind", "trainer"), EXPORTS)
def test_what_is_written_is_the_state_of_a_class_that_computes_the_same(
    form, firing: str, k: float | None, kind: str, trainer: str, made: Made, facts, rows: Tensor, tmp_path: Path
) -> None:
    dictionary = made("sae", "threshold" if form == "one" else form)
    if form == "one":
        part = dictionary.sources[0]
        dictionary = dictionary._replace(sources=(part._replace(threshold=torch.full_like(part.b_enc, 0.3)),))
    facts = {**facts, "dictionary": {**facts["dictionary"], "firing": firing, "k": k}}
    dl.write(tmp_path, [Exported(dictionary, facts)])
    assert written(tmp_path) == {"ae.pt", "config.json"}
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["trainer"]["dict_class"], config["trainer"]["trainer_class"]) == (kind, trainer)
    assert {name: tuple(state[name].shape) for name in SHAPES[kind]} == SHAPES[kind]
    z = codes(dictionary, 0, rows)
    own = z, decoded(dictionary, [z], [rows])[0]
    f, x_hat = equation(kind, state, rows)
    torch.testing.assert_close(f, own[0], rtol=1e-5, atol=1e-5 * float(own[0].max()))
    torch.testing.assert_close(x_hat, own[1], rtol=1e-5, atol=1e-5 * float(own[1].abs().max()))
    if "TopK" in kind:
        assert (state["k"].dtype, state["k"].shape, state["threshold"].dtype) == (torch.int32, (), torch.float32)
        assert config["trainer"]["k"] == int(state["k"]) == 4, "the library refuses two ks"
    same(only(tmp_path).readings[0].dictionary, own, rows, rtol=1e-5)
    assert config["trainer"]["submodule_name"] == "resid_post_layer_1"
    assert config["thresher"]["weights_sha256"] == "00"
    assert not only(tmp_path).scale_unknown, "our own file says that nothing was scaled"


def test_a_counting_class_is_written_as_not_calibrated(made: Made, facts, tmp_path: Path) -> None:
    dl.write(tmp_path, [Exported(made("sae", "topk"), facts)])
    assert float(torch.load(tmp_path / "ae.pt", weights_only=True)["threshold"]) == -1.0


def test_loading_an_auto_encoder_multiplies_its_codes_by_the_norms(rows: Tensor, tmp_path: Path) -> None:
    state = stored(tmp_path, "AutoEncoder")
    norms = state["decoder.weight"].double().norm(dim=0)
    assert float(norms.std()) > 0.1
    dictionary = only(tmp_path).readings[0].dictionary
    unscaled = torch.relu((rows - state["bias"]) @ state["encoder.weight"].double().T + state["encoder.bias"])
    torch.testing.assert_close(codes(dictionary, 0, rows), unscaled * norms)
    torch.testing.assert_close(dictionary.sources[0].W_dec.norm(dim=(1, 2)), torch.ones(LATENTS).double())


def test_a_jumprelu_does_not_say_whether_it_subtracts(rows: Tensor, tmp_path: Path) -> None:
    state = stored(tmp_path, "JumpReluAutoEncoder")
    plain, other = only(tmp_path).readings
    assert (plain.label, other.label) == ("as its class says", "b_dec subtracted from the input")
    expected = equation("JumpReluAutoEncoder", state, rows - state["b_dec"])
    same(other.dictionary, expected, rows)
    torch.testing.assert_close(other.forward([rows])[1][0], expected[1])


def test_a_threshold_below_zero_is_no_threshold(rows: Tensor, tmp_path: Path) -> None:
    state = stored(tmp_path, "JumpReluAutoEncoder")
    torch.save(state | {"threshold": torch.full((LATENTS,), -3.0)}, tmp_path / "ae.pt")
    dictionary = only(tmp_path).readings[0].dictionary
    assert dictionary.firing == "relu"
    assert dictionary.sources[0].threshold is not None
    assert torch.equal(dictionary.sources[0].threshold, torch.zeros(LATENTS).double()), "readers without ReLU need that"
    same(dictionary, equation("JumpReluAutoEncoder", state | {"threshold": torch.zeros(LATENTS)}, rows), rows)


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_an_uncalibrated_threshold_is_a_dense_relu_and_said_so(kind: str, rows: Tensor, tmp_path: Path) -> None:
    state = stored(tmp_path, kind, threshold=-1.0)
    foreign = only(tmp_path)
    dense, counted = foreign.readings
    assert "never calibrated" in dense.label
    assert foreign.firing == "uncalibrated batchtopk"
    same(dense.dictionary, equation(kind, state, rows), rows)
    assert float((codes(dense.dictionary, 0, rows) > 0).sum(1).double().mean()) > 3 * K
    assert (counted.label, counted.dictionary.firing) == ("the k largest of each token", "topk")
    assert int((codes(counted.dictionary, 0, rows) > 0).sum(1).max()) == K


def test_a_calibrated_topk_can_be_read_by_its_threshold(rows: Tensor, tmp_path: Path) -> None:
    state = stored(tmp_path, "AutoEncoderTopK", threshold=0.7)
    _, by_threshold = only(tmp_path).readings
    assert by_threshold.label == "by its threshold"
    same(by_threshold.dictionary, equation("BatchTopKSAE", state, rows), rows)
    stored(tmp_path, "AutoEncoderTopK", threshold=-1.0)
    assert len(only(tmp_path).readings) == 1


@pytest.mark.parametrize(("said", "unknown"), [({}, True), ({"normalize_activations": True}, True),
                                               ({"normalize_activations": False}, False)])  # fmt: skip
def test_the_factor_of_training_is_unknown_unless_the_config_denies_one(
    said: dict[str, Any], unknown: bool, tmp_path: Path
) -> None:
    stored(tmp_path, "AutoEncoderTopK", **said)
    assert only(tmp_path).scale_unknown is unknown


def test_an_unknown_factor_is_tried_on_the_caches_rows(cache: CacheReader, tmp_path: Path) -> None:
    state = stored(tmp_path, "JumpReluAutoEncoder")
    label = "activations scaled to mean square 1, from this cache"
    recipe = {"target": {}, "data": {}, "harvest": {}, "evaluate": {}}
    [done] = import_dictionaries(
        tmp_path, "dictionary-learning", cache, recipe, tmp_path / "runs", Naming("scaled"), reading=label
    )
    assert len(done.readings) == 4, "as stored, with b_dec subtracted, and two factors"
    assert max(row.folding for row in done.readings) < 1e-12
    every = cache.gather("train", "L01.resid_post", np.arange(cache.rows("train"))).double()
    factor = every.square().sum(1).mean().sqrt()
    x = every[:64]
    f, x_hat = equation("JumpReluAutoEncoder", state, x / factor)
    dictionary = from_coder(load_run(done.path).dictionary)
    z = codes(dictionary, 0, x)
    assert (f > 0).any()
    torch.testing.assert_close(z, f, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(decoded(dictionary, [z], [x])[0], x_hat * factor, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("submodule", "hook"),
    [
        ("mlp_in_layer_3", "blocks.3.mlp.hook_in"),
        ("attn_out_layer_3", "blocks.3.hook_attn_out"),
        ("gpt_neox.layers.3", "gpt_neox.layers.3"),
        (None, ""),
    ],
)
def test_submodules_are_read_as_hooks(submodule: str | None, hook: str, tmp_path: Path) -> None:
    stored(tmp_path, "AutoEncoderNew", submodule_name=submodule)
    assert only(tmp_path).readings[0].dictionary.reads == (hook,)


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"k": 5}, r"k is 4, but config\.json beside it says 5"),
        ({"dict_class": "CrossCoder"}, "dict_class is 'CrossCoder'; expected one of AutoEncoder"),
        ({"dict_size": 40}, "encoder.weight has shape"),
    ],
)
def test_what_it_cannot_be_is_refused(trainer: dict[str, Any], words: str, tmp_path: Path) -> None:
    stored(tmp_path, "BatchTopKSAE", **trainer)
    with pytest.raises(UserError, match=words):
        dl.read(tmp_path)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    stored(tmp_path, "AutoEncoderNew")

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    with (tmp_path / "ae.pt").open("wb") as handle:
        pickle.dump(Code(), handle, protocol=2)
    with pytest.raises(UserError, match="holds more than tensors"):
        dl.read(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_variants_without_a_form_name_the_route(made: Made) -> None:
    assert "--to circuit-tracer" in (dl.refuse([made("clt", "threshold")]) or "")
    assert "--to saelens" in (dl.refuse([made("transcoder", "threshold")]) or "")
    assert "--to sparsify" in (dl.refuse([made("transcoder", "topk")]) or "")
    assert "--thresholds" in (dl.refuse([made("sae", "groupmax")]) or "")
    assert dl.refuse([made("sae", "threshold")]) is None
