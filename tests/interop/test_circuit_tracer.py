"""circuit-tracer's directories mean on the way out what its equations say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from tests.interop.conftest import LATENTS, LAYERS, WIDTH, Made, written
from tests.interop.tracer import JUMP, Facts, layer_set, loaded, of_cross, of_layer, same, saved
from thresher.cache.errors import UserError
from thresher.interop import circuit_tracer
from thresher.interop.canonical import Canonical, codes, decoded
from thresher.interop.export import export
from thresher.interop.formats import Exported


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("firing", ["relu", "threshold"])
def test_a_layer_set_computes_what_ours_do(
    firing: str, skip: bool, made: Made, facts: Facts, rows: Tensor, tmp_path: Path
) -> None:
    dictionaries = layer_set(made, firing, skip)
    assert circuit_tracer.refuse(dictionaries) is None
    circuit_tracer.write(tmp_path, [Exported(each, facts) for each in reversed(dictionaries)])
    assert written(tmp_path) == {"config.yaml", *(f"layer_{i}.safetensors" for i in range(3))}
    for layer, each in enumerate(dictionaries):
        a, y = of_layer(tmp_path, layer, rows)
        z = codes(each, 0, rows)
        same(a, z)
        same(y, decoded(each, [z], [rows])[0])
        assert (JUMP in loaded(tmp_path / f"layer_{layer}.safetensors")) == (firing == "threshold")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert {name: config[name] for name in config if name != "thresher"} == {
        "model_name": "gpt2",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    assert [each["weights_sha256"] for each in config["thresher"]] == ["00"] * 3


@pytest.mark.parametrize("firing", ["relu", "threshold"])
def test_a_cross_layer_transcoder_computes_what_ours_does(
    firing: str, made: Made, facts: Facts, rows: Tensor, tmp_path: Path
) -> None:
    dictionary = made("clt", firing)
    circuit_tracer.write(tmp_path, [Exported(dictionary, facts)])
    assert written(tmp_path) == {
        "config.yaml", *(f"{stem}_{i}.safetensors" for stem in ("W_enc", "W_dec") for i in range(LAYERS)),
    }  # fmt: skip
    xs = [rows + layer for layer in range(LAYERS)]
    a, y = of_cross(tmp_path, xs)
    z = [codes(dictionary, s, x) for s, x in enumerate(xs)]
    for ours, theirs in zip([*z, *decoded(dictionary, z, xs)], [*a, *y], strict=True):
        same(theirs, ours)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model_kind"] == "cross_layer_transcoder"


def test_one_layer_with_thresholds_gives_all_layers_some(
    made: Made, facts: Facts, rows: Tensor, tmp_path: Path
) -> None:
    """Layer 0 decides for all whether they are read."""
    dictionary = made("clt", "threshold")
    plain = dictionary.sources[0]._replace(threshold=torch.zeros(LATENTS, dtype=torch.float64))
    dictionary = dictionary._replace(sources=(plain, *dictionary.sources[1:]))
    circuit_tracer.write(tmp_path, [Exported(dictionary, facts)])
    assert "threshold_0" in loaded(tmp_path / "W_enc_0.safetensors")
    a, _ = of_cross(tmp_path, [rows] * LAYERS)
    same(a[1], codes(dictionary, 1, rows))
    same(a[0], codes(dictionary, 0, rows))


def test_destinations_a_window_leaves_out_are_zeros(made: Made, facts: Facts, rows: Tensor, tmp_path: Path) -> None:
    dictionary = made("clt", "relu")
    first = dictionary.sources[0]
    windowed = dictionary._replace(sources=(first._replace(W_dec=first.W_dec[:, :2]), *dictionary.sources[1:]))
    circuit_tracer.write(tmp_path, [Exported(windowed, facts)])
    stored = loaded(tmp_path / "W_dec_0.safetensors")["W_dec_0"]
    assert stored.shape == (LATENTS, 3, WIDTH)
    assert not stored[:, 2].any()
    assert stored[:, :2].any()


def test_no_negative_threshold_is_written(made: Made, facts: Facts, tmp_path: Path) -> None:
    """It would let negative codes through."""
    [dictionary] = layer_set(made, layers=[0])
    theta = torch.full((LATENTS,), -1.0, dtype=torch.float64)
    theta[1] = 0.5
    part = dictionary.sources[0]._replace(threshold=theta)
    circuit_tracer.write(tmp_path, [Exported(dictionary._replace(sources=(part,)), facts)])
    stored = loaded(tmp_path / "layer_0.safetensors")[JUMP]
    assert float(stored.min()) == 0.0
    assert float(stored[1]) == 0.5


def test_a_skip_in_some_layers_is_written_in_all(made: Made, facts: Facts, rows: Tensor, tmp_path: Path) -> None:
    mixed = [*layer_set(made, layers=[0]), *layer_set(made, skip=True, layers=[1])]
    circuit_tracer.write(tmp_path, [Exported(each, facts) for each in mixed])
    assert not loaded(tmp_path / "layer_0.safetensors")["W_skip"].any()
    same(of_layer(tmp_path, 1, rows)[1], decoded(mixed[1], [codes(mixed[1], 0, rows)], [rows])[0])


@pytest.mark.parametrize(
    ("those", "words"),
    [
        (lambda made: [made("sae", "relu")], "no SAEs. Use --to saelens"),
        (lambda made: [made("clt", "relu"), made("clt", "relu")], "holds one cross-layer transcoder"),
        (lambda made: layer_set(made, "topk"), "no topk. Add --thresholds"),
        (lambda made: layer_set(made, "groupmax"), "no groupmax. Add --thresholds"),
        (lambda made: [made("clt", "topk")], "no topk. Add --thresholds"),
        (lambda made: [made("clt", "relu", skip=True)], "applied transposed by newer ones"),
        (lambda made: layer_set(made, layers=[0, 2]), "layers 1 are missing beside 0, 2"),
        (lambda made: layer_set(made, layers=[1, 2]), "layers 0 are missing"),
        (lambda made: layer_set(made, layers=[0, 0, 1]), "layers 0 occur more than once"),
        (lambda made: [made("transcoder", "relu", out=12)], "reads 16 and writes 12"),
        (lambda made: _other_size(layer_set(made)), "the same number of latents"),
        (lambda made: _other_hook(layer_set(made), "L01.resid_mid"), "at different hooks"),
        (lambda made: _other_hook(layer_set(made, layers=[0]), "L00.resid_pre"), "read at hook_resid_pre"),
    ],
)
def test_what_it_has_no_form_for_is_refused_with_the_reason(
    those: Callable[[Made], list[Canonical]], words: str, made: Made
) -> None:
    assert words in (circuit_tracer.refuse(those(made)) or "")


def _other_size(those: list[Canonical]) -> list[Canonical]:
    part = those[1].sources[0]
    assert part.threshold is not None
    fewer = part._replace(
        W_enc=part.W_enc[:8], b_enc=part.b_enc[:8], threshold=part.threshold[:8], W_dec=part.W_dec[:8]
    )
    return [those[0], those[1]._replace(sources=(fewer,)), those[2]]


def _other_hook(those: list[Canonical], site: str) -> list[Canonical]:
    return [*those[:-1], those[-1]._replace(reads=(site,))]


def test_two_sets_get_a_directory_each(made: Made, tmp_path: Path) -> None:
    first = [saved(tmp_path / "a", each, "a") for each in layer_set(made)]
    second = saved(tmp_path / "b", made("clt", "threshold"), "clt-threshold")
    done = export([*first, second], "circuit-tracer", tmp_path / "out")
    assert [each.path.name for each in done] == ["a", "clt-threshold"]
    with pytest.raises(UserError, match="layers 1 are missing"):
        export([first[0], first[2]], "circuit-tracer", tmp_path / "half")
    assert not (tmp_path / "half").exists()
