"""What language model is trained, and how; what came of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from thresher.cache.errors import UserError
from thresher.cache.records import to_dict

TRAIN_TOKENIZER = "train"

OPERATIONAL = ("pass_contexts", "log_every", "checkpoint_every")
"""Settings that an unfinished training may go on with changed."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The language model that `thresher target train` makes: the table [pretrain] of a recipe. The text is that of
    [data], without its `context`; the device is that of [target]."""

    architecture: Literal["llama_simple_mlp", "gpt2"] = "llama_simple_mlp"
    """llama_simple_mlp: RMSNorm, rotary positions, no biases. gpt2: LayerNorm, learned positions, biases, as Hugging
    Face has it. Both with tanh-GELU, MLPs without a gate, and the unembedding tied to the embedding."""

    n_layers: int = 2
    """Blocks."""

    width: int = 128
    """Dimensions of the residual stream."""

    n_heads: int = 4
    """Attention heads, each width / n_heads wide."""

    n_kv_heads: int | None = None
    """Key/value heads of llama_simple_mlp, a divisor of n_heads; left out: n_heads."""

    mlp_width: int | None = None
    """Neurons of an MLP; left out: 4 × width."""

    context: int = 256
    """Longest context, tokens. A row of training text has one token more: the inputs are all but its last token, the
    targets all but its first."""

    tokenizer: str = TRAIN_TOKENIZER
    """train: a byte-level BPE, made from the text. Else the tokenizer of a model: its directory, its name on the hub,
    or bundled:books-128."""

    n_vocab: int = 4096
    """Tokens of a tokenizer that is made, <|endoftext|> (id 0) among them; of a given tokenizer, all are taken."""

    tokenizer_chars: int = 100_000_000
    """A tokenizer is made from so many characters of training text at most."""

    steps: int = 300
    """Optimiser steps."""

    batch_contexts: int = 32
    """Rows of text per step."""

    pass_contexts: int | None = None
    """Rows per forward and backward pass, gradients added up; left out: batch_contexts. Less takes less memory."""

    lr: float = 3e-3
    """Peak learning rate of AdamW (β = 0.9, 0.95)."""

    warmup: int = 100
    """Steps over which the learning rate rises from 0."""

    final_lr: float = 0.1
    """Share of the learning rate that is left at the end of its cosine."""

    weight_decay: float = 0.1
    """Of matrices, embeddings included; gains and biases do not decay."""

    clip: float = 1.0
    """Longest gradient; a longer one is scaled down to it."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; weights and moments are float32. auto: bfloat16 on a GPU that has it, else float32."""

    weights: Literal["float32", "bfloat16"] = "float32"
    """Of the saved weights, which are those that the cross-entropy at the end is measured with."""

    seed: int = 0
    """Of the fresh weights and of the order of rows."""

    chunk_tokens: int = 1 << 25
    """Text is taken in pieces of about so many tokens (4 bytes each, some 20 while they are packed); rows are shuffled
    within a piece."""

    validation_tokens: int = 100_000
    """Held-out tokens that the cross-entropy at the end is measured on; of the validation split if the recipe makes
    one, else of the test split."""

    log_every: int = 10
    """Steps between two lines of log.jsonl."""

    checkpoint_every: int = 500
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        at_least_one = (
            *("n_layers", "width", "n_heads", "steps", "batch_contexts", "tokenizer_chars", "chunk_tokens"),
            *("validation_tokens", "log_every", "checkpoint_every", "n_kv_heads", "mlp_width", "pass_contexts"),
        )
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"pretrain.{name} is {value}; expected at least 1.")
        if self.context < 2:
            raise UserError(f"pretrain.context is {self.context}; expected at least 2 tokens.")
        if self.n_vocab < 257 and self.tokenizer == TRAIN_TOKENIZER:
            raise UserError(f"pretrain.n_vocab is {self.n_vocab}; expected at least 257: the bytes and <|endoftext|>.")
        if self.width % self.n_heads:
            raise UserError(
                f"pretrain.width is {self.width}; expected a multiple of n_heads, which is {self.n_heads}. Try "
                f"{-(-self.width // self.n_heads) * self.n_heads}."
            )
        if self.architecture == "gpt2" and self.n_kv_heads not in (None, self.n_heads):
            raise UserError(
                "pretrain.n_kv_heads is for llama_simple_mlp; gpt2 has as many as n_heads. Leave it out, or choose the "
                "other architecture."
            )
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"pretrain.{name} is {getattr(self, name)}; expected more than 0.")
        if not 0 <= self.final_lr <= 1:
            raise UserError(f"pretrain.final_lr is {self.final_lr}; expected 0 to 1, a share of lr.")
        for name in ("weight_decay", "warmup"):
            if getattr(self, name) < 0:
                raise UserError(f"pretrain.{name} is {getattr(self, name)}; expected 0 or more.")


def made_from(config: PretrainConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What makes a trained model this one: settings and the identity of its text; JSON values."""
    kept = {key: value for key, value in to_dict(config).items() if key not in OPERATIONAL}
    return {"pretrain": kept, "data": {key: value for key, value in data.items() if key not in ("context", "keep")}}


class PretrainResult(NamedTuple):
    """What a training made."""

    path: Path
    """The model's directory."""
    reused: bool
    """It was there already and nothing was computed."""
    facts: dict[str, Any]
    """`result` of its pretraining.json: parameters, steps, tokens, cross-entropies in nats."""
