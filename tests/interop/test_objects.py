"""Runs as objects of other tools compute what the canonical form says, with those tools installed or not."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thresher
from tests.interop.conftest import LATENTS, WIDTH, Made, finished
from thresher.cache.errors import UserError
from thresher.interop import saelens
from thresher.interop.canonical import Canonical, codes, decoded, from_coder
from thresher.interop.saebench import to_saebench
from thresher.interop.saelens_object import to_saelens
from thresher.train.files import load_run

FIELDS = {
    "model_name", "d_in", "d_sae", "hook_layer", "hook_name", "context_size", "hook_head_index", "architecture",
    "apply_b_dec_to_input", "finetuning_scaling_factor", "activation_fn_str", "activation_fn_kwargs", "prepend_bos",
    "normalize_activations", "dtype", "device", "model_from_pretrained_kwargs", "dataset_path",
    "dataset_trust_remote_code", "seqpos_slice", "training_tokens", "sae_lens_training_version", "neuronpedia_id",
}  # fmt: skip


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tool can be imported."""
    for name in ("sae_bench", "sae_lens"):
        monkeypatch.setitem(sys.modules, name, None)


def truth(dictionary: Canonical, x: Tensor) -> tuple[Tensor, Tensor]:
    z = codes(dictionary, 0, x)
    return z, decoded(dictionary, [z], [x])[0]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("firing", "unit"), [("relu", False), ("threshold", False), ("topk", True), ("groupmax", True)]
)
def test_a_module_for_saebench_has_unit_rows_and_the_same_output(
    firing, unit: bool, made: Made, facts, rows: Tensor, tmp_path: Path
) -> None:
    dictionary = made("sae", firing, unit=unit)
    sae: Any = thresher.to_saebench(finished(tmp_path / "r", dictionary, facts))
    z, y = truth(dictionary, rows)
    norms = dictionary.sources[0].W_dec[:, 0].norm(dim=1)
    assert (float(norms.std()) > 0.1) is not unit
    x = rows.float()
    torch.testing.assert_close(sae.encode(x).double(), z * norms, rtol=1e-5, atol=1e-5 * float((z * norms).max()))
    torch.testing.assert_close(sae(x).double(), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    assert torch.equal(sae.encode(x) > 0, z > 0)
    whole = x.reshape(4, 16, WIDTH)
    torch.testing.assert_close(sae.encode(whole).flatten(0, 1), sae.encode(x))
    torch.testing.assert_close(sae.decode(sae.encode(whole)), sae(x).reshape(4, 16, WIDTH))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(LATENTS), rtol=0, atol=1e-5)
    assert {name: tuple(p.shape) for name, p in sae.named_parameters()} == {
        "W_enc": (WIDTH, LATENTS), "b_enc": (LATENTS,), "W_dec": (LATENTS, WIDTH), "b_dec": (WIDTH,),
    }  # fmt: skip


@pytest.mark.usefixtures("alone")
def test_saebench_finds_all_it_asks_cfg_for(made: Made, facts, tmp_path: Path) -> None:
    sae: Any = to_saebench(finished(tmp_path / "r", made("sae", "threshold"), facts))
    said = sae.cfg.to_dict()
    assert set(said) == FIELDS
    assert all(getattr(sae.cfg, name) == value for name, value in said.items())
    expected = {
        "model_name": "gpt2", "d_in": WIDTH, "d_sae": LATENTS, "hook_layer": 1, "dtype": "float32", "prepend_bos": True,
        "hook_name": "blocks.1.hook_resid_post", "normalize_activations": "none", "architecture": "jumprelu",
        "apply_b_dec_to_input": False, "context_size": 128,
    }  # fmt: skip
    assert {name: said[name] for name in expected} == expected
    assert (sae.device, sae.dtype) == (torch.device("cpu"), torch.float32)
    assert sae.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert sae.encode(torch.zeros(2, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.usefixtures("alone")
def test_saebench_is_refused_what_it_would_judge_wrongly(made: Made, facts, tmp_path: Path) -> None:
    for firing in ("topk", "groupmax"):
        with pytest.raises(UserError, match=r"rows of norm .* would choose other latents\. .*--thresholds"):
            to_saebench(finished(tmp_path / firing, made("sae", firing), facts))
    for kind in ("transcoder", "clt"):
        with pytest.raises(UserError, match=f"is a {kind}, and SAEBench evaluates SAEs alone"):
            to_saebench(finished(tmp_path / kind, made(kind, "threshold"), facts))


def test_the_module_is_of_saebenchs_own_base_where_that_is_installed(
    made: Made, facts, rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BaseSAE(nn.Module):
        def __init__(self, d_in, d_sae, model_name, hook_layer, device, dtype, hook_name=None) -> None:
            super().__init__()
            self.W_enc, self.W_dec = nn.Parameter(torch.zeros(d_in, d_sae)), nn.Parameter(torch.zeros(d_sae, d_in))
            self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_in))
            self.device, self.dtype = device, dtype
            self.cfg = types.SimpleNamespace(model_name=model_name, hook_layer=hook_layer, hook_name=hook_name)

        def encode(self, x: Tensor) -> Tensor:
            raise NotImplementedError

        decode = forward = encode

    module = types.ModuleType("sae_bench.custom_saes.base_sae")
    module.BaseSAE = BaseSAE  # type: ignore[attr-defined]
    for name in ("sae_bench", "sae_bench.custom_saes"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    dictionary = made("sae", "threshold")
    sae: Any = to_saebench(finished(tmp_path / "r", dictionary, facts))
    assert isinstance(sae, BaseSAE)
    y = truth(dictionary, rows)[1]
    torch.testing.assert_close(sae(rows.float()).double(), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    assert (sae.cfg.model_name, sae.cfg.hook_name) == ("gpt2", "blocks.1.hook_resid_post")
    assert sae.cfg.context_size == 128


class SAE(nn.Module):
    """What is used of `sae_lens.SAE`: made from a config, then given tensors that have to fit."""

    known = ("standard", "jumprelu", "topk", "transcoder", "jumprelu_transcoder", "skip_transcoder")

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "SAE":
        if config["architecture"] not in cls.known:
            raise KeyError(config["architecture"])
        return cls(config)

    def process_state_dict_for_loading(self, state: dict[str, Tensor]) -> None:
        state["processed"] = torch.ones(())

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        self.state = dict(state)


@pytest.fixture
def lens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SAELens of the same surface."""
    module = types.ModuleType("sae_lens")
    module.SAE, module.__version__ = SAE, "6.18.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sae_lens", module)


@pytest.mark.usefixtures("lens")
@pytest.mark.parametrize(("kind", "firing"), [("sae", "topk"), ("sae", "threshold"), ("transcoder", "relu")])
def test_a_saelens_object_has_the_config_and_tensors_of_its_files(
    kind, firing, made: Made, facts, tmp_path: Path
) -> None:
    run = finished(tmp_path / "r", made(kind, firing), facts)
    sae = thresher.to_saelens(run)
    assert sae.config["architecture"] == saelens.architecture(made(kind, firing))
    assert sae.config["metadata"]["thresher"]["run"] == "r"
    expected = saelens.tensors(from_coder(load_run(run).dictionary))
    assert sae.state.pop("processed") == 1, "SAELens's own preparation of tensors comes first"
    assert sae.state.keys() == expected.keys()
    assert all(torch.equal(sae.state[name], tensor) for name, tensor in expected.items())


@pytest.mark.usefixtures("lens")
def test_a_saelens_object_is_refused_like_its_files(made: Made, facts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clt cannot be written for saelens: .*--to circuit-tracer"):
        to_saelens(finished(tmp_path / "clt", made("clt", "threshold"), facts))
    skipping = finished(tmp_path / "t", made("transcoder", "threshold", skip=True), facts)
    with pytest.raises(UserError, match=r"SAELens 6\.18\.0 knows no architecture 'jumprelu_skip_transcoder'"):
        to_saelens(skipping)


@pytest.mark.usefixtures("alone")
def test_without_saelens_the_command_that_installs_it_is_named(made: Made, facts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pip install sae-lens"):
        to_saelens(finished(tmp_path / "r", made("sae", "relu"), facts))
