"""circuit-tracer's directories are read as its equations mean them, and come back from an export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from tests.interop.conftest import LATENTS, LAYERS, WIDTH, Made
from tests.interop.tracer import JUMP, Facts, layer_set, loaded, of_cross, of_layer, saved
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.interop import circuit_tracer
from thresher.interop.canonical import codes, decoded
from thresher.interop.export import export
from thresher.interop.formats import Exported
from thresher.interop.importing import Naming, import_dictionaries
from thresher.train.files import load_run


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("firing", ["relu", "threshold"])
def test_a_layer_set_reads_back_the_same(
    firing: str, skip: bool, made: Made, facts: Facts, rows: Tensor, tmp_path: Path
) -> None:
    dictionaries = layer_set(made, firing, skip)
    circuit_tracer.write(tmp_path, [Exported(each, facts) for each in dictionaries])
    found = circuit_tracer.read(tmp_path)
    assert [each.readings[0].dictionary.layers for each in found] == [(0,), (1,), (2,)]
    assert [each.readings[0].dictionary.reads for each in found] == [(f"blocks.{i}.mlp.hook_in",) for i in range(3)]
    for layer, each in enumerate(found):
        [reading] = each.readings
        assert each.firing == ("jumprelu" if firing == "threshold" else "relu")
        a, y = of_layer(tmp_path, layer, rows)
        z, out = reading.forward([rows])
        for one, other in ((z[0], a), (out[0], y), (codes(reading.dictionary, 0, rows), a)):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(decoded(reading.dictionary, z, [rows])[0], y, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("firing", ["relu", "threshold"])
def test_a_cross_layer_transcoder_reads_back_the_same(
    firing: str, made: Made, facts: Facts, rows: Tensor, tmp_path: Path
) -> None:
    circuit_tracer.write(tmp_path, [Exported(made("clt", firing), facts)])
    [foreign] = circuit_tracer.read(tmp_path)
    [reading] = foreign.readings
    xs = [rows + layer for layer in range(LAYERS)]
    a, y = of_cross(tmp_path, xs)
    z, out = reading.forward(xs)
    ours = [codes(reading.dictionary, s, x) for s, x in enumerate(xs)]
    pairs = [*zip(z, a, strict=True), *zip(out, y, strict=True), *zip(ours, a, strict=True)]
    for one, other in [*pairs, *zip(decoded(reading.dictionary, ours, xs), y, strict=True)]:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert reading.dictionary.firing == firing


def test_the_decoder_of_june_2025_is_told_by_its_shape(made: Made, facts: Facts, tmp_path: Path) -> None:
    circuit_tracer.write(tmp_path, [Exported(layer_set(made, layers=[0])[0], facts)])
    file = tmp_path / "layer_0.safetensors"
    new = circuit_tracer.read(tmp_path)[0].readings[0].dictionary
    stored = safetensors.torch.load_file(file)
    safetensors.torch.save_file(stored | {"W_dec": stored["W_dec"].T.contiguous()}, file)
    old = circuit_tracer.read(tmp_path)[0].readings[0].dictionary
    assert torch.equal(old.sources[0].W_dec, new.sources[0].W_dec)


def test_negative_thresholds_are_kept_in_its_equation_and_said(
    made: Made, facts: Facts, rows: Tensor, tmp_path: Path
) -> None:
    circuit_tracer.write(tmp_path, [Exported(layer_set(made, layers=[0])[0], facts)])
    file = tmp_path / "layer_0.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file) | {JUMP: torch.full((LATENTS,), -0.5)}, file)
    [reading] = circuit_tracer.read(tmp_path)[0].readings
    assert reading.label == "as its files say, negative thresholds raised to 0"
    z, _ = reading.forward([rows])
    assert float(z[0].min()) < 0, "its equation lets negative codes through"
    torch.testing.assert_close(z[0], of_layer(tmp_path, 0, rows)[0])
    torch.testing.assert_close(codes(reading.dictionary, 0, rows), z[0].clamp_min(0.0))


@pytest.mark.parametrize("place", ["file", "config"])
def test_topk_of_later_versions_comes_in(place: str, made: Made, facts: Facts, rows: Tensor, tmp_path: Path) -> None:
    circuit_tracer.write(tmp_path, [Exported(layer_set(made, "relu", layers=[0])[0], facts)])
    file = tmp_path / "layer_0.safetensors"
    if place == "file":
        safetensors.torch.save_file(safetensors.torch.load_file(file) | {"k": torch.tensor(5)}, file)
    else:
        with (tmp_path / "config.yaml").open("a") as config:
            config.write("activation: topk\nk: 5\n")
    [foreign] = circuit_tracer.read(tmp_path)
    counted, plain = foreign.readings
    assert (foreign.firing, foreign.k, plain.label) == ("topk", 5.0, "ReLU, as in a local directory")
    t = loaded(file)
    pre = torch.relu(rows @ t["W_enc"].T + t["b_enc"])
    expected = torch.where(pre >= pre.topk(5, dim=1).values[:, -1:], pre, 0.0)
    for z in (counted.forward([rows])[0][0], codes(counted.dictionary, 0, rows)):
        torch.testing.assert_close(z, expected)
    torch.testing.assert_close(codes(plain.dictionary, 0, rows), pre)


def test_a_skip_of_a_cross_layer_transcoder_has_a_reading_per_version(
    made: Made, facts: Facts, rows: Tensor, tmp_path: Path
) -> None:
    circuit_tracer.write(tmp_path, [Exported(made("clt", "relu"), facts)])
    file = tmp_path / "W_enc_1.safetensors"
    W = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))
    safetensors.torch.save_file(safetensors.torch.load_file(file) | {"W_skip_1": W}, file)
    without, newer, as_ours = circuit_tracer.read(tmp_path)[0].readings
    assert "0.5.0" in without.label
    xs = [rows] * LAYERS
    base, W = without.forward(xs)[1], W.double()
    for reading, added in ((newer, rows @ W), (as_ours, rows @ W.T)):
        for y in (reading.forward(xs)[1], decoded(reading.dictionary, reading.forward(xs)[0], xs)):
            torch.testing.assert_close(y[1] - base[1], added)
            torch.testing.assert_close(y[0], base[0])


def test_what_its_own_writer_leaves_has_no_config(made: Made, facts: Facts, tmp_path: Path) -> None:
    circuit_tracer.write(tmp_path, [Exported(made("clt", "relu"), facts)])
    (tmp_path / "config.yaml").unlink()
    [foreign] = circuit_tracer.read(tmp_path)
    assert foreign.readings[0].dictionary.reads[2] == "blocks.2.hook_resid_mid"
    assert foreign.readings[0].dictionary.writes[2] == "blocks.2.hook_mlp_out"


@pytest.mark.parametrize(
    ("kind", "spoil", "words"),
    [
        ("transcoder", lambda p: (p / "layer_1.safetensors").unlink(), r"no layer_1\.safetensors"),
        ("transcoder", lambda p: _add(p / "layer_1.safetensors", W_extra=torch.zeros(2)), "W_extra"),
        ("transcoder", lambda p: _add(p / "layer_1.safetensors", b_dec=torch.zeros(3)), r"b_dec has shape \[3\]"),
        ("transcoder", lambda p: _config(p, transcoders=["hf://a/b/c"]), "names files elsewhere"),
        ("transcoder", lambda p: _config(p, model_kind="lorsa"), "model_kind is 'lorsa'"),
        ("transcoder", lambda p: _config(p, activation="topk"), "k is None with activation: topk"),
        ("transcoder", lambda p: (p / "config.yaml").write_text("a: [b"), "is not YAML"),
        ("transcoder", lambda p: _config(p, model_kind="cross_layer_transcoder"), r"no W_enc_0\.safetensors"),
        ("clt", lambda p: _config(p, model_kind="transcoder_set"), r"neither layer_0\.safetensors"),
        ("clt", lambda p: (p / "W_enc_1.safetensors").unlink(), r"no W_enc_1\.safetensors"),
        ("clt", lambda p: (p / "W_dec_1.safetensors").unlink(), r"W_dec_1\.safetensors is missing"),
        ("clt", lambda p: _drop(p / "W_enc_0.safetensors", "threshold_0"), "layer 0 has none"),
        ("clt", lambda p: _drop(p / "W_enc_2.safetensors", "threshold_2"), "no tensor 'threshold_2'"),
    ],
)
def test_damaged_directories_are_refused(
    kind: str, spoil: Callable[[Path], object], words: str, made: Made, facts: Facts, tmp_path: Path
) -> None:
    those = layer_set(made) if kind == "transcoder" else [made("clt", "threshold")]
    circuit_tracer.write(tmp_path, [Exported(each, facts) for each in those])
    spoil(tmp_path)
    with pytest.raises(UserError, match=words):
        circuit_tracer.read(tmp_path)


def _add(file: Path, **tensors: Tensor) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(file) | tensors, file)


def _drop(file: Path, name: str) -> None:
    stored = safetensors.torch.load_file(file)
    del stored[name]
    safetensors.torch.save_file(stored, file)


def _config(folder: Path, **settings: Any) -> None:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | settings))


def test_the_runs_of_a_set_go_into_one_directory_and_come_back(
    made: Made, cache: CacheReader, rows: Tensor, tmp_path: Path
) -> None:
    those = layer_set(made)
    runs = [saved(tmp_path / "runs", each, "t") for each in those]
    [done] = export(runs, "circuit-tracer", tmp_path / "out")
    assert (done.path, done.runs) == (tmp_path / "out", tuple(each.name for each in those))
    recipe = {"target": {}, "data": {}, "harvest": {}, "evaluate": {}}
    back = import_dictionaries(done.path, "circuit-tracer", cache, recipe, tmp_path / "again", Naming("u"))
    assert [each.path.name for each in back] == ["u-L00", "u-L01", "u-L02"]
    assert all(each.readings[0].folding < 1e-12 for each in back)
    for one, each in zip(those, back, strict=True):
        run = load_run(each.path)
        assert run.dictionary.reads == one.reads
        assert run.config["group"] == "u"
        torch.testing.assert_close(
            run.dictionary.encode(0, rows.float()).dense().double(), codes(one, 0, rows), rtol=1e-4, atol=1e-3
        )
    named = Naming("v", reads="L0{}.resid_post", writes="blocks.{}.hook_mlp_out")
    back = import_dictionaries(done.path, "circuit-tracer", cache, recipe, tmp_path / "again", named)
    assert [load_run(each.path).dictionary.reads for each in back] == [(f"L0{i}.resid_post",) for i in range(3)]
    with pytest.raises(UserError, match=r"expected \{\} in the place of the layer"):
        import_dictionaries(
            done.path, "circuit-tracer", cache, recipe, tmp_path / "again", Naming("w", reads="L00.mlp_in")
        )
