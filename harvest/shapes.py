"""Shapes of some well-known targets, for reckoning without loading one, and what a pass through a body multiplies."""

from typing import NamedTuple


class TargetShape(NamedTuple):
    """A decoder-only transformer's body."""

    layers: int
    width: int
    """Of the residual stream."""
    mlp_width: int
    """Neurons of an MLP."""
    heads: int
    kv_heads: int
    head_width: int
    matrices: int
    """Of an MLP: 2, or 3 with a gate."""
    context: int
    """Longest, tokens."""

    @property
    def block_parameters(self) -> int:
        """Weights of one block's matrices."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_width
        return attention + self.matrices * self.width * self.mlp_width

    def flop(self, blocks: int, context: int) -> float:
        """Multiplications and additions of a token's way through the first `blocks` blocks, no logits: two for each
        weight, and attention over half of a context on average."""
        attention = 4 * (context / 2) * self.heads * self.head_width
        return blocks * (2 * self.block_parameters + attention)


KNOWN = {
    "bundled:books-128": TargetShape(4, 128, 512, 4, 4, 32, 2, 256),
    "openai-community/gpt2": TargetShape(12, 768, 3072, 12, 12, 64, 2, 1024),
    "EleutherAI/pythia-70m": TargetShape(6, 512, 2048, 8, 8, 64, 2, 2048),
    "EleutherAI/pythia-160m": TargetShape(12, 768, 3072, 12, 12, 64, 2, 2048),
    "meta-llama/Llama-3.2-1B": TargetShape(16, 2048, 8192, 32, 8, 64, 3, 131072),
    "google/gemma-2-2b": TargetShape(26, 2304, 9216, 8, 4, 256, 3, 8192),
}
"""By name on the hub, from their config.json."""

USUAL_CONTEXT = 1024


def usual(layers: int, width: int) -> TargetShape:
    """A shape of GPT-2's proportions: MLPs four times as wide, heads of 64."""
    heads = max(1, width // 64)
    return TargetShape(layers, width, 4 * width, heads, heads, width // heads, 2, USUAL_CONTEXT)
