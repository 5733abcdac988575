"""Small models and the bundled one, made once for the room's tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from thresher.harvest.simple_mlp import LlamaSimpleMLP, SimpleMLPConfig
from thresher.harvest.target import TargetConfig, TransformerTarget, load_target, load_tokenizer

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _COMMON | {"num_key_value_heads": 1, "head_dim": 16}
_GPT2 = {"n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(**_GPT2, n_positions=32),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON),
    "gpt_neox_sequential": lambda: transformers.GPTNeoXConfig(**_COMMON, use_parallel_residual=False),
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    "gemma2": lambda: transformers.Gemma2Config(**_GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED),
    "olmo2": lambda: transformers.Olmo2Config(**_COMMON),
    "granite": lambda: transformers.GraniteConfig(**_COMMON, residual_multiplier=0.25),
    "opt": lambda: transformers.OPTConfig(
        **{k: v for k, v in _COMMON.items() if k != "intermediate_size"}, ffn_dim=64, word_embed_proj_dim=32
    ),
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_head=2, n_layer=2, vocab_size=64),
    "phi3": lambda: transformers.Phi3Config(**_COMMON),
}


NATIVE = SimpleMLPConfig(
    vocab_size=64, n_layer=2, n_head=4, n_key_value_heads=2, n_embd=32, n_intermediate=64, n_ctx=32
)
MODELS = (*CONFIGS, "simple_mlp")
"""Hugging Face's architectures and our own."""

EXPERTS = transformers.MixtralConfig(**_COMMON, num_key_value_heads=1, num_local_experts=4)


def tiny(name: str) -> Any:
    """A random two-layer model of an architecture, its norms' gains and biases random too."""
    torch.manual_seed(0)
    if name == "simple_mlp":
        model = LlamaSimpleMLP(NATIVE)
    else:
        config = EXPERTS if name == "experts" else CONFIGS[name]()
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_target() -> Callable[[str], TransformerTarget]:
    made: dict[str, TransformerTarget] = {}

    def make(name: str) -> TransformerTarget:
        if name not in made:
            made[name] = TransformerTarget(tiny(name), name=name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def books() -> TransformerTarget:
    return load_target(TargetConfig(device="cpu"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(TargetConfig())


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)
