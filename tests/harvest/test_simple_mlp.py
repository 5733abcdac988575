"""LlamaSimpleMLP: its function against a formula written for the purpose, its sizes, its files."""

import cmath
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.harvest.conftest import NATIVE, tiny
from thresher.cache.errors import UserError
from thresher.harvest.simple_mlp import LlamaSimpleMLP, SimpleMLPConfig, rotary_turns, rotate
from thresher.harvest.simple_mlp_files import load_simple_mlp, read_config, save_simple_mlp
from thresher.harvest.target import TargetConfig, TransformerTarget, load_target, load_tokenizer, model_identity

TOKENS = torch.arange(3, 3 + 2 * 12).view(2, 12)
FOUR_LAYERS = SimpleMLPConfig(
    vocab_size=50_277, n_layer=4, n_head=6, n_key_value_heads=6, n_embd=768, n_intermediate=3072, n_ctx=512
)


def plain_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6).sqrt() * gain


def plain_turned(x: Tensor) -> Tensor:
    """[T, W]: member i and member i + W/2 as one complex number, times e^{iφ}."""
    half = x.shape[1] // 2
    z = torch.complex(x[:, :half], x[:, half:])
    phases = [[cmath.exp(1j * t * 10_000 ** (-2 * i / x.shape[1])) for i in range(half)] for t in range(len(x))]
    z = z * torch.tensor(phases, dtype=torch.complex128)
    return torch.cat([z.real, z.imag], dim=1)


def plain_attention(x: Tensor, w: dict[str, Tensor], heads: int, kv_heads: int) -> Tensor:
    q, k, v = (x @ w[f"{name}_proj.weight"].T for name in "qkv")
    width = x.shape[1] // heads
    outs = []
    for head in range(heads):
        shared = head * kv_heads // heads
        mine, theirs = slice(head * width, (head + 1) * width), slice(shared * width, (shared + 1) * width)
        scores = plain_turned(q[:, mine]) @ plain_turned(k[:, theirs]).T / math.sqrt(width)
        weights = (scores.exp() * torch.ones_like(scores).tril()).div((scores.exp().tril()).sum(1, keepdim=True))
        outs.append(weights @ v[:, theirs])
    return torch.cat(outs, dim=1) @ w["o_proj.weight"].T


def plain_logits(state: dict[str, Tensor], tokens: Tensor, config: SimpleMLPConfig) -> Tensor:
    """One context [T] to [T, V]."""
    x = state["wte.weight"][tokens]
    for layer in range(config.n_layer):
        w = {key.removeprefix(f"h.{layer}."): value for key, value in state.items() if key.startswith(f"h.{layer}.")}
        attn = {key.removeprefix("attn."): value for key, value in w.items() if key.startswith("attn.")}
        x = x + plain_attention(plain_norm(x, w["rms_1.weight"]), attn, config.n_head, config.n_key_value_heads)
        up = plain_norm(x, w["rms_2.weight"]) @ w["mlp.c_fc.weight"].T
        neurons = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + neurons @ w["mlp.down_proj.weight"].T
    return plain_norm(x, state["ln_f.weight"]) @ state["wte.weight"].T


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_forward_pass_is_the_plain_formula(kv_heads: int) -> None:
    config = SimpleMLPConfig(**{**vars(NATIVE), "n_key_value_heads": kv_heads})
    torch.manual_seed(1)
    model = LlamaSimpleMLP(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        logits, loss = model(TOKENS)
        assert loss is None
        for row, tokens in zip(logits, TOKENS, strict=True):
            expected = plain_logits(dict(model.state_dict()), tokens, config)
            torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-10)


def test_rotation_is_that_of_transformers_llama() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=64)
    q, k = torch.randn(2, 1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(40)[None])
    turns = rotary_turns(40, 16, 10_000.0, q)
    for ours, theirs in zip((rotate(q, *turns), rotate(k, *turns)), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_token_changes_nothing_before_it() -> None:
    model = tiny("simple_mlp")
    changed = TOKENS.clone()
    changed[:, 7] = 60
    with torch.no_grad():
        before, after = model(TOKENS).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert all(not torch.equal(before[:, t], after[:, t]) for t in range(7, 12))


def test_the_loss_is_the_mean_over_targets_that_are_not_left_out() -> None:
    model = tiny("simple_mlp")
    targets = TOKENS.roll(-1, dims=1)
    targets[:, -1] = -1
    targets[1, :6] = -1
    with torch.no_grad():
        logits, loss = model(TOKENS, targets)
    log_p = logits.double().log_softmax(-1)
    terms = [-log_p[b, t, targets[b, t]] for b in range(2) for t in range(12) if targets[b, t] >= 0]
    assert len(terms) == 16
    assert loss.item() == pytest.approx((sum(terms) / 16).item(), rel=1e-5)


def test_norms_of_a_half_precision_model_are_computed_in_float32() -> None:
    norm = tiny("simple_mlp").h[0].rms_1.bfloat16()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(norm(x), norm.weight * normed)


@pytest.mark.parametrize(
    ("config", "total"),
    [
        # Embedding + layers × (q, o + k, v + two MLP matrices) + gains, by hand.
        (FOUR_LAYERS, 50_277 * 768 + 4 * (4 * 768**2 + 2 * 768 * 3072) + 9 * 768),
        (
            SimpleMLPConfig(
                vocab_size=4019, n_layer=2, n_head=4, n_key_value_heads=2, n_embd=128, n_intermediate=512, n_ctx=512
            ),
            4019 * 128 + 2 * (2 * 128**2 + 2 * 128 * 64 + 2 * 128 * 512) + 5 * 128,
        ),
        (
            SimpleMLPConfig(
                vocab_size=4019, n_layer=4, n_head=6, n_key_value_heads=3, n_embd=192, n_intermediate=768, n_ctx=512
            ),
            4019 * 192 + 4 * (2 * 192**2 + 2 * 192 * 96 + 2 * 192 * 768) + 9 * 192,
        ),
    ],
)
def test_parameter_counts(config: SimpleMLPConfig, total: int) -> None:
    with torch.device("meta"):
        model = LlamaSimpleMLP(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    if config == FOUR_LAYERS:
        assert round(total / 1e6, 1) == 66.9
        assert round((total - model.wte.weight.numel()) / 1e6, 1) == 28.3


def test_fresh_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    model = LlamaSimpleMLP(SimpleMLPConfig(**{**vars(NATIVE), "n_embd": 128, "n_intermediate": 512}))
    for name, parameter in model.named_parameters():
        into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.0 if parameter.dim() == 1 else 0.02 / math.sqrt(4) if into_stream else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    assert model.lm_head.weight is model.wte.weight


def test_taps_are_the_documented_modules_outputs() -> None:
    model = tiny("simple_mlp")
    target = TransformerTarget(model, name="x")
    taken: dict[str, Tensor] = {}
    block = model.h[1]
    for name, module in {"mlp_in": block.rms_2, "mlp_out": block.mlp, "attn": block.attn}.items():
        module.register_forward_hook(lambda _, args, output, name=name: taken.update({name: output}))
    block.rms_2.register_forward_pre_hook(lambda _, args: taken.update(resid_mid=args[0]))
    names = ["L01.mlp_in", "L01.mlp_out", "L01.resid_mid", "blocks.1.attn.hook_out"]
    acts = target.record(TOKENS, [*target.sites(names), *target.sites(["L01.resid_post"])])
    for name in ("mlp_in", "mlp_out", "resid_mid"):
        assert torch.equal(acts[f"L01.{name}"], taken[name])
    assert torch.equal(acts["blocks.1.attn.hook_out"], taken["attn"])
    assert [site.name for site in target.sites(["blocks.*.hook_attn_out"])] == [
        "blocks.0.attn.hook_out",
        "blocks.1.attn.hook_out",
    ]


def test_logits_are_no_site() -> None:
    with pytest.raises(UserError, match=r"logits.*ln_final\.hook_out"):
        TransformerTarget(tiny("simple_mlp"), name="x").sites(["unembed.hook_out"])


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A directory as it is published, with the state dict in a pickle."""
    model = tiny("simple_mlp")
    config = {
        **vars(NATIVE),
        "model_type": "LlamaSimpleMLP",
        "block_size": 32,
        "mlp_bias": False,
        "attn_bias": False,
        "rotary_adjacent_pairs": False,
        "rotary_dim": 5,
        "use_grouped_query_attention": True,
        "flash_attention": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "model_step_99999.pt")
    return tmp_path


def test_a_published_state_dict_loads_from_its_directory_and_from_its_file(published: Path) -> None:
    with torch.no_grad():
        expected = tiny("simple_mlp")(TOKENS).logits
        for model in (published, published / "model_step_99999.pt"):
            config = TargetConfig(model=str(model), device="cpu")
            target = load_target(config)
            assert torch.equal(target.logits(TOKENS), expected)
            assert (target.n_layers, target.n_ctx, target.n_vocab, target.gated_mlp) == (2, 32, 64, False)
            assert load_tokenizer(config) is None
    assert load_target(TargetConfig(model=str(published), dtype="bfloat16")).dtype == torch.bfloat16


def test_saving_and_loading_give_the_same_model(tmp_path: Path) -> None:
    model = tiny("simple_mlp")
    save_simple_mlp(model, tmp_path, torch.float32)
    assert read_config(tmp_path) == NATIVE
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "LlamaSimpleMLP"
    loaded = load_simple_mlp(tmp_path, [tmp_path / "model.safetensors"])
    assert loaded.lm_head.weight is loaded.wte.weight
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    identity = model_identity(TargetConfig(model=str(tmp_path)))
    safetensors.torch.save_file(safetensors.torch.load_file(tmp_path / "model.safetensors"), tmp_path / "other.bin")
    assert identity == model_identity(TargetConfig(model=str(tmp_path))), "only its own weights count"


def _changed(state: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    out = {**state, key: value}
    return out if value is not None else {k: v for k, v in out.items() if k != key}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (
            "h.0.mlp.c_fc.bias",
            torch.zeros(64),
            r"h\.0\.mlp\.c_fc\.bias is none of the model's.*h\.0\.mlp\.c_fc\.weight",
        ),
        ("h.1.attn.k_proj.weight", None, r"h\.1\.attn\.k_proj\.weight is missing"),
        ("h.1.attn.k_proj.weight", torch.zeros(32, 32), r"\[32, 32\]; expected \[16, 32\]"),
        ("lm_head.weight", torch.zeros(64, 32), r"lm_head\.weight.*differs from wte\.weight"),
        ("step", 3, "expected a state dict"),
    ],
)
def test_other_tensors_are_refused_by_name(published: Path, key: str, value: Any, says: str) -> None:
    file = published / "model_step_99999.pt"
    torch.save(_changed(torch.load(file, weights_only=True), key, value), file)
    with pytest.raises(UserError, match=says):
        load_target(TargetConfig(model=str(file)))


def test_the_tied_matrix_may_be_absent(published: Path) -> None:
    file = published / "model_step_99999.pt"
    torch.save(_changed(torch.load(file, weights_only=True), "lm_head.weight", None), file)
    assert torch.equal(load_target(TargetConfig(model=str(file))).model.lm_head.weight, tiny("simple_mlp").wte.weight)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mlp_bias": True}, "mlp_bias.*is True; expected False"),
        ({"rotary_adjacent_pairs": True}, "rotary_adjacent_pairs"),
        ({"n_layers": 2}, r"no key 'n_layers'.*'n_layer'"),
        ({"n_head": 3}, "each head"),
        ({"n_key_value_heads": 3}, "a divisor"),
    ],
)
def test_another_configuration_is_refused(published: Path, change: dict[str, Any], says: str) -> None:
    path = published / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=says):
        load_target(TargetConfig(model=str(published)))


def test_files_that_are_no_model_are_refused(published: Path) -> None:
    torch.save({}, published / "second.pt")
    with pytest.raises(UserError, match="holds 2 files of weights"):
        load_target(TargetConfig(model=str(published)))
    (published / "second.pt").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(UserError, match="cannot be read as tensors"):
        load_target(TargetConfig(model=str(published / "second.pt")))
    (published / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json beside it"):
        load_target(TargetConfig(model=str(published / "second.pt")))
