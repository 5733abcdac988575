"""Taps of several architectures, against the bridge's own values and against what they must add up to."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tests.harvest.conftest import CONFIGS, MODELS, tiny
from thresher.cache.errors import UserError
from thresher.cache.sites import matches
from thresher.harvest.sites import TAPS
from thresher.harvest.structure import tap_faults
from thresher.harvest.target import TransformerTarget

Make = Callable[[str], TransformerTarget]
TOKENS = torch.arange(3, 3 + 2 * 12).view(2, 12)
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "mlp.hook_in",
    "mlp_hidden": "mlp.out.hook_in",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
LACKING = {"gpt_neox": {"resid_mid"}, "granite": {"mlp_out"}}


@pytest.mark.parametrize("name", CONFIGS)
def test_taps_equal_what_the_bridge_records(name: str, tiny_target: Make) -> None:
    target = tiny_target(name)
    taps = [tap for tap in TAPS if tap not in LACKING.get(name, set())]
    sites = target.sites(taps)
    assert len(sites) == 2 * len(taps)
    recorded = target.record(TOKENS, sites)
    model = copy.deepcopy(target.model)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(TOKENS, return_type="logits")
    for site in sites:
        hook = "mlp.in.hook_in" if (name, site.tap) == ("opt", "mlp_in") else HOOKS[site.tap]
        expected = cache[f"blocks.{site.layer}.{hook}"].view(2, 12, -1)
        torch.testing.assert_close(recorded[site.name], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in LACKING])
def test_mlp_adds_mlp_out_to_resid_mid(name: str, tiny_target: Make) -> None:
    target = tiny_target(name)
    acts = target.record(TOKENS, target.sites(list(TAPS)))
    for layer in range(2):
        total = acts[f"L0{layer}.resid_mid"] + acts[f"L0{layer}.mlp_out"]
        torch.testing.assert_close(total, acts[f"L0{layer}.resid_post"], rtol=1e-6, atol=1e-6)
    assert torch.equal(acts["L00.resid_post"], acts["L01.resid_pre"])


def test_mlp_in_is_the_second_norm_with_gain_and_bias(tiny_target: Make) -> None:
    target = tiny_target("gpt2")
    acts = target.record(TOKENS, target.sites(["resid_mid", "mlp_in", "mlp_out"]))
    block = target.model.transformer.h[1]
    x = acts["L01.resid_mid"].double()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + block.ln_2.eps).sqrt()
    expected = normed * block.ln_2.weight.double() + block.ln_2.bias.double()
    torch.testing.assert_close(acts["L01.mlp_in"].double(), expected, rtol=1e-5, atol=1e-5)
    hidden = acts["L01.mlp_in"] @ block.mlp.c_fc.weight + block.mlp.c_fc.bias
    out = torch.nn.functional.gelu(hidden, approximate="tanh") @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
    torch.testing.assert_close(acts["L01.mlp_out"], out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_mlp_hidden_times_the_last_matrix_is_what_the_mlp_returns(name: str, tiny_target: Make) -> None:
    target = tiny_target(name)
    sites = target.sites(["L01.mlp_hidden", "blocks.1.mlp.out.hook_out"])
    hidden, out = target.record(TOKENS, sites).values()
    assert sites[0].width == hidden.shape[-1] == (64 if name not in ("gpt2", "bloom") else 128)
    matrix = target.model.get_submodule(target.structure.table.taps[1, "mlp_hidden"].module)
    weight_EF = matrix.weight if isinstance(matrix, torch.nn.Linear) else matrix.weight.T
    bias_E = 0 if matrix.bias is None else matrix.bias
    torch.testing.assert_close(out, hidden @ weight_EF.T + bias_E, rtol=1e-4, atol=1e-4)


def test_mlp_hidden_is_behind_the_nonlinearity_and_the_gate(tiny_target: Make) -> None:
    plain, gated = tiny_target("gpt2"), tiny_target("llama")
    acts = plain.record(TOKENS, plain.sites(["L01.mlp_in", "L01.mlp_hidden"]))
    up = plain.model.transformer.h[1].mlp.c_fc
    expected = torch.nn.functional.gelu(acts["L01.mlp_in"] @ up.weight + up.bias, approximate="tanh")
    torch.testing.assert_close(acts["L01.mlp_hidden"], expected, rtol=1e-4, atol=1e-4)
    acts = gated.record(TOKENS, gated.sites(["L01.mlp_in", "L01.mlp_hidden"]))
    mlp = gated.model.model.layers[1].mlp
    x = acts["L01.mlp_in"]
    expected = torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
    torch.testing.assert_close(acts["L01.mlp_hidden"], expected, rtol=1e-4, atol=1e-4)


def test_which_mlps_are_gated(tiny_target: Make) -> None:
    gated = {name for name in MODELS if tiny_target(name).gated_mlp}
    assert gated == {"llama", "gemma2", "qwen3", "olmo2", "granite", "phi3"}


def test_a_mixture_of_experts_has_no_mlp_hidden_and_says_why(tiny_target: Make) -> None:
    target = tiny_target("experts")
    assert len(target.sites(["mlp_in", "mlp_out"])) == 4
    assert not target.gated_mlp
    for pattern in ("mlp_hidden", "L01.mlp_hidden"):
        with pytest.raises(UserError, match=r"many experts.*Use mlp_in or mlp_out"):
            target.sites([pattern])


def test_parallel_residual_has_no_resid_mid(tiny_target: Make) -> None:
    with pytest.raises(UserError, match=r"in parallel.*Use resid_pre"):
        tiny_target("gpt_neox").sites(["resid_mid"])
    with pytest.raises(UserError, match="in parallel"):
        tiny_target("gpt_neox").sites(["L01.resid_mid"])


def test_scaled_residual_has_no_mlp_out_but_offers_the_unscaled(tiny_target: Make) -> None:
    with pytest.raises(UserError, match=r"blocks\.\*\.mlp\.hook_out"):
        tiny_target("granite").sites(["mlp_out"])
    assert [site.width for site in tiny_target("granite").sites(["blocks.*.mlp.hook_out"])] == [32, 32]


def test_post_norm_tap_is_behind_the_norm_and_says_so(tiny_target: Make) -> None:
    target = tiny_target("gemma2")
    [site] = target.sites(["L01.mlp_out"])
    said = "model.layers.1.post_feedforward_layernorm, output (after the norm that follows the MLP)"
    assert target.describe([site]) == {"L01.mlp_out": said}


def test_a_tap_that_does_not_add_up_is_refused() -> None:
    model = tiny("gpt2")
    target = TransformerTarget(model, name="doubled")
    model.transformer.h[1].register_forward_hook(lambda module, args, output: _scaled(output, 2.0))
    target.sites(["L00.mlp_out"])
    with pytest.raises(UserError, match=r"L01\.mlp_out.*does not differ by what it returns.*refused"):
        target.sites(["L01.mlp_out"])


@pytest.mark.parametrize(
    ("module", "change", "says"),
    [
        ("mlp.c_proj", torch.square, "is no matrix"),
        ("mlp", lambda out: 2 * out, "is not what the MLP returns"),
    ],
)
def test_neurons_that_no_matrix_sums_to_the_output_are_refused(
    module: str, change: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    model = tiny("gpt2")
    target = TransformerTarget(model, name="changed")
    model.transformer.h[1].get_submodule(module).register_forward_hook(lambda module, args, output: change(output))
    target.sites(["L00.mlp_hidden", "mlp_out"])
    with pytest.raises(UserError, match=rf"L01\.mlp_hidden.*{says}.*refused"):
        target.sites(["L01.mlp_hidden"])


def _scaled(output: Any, factor: float) -> Any:
    return output * factor if isinstance(output, torch.Tensor) else (output[0] * factor, *output[1:])


def test_faults_are_found_from_tensors_alone(tiny_target: Make) -> None:
    target = tiny_target("llama")
    points = {point: torch.ones(1, 8, 32) for point in target.structure.table.taps.values()}
    assert (0, "mlp_out") in tap_faults(target.structure, points)  # 1 + 1 is not 1


def test_unknown_architecture_is_named() -> None:
    class StrangeForCausalLM(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.embed = torch.nn.Embedding(4, 4)

    config = CONFIGS["gpt2"]()
    with pytest.raises(UserError, match="StrangeForCausalLM"):
        TransformerTarget(StrangeForCausalLM(config), name="strange")


def test_every_name_of_a_real_models_tensor_finds_its_site(books: TransformerTarget) -> None:
    expected = {
        "blocks.*.hook_resid_post": [f"L0{layer}.resid_post" for layer in range(4)],
        "blocks.[0-2].mlp*": [f"L0{layer}.mlp_out" for layer in range(3)],
        "transformer.h.[13].attn": ["blocks.1.attn.hook_out", "blocks.3.attn.hook_out"],
        "h.3": ["L03.resid_post"],
        "blocks.3.mlp.hook_in": ["L03.mlp_in"],
        "embed": ["embed.hook_out"],
    }
    for pattern, names in expected.items():
        sites = books.sites([pattern])
        assert [site.name for site in sites] == names
        assert all(matches(pattern, site) for site in sites)
        for site in sites:
            assert {found.name for alias in site.aliases for found in books.sites([alias])} == {site.name}
