"""LlamaSimpleMLP: the small decoder of methods.md §8, as a module of our own.

    x ← x + attn(rms_1(x));  x ← x + mlp(rms_2(x));  logits = lm_head(ln_f(x))

RMSNorm in float32, rotary positions over the whole head width, key/value heads shared by groups of query heads, an MLP
without a gate, no biases, the unembedding tied to the embedding. Neither transformers nor transformer-lens knows the
architecture, so the model itself says where its tensors are (`hooks`), under the names that transformer-lens would give
them; recording and editing are then those of any other target. Module names are those of the published state dict.

Left out: what the published configuration can switch on and no published model uses (biases, rotation of adjacent
pairs, one fused matrix for q, k and v), and a cache of keys and values.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.cache.errors import UserError
from thresher.harvest.pretrained import TanhGelu
from thresher.harvest.sites import Point
from thresher.harvest.structure import LOGITS_UNSEEN, Hooks, NativeModel

ARCHITECTURE = "LlamaSimpleMLP"
IGNORED_TARGET = -1
"""A target that the loss leaves out."""
INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class SimpleMLPConfig:
    """Sizes, under the names of the published configuration."""

    vocab_size: int
    n_layer: int
    n_head: int
    """Query heads; each is n_embd / n_head wide."""
    n_key_value_heads: int
    """Divides n_head."""
    n_embd: int
    n_intermediate: int
    """Neurons of an MLP."""
    n_ctx: int
    """Longest context, tokens."""
    rotary_base: float = 10_000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "n_layer", "n_head", "n_key_value_heads", "n_embd", "n_intermediate", "n_ctx")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"{name} of a {ARCHITECTURE} is {getattr(self, name)}; expected at least 1.")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"n_embd of a {ARCHITECTURE} is {self.n_embd} with {self.n_head} heads; expected an even number of "
                f"dimensions for each head, since rotary positions turn them in pairs. Try {2 * self.n_head * 16}."
            )
        if self.n_head % self.n_key_value_heads:
            raise UserError(
                f"n_key_value_heads of a {ARCHITECTURE} is {self.n_key_value_heads} with {self.n_head} heads; expected "
                "a divisor, since each key/value head serves as many query heads."
            )

    @property
    def head_width(self) -> int:
        """Dimensions of a query, key or value."""
        return self.n_embd // self.n_head


class Output(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor
    """[B, T, V]."""
    loss: Tensor | None
    """Mean cross-entropy over the targets, nats; None where none were given."""


class RMSNorm(nn.Module):
    """x · rsqrt(mean x² + ε) in float32 (float64 for a float64 model), cast back, times a learned gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        wide = _wide(x)
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with rotary positions; a key/value head serves n_head / n_key_value_heads query heads."""

    def __init__(self, config: SimpleMLPConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        kv = config.n_key_value_heads * config.head_width
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, D] to [B, T, D]; `turns` are cos and sin of the angles, each [T, head width]."""
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *turns), rotate(k, *turns)
        shared = q.shape[1] // k.shape[1]
        if shared > 1:
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H·W] to [B, H, T, W]."""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class MLP(nn.Module):
    """down_proj(gelu_tanh(c_fc(x))), without a gate."""

    def __init__(self, config: SimpleMLPConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_intermediate, bias=False)
        self.gelu = TanhGelu()
        self.down_proj = nn.Linear(config.n_intermediate, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        return self.down_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each behind its norm and added to the residual stream."""

    def __init__(self, config: SimpleMLPConfig) -> None:
        super().__init__()
        self.rms_1 = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.attn = Attention(config)
        self.rms_2 = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x = x + self.attn(self.rms_1(x), turns)
        return x + self.mlp(self.rms_2(x))


class LlamaSimpleMLP(NativeModel):
    """The model. Fresh weights are drawn from PyTorch's own generator."""

    def __init__(self, config: SimpleMLPConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=INIT_STD / (math.sqrt(2 * config.n_layer) if into_stream else 1))

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Output:
        """Logits for tokens [B, T], at most n_ctx of them; the loss for `targets` [B, T], -1 where there is none.

        Nothing is masked but the future: padding belongs on the right.
        """
        assert input_ids.shape[1] <= self.config.n_ctx, f"{input_ids.shape[1]} tokens, at most {self.config.n_ctx}"
        x = self.wte(input_ids)
        turns = rotary_turns(x.shape[1], self.config.head_width, self.config.rotary_base, x)
        for block in self.h:
            x = block(x, turns)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return Output(logits, None)
        loss = F.cross_entropy(_wide(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET)
        return Output(logits, loss)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens, under the name that Hugging Face models have for it."""
        return self.wte

    def hooks(self) -> Hooks:
        """As `NativeModel.hooks`."""
        seen: dict[str, tuple[str, Point]] = {}
        for layer in range(self.config.n_layer):
            here = f"blocks.{layer}."
            for component, module in _COMPONENTS.items():
                _both_sides(seen, f"{here}{component}".rstrip("."), f"h.{layer}.{module}".rstrip("."))
            seen |= {f"{here}{alias}": seen[f"{here}{name}"] for alias, name in _ALIASES.items()}
        for component, module in {"embed": "wte", "ln_final": "ln_f", "unembed": "lm_head"}.items():
            _both_sides(seen, component, module)
        del seen["unembed.hook_out"]
        seen["hook_embed"] = seen["embed.hook_out"]
        return Hooks(self.config.n_layer, seen, {"unembed.hook_out": LOGITS_UNSEEN, "hook_unembed": LOGITS_UNSEEN})


_COMPONENTS = {
    "": "",
    "ln1": "rms_1",
    "attn": "attn",
    "attn.q": "attn.q_proj",
    "attn.k": "attn.k_proj",
    "attn.v": "attn.v_proj",
    "attn.o": "attn.o_proj",
    "ln2": "rms_2",
    "mlp": "mlp",
    "mlp.in": "mlp.c_fc",
    "mlp.out": "mlp.down_proj",
}
"""transformer-lens's name of a part of a block: our module."""

_ALIASES = {
    "hook_resid_pre": "hook_in",
    "hook_resid_mid": "ln2.hook_in",
    "hook_resid_post": "hook_out",
    "hook_attn_out": "attn.hook_out",
    "hook_mlp_out": "mlp.hook_out",
    "attn.hook_q": "attn.q.hook_out",
    "attn.hook_k": "attn.k.hook_out",
    "attn.hook_v": "attn.v.hook_out",
    "attn.hook_z": "attn.o.hook_in",
    "mlp.hook_pre": "mlp.in.hook_out",
    "mlp.hook_post": "mlp.out.hook_in",
}


def _both_sides(seen: dict[str, tuple[str, Point]], component: str, module: str) -> None:
    seen[f"{component}.hook_in"] = (f"{component}.hook_in", Point(module, "in"))
    seen[f"{component}.hook_out"] = (f"{component}.hook_out", Point(module, "out"))


def rotary_turns(length: int, width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos φ and sin φ, each [T, W], of φ = position · base^(-2i/W), i counting to W/2 twice over.

    Angles are float64, since float32 rounds one of some 500 radians by up to 1.5e-5. Device and dtype are those
    of `like`.
    """
    pairs = torch.arange(0, width, 2, device=like.device, dtype=torch.float64)
    positions = torch.arange(length, device=like.device, dtype=torch.float64)
    angles = torch.outer(positions, base ** (-pairs / width)).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos φ + [-x₂, x₁] sin φ of [B, H, T, W], whose halves x₁ and x₂ hold the two members of each pair."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In float32 at the least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
