"""circuit-tracer's directories mean what its equations say, on the way out and in."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from tests.interop.conftest import LATENTS, LAYERS, WIDTH, Made, written
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.cache.records import to_dict
from thresher.interop import circuit_tracer
from thresher.interop.adapting import Moved
from thresher.interop.canonical import Canonical, codes, decoded, to_coder
from thresher.interop.export import export
from thresher.interop.formats import Exported
from thresher.interop.importing import Naming, import_dictionaries
from thresher.interop.norms import Norm, norms_of, reading_at
from thresher.train.files import load_run, save_run

Facts = Mapping[str, Any]
JUMP = "activation_function.threshold"


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


def test_two_sets_get_a_directory_each(made: Made, tmp_path: Path) -> None:
    first = [saved(tmp_path / "a", each, "a") for each in layer_set(made)]
    second = saved(tmp_path / "b", made("clt", "threshold"), "clt-threshold")
    done = export([*first, second], "circuit-tracer", tmp_path / "out")
    assert [each.path.name for each in done] == ["a", "clt-threshold"]
    with pytest.raises(UserError, match="layers 1 are missing"):
        export([first[0], first[2]], "circuit-tracer", tmp_path / "half")
    assert not (tmp_path / "half").exists()


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
