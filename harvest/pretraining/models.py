"""Fresh language models, and finished ones on the disk."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.cache.publish import flush_directory
from thresher.harvest.pretrained import fuse_gelu, quiet
from thresher.harvest.pretraining.settings import PretrainConfig
from thresher.harvest.simple_mlp import IGNORED_TARGET, LlamaSimpleMLP, SimpleMLPConfig
from thresher.harvest.simple_mlp_files import save_simple_mlp

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fresh_model(config: PretrainConfig, tokenizer: "PreTrainedTokenizerBase") -> nn.Module:
    """A model with weights drawn from the seed, float32, on the CPU; the process's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _simple_mlp(config, len(tokenizer)) if config.architecture != "gpt2" else _gpt2(config, tokenizer)


def _simple_mlp(config: PretrainConfig, n_vocab: int) -> nn.Module:
    return LlamaSimpleMLP(
        SimpleMLPConfig(
            vocab_size=n_vocab,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_key_value_heads=config.n_kv_heads or config.n_heads,
            n_embd=config.width,
            n_intermediate=config.mlp_width or 4 * config.width,
            n_ctx=config.context,
        )
    )


def _gpt2(config: PretrainConfig, tokenizer: "PreTrainedTokenizerBase") -> nn.Module:
    """Without dropout; the fused activation is the same function (pretrained.py)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=config.context,
        n_embd=config.width,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        n_inner=config.mlp_width,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with quiet():
        return fuse_gelu(GPT2LMHeadModel(sizes))


def cross_entropy_sum(model: nn.Module, rows: Tensor) -> Tensor:
    """Sum over all targets of rows [B, T + 1], -1 where there is no token; nats, float32."""
    output: Any = model(input_ids=rows[:, :-1].clamp_min(0))
    logits = output.logits.float().flatten(0, 1)
    return F.cross_entropy(logits, rows[:, 1:].flatten(), ignore_index=IGNORED_TARGET, reduction="sum")


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the float32 weights the values that they will have when saved."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def save_model(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Write a model that `target.model` can name; config.json comes last and makes it one."""
    model = model.cpu()
    if isinstance(model, LlamaSimpleMLP):
        save_simple_mlp(model, folder, dtype)
        return
    from transformers import GPT2LMHeadModel

    assert isinstance(model, GPT2LMHeadModel)
    halved: Any = model.to(dtype=dtype)  # type: ignore[call-arg]
    with quiet():
        halved.save_pretrained(folder / PARTIAL)
    move_out(folder, last="config.json")


PARTIAL = "partial"


def move_out(folder: Path, last: str) -> None:
    """Bring the files of `folder`/partial into `folder`; the one that makes them count comes last."""
    partial = folder / PARTIAL
    for file in sorted(partial.iterdir(), key=lambda file: (file.name == last, file.name)):
        file.replace(folder / file.name)
    shutil.rmtree(partial)
    flush_directory(folder)
