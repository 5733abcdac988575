"""What one stage may know of another.

No stage imports a stage. Harvest implements `Target`, train implements `Dictionary`, evaluate sees only these
protocols, and `commands/` hands the objects over. So evaluation can call `encode` and `decode` but never rewrite them.

Tensor suffixes used throughout the project: N tokens (flattened), B contexts, T positions, D width read, E width
written, F latents, S sites, V vocabulary. A trailing `_ND` in a name means shape [N, D].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Site(NamedTuple):
    """A named tensor of the target, [B, T, width]."""

    name: str
    """Unique in the target: `L05.mlp_in`, or a transformer-lens hook name such as `blocks.5.attn.hook_out`."""
    layer: int
    """Block index, from 0; -1 for a tensor outside the blocks."""
    tap: str
    """`resid_pre`, `resid_mid`, `resid_post`, `mlp_in`, `mlp_hidden`, `mlp_out`, or the hook name without its block
    prefix."""
    width: int
    aliases: tuple[str, ...] = ()
    """Other names of the same tensor: hook names, and the module whose output it is (`blocks.5.attn`,
    `transformer.h.5.attn`, `h.5.attn`)."""


class Codes(NamedTuple):
    """Sparse latents of N tokens in compressed rows: token n owns entries offsets[n] to offsets[n + 1].

    A value may be 0 (a top-k slot that did not fire); only values > 0 count as active. Latents of one token are
    distinct, in no promised order.
    """

    values: Tensor
    """[A] activations, ≥ 0, in the dictionary's dtype."""
    latents: Tensor
    """[A] int64, in [0, width)."""
    offsets: Tensor
    """[N + 1] int64, offsets[0] = 0, offsets[N] = A."""
    width: int
    """F, the number of latents."""
    frame: Tensor | None = None
    """[N, 2] mean and scale of each token, of a dictionary that normalises every token by itself: its `decode` puts
    reconstructions back with them. None for all others."""
    x: Tensor | None = None
    """[N, D] what was encoded, for dictionaries whose decoder reads it; None where it does not."""

    @property
    def tokens(self) -> int:
        """N."""
        return self.offsets.shape[0] - 1

    def rows(self) -> Tensor:
        """[A] int64: the token that each entry belongs to."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(
            torch.arange(self.tokens, device=counts.device), counts, output_size=self.values.shape[0]
        )

    def l0(self) -> Tensor:
        """[N] int64: active latents per token."""
        active = torch.zeros(self.tokens, dtype=torch.int64, device=self.values.device)
        return active.index_add_(0, self.rows(), (self.values > 0).to(torch.int64))

    def dense(self) -> Tensor:
        """[N, F], for tests and small displays only."""
        out = self.values.new_zeros(self.tokens, self.width)
        out[self.rows(), self.latents] = self.values
        return out


def side_by_side(acts: Mapping[str, Tensor], sites: Sequence[str]) -> Tensor:
    """[N, D] rows of a source that reads these sites: one site's as they are, several sites' behind one another."""
    return acts[sites[0]] if len(sites) == 1 else torch.cat([acts[site] for site in sites], dim=1)


class MLPMatrices(NamedTuple):
    """The weights of an MLP second · act(first · x + first_bias) + second_bias of the target, with H neurons."""

    first: Tensor
    """[H, D]."""
    first_bias: Tensor
    """[H]; 0 where there is none."""
    second: Tensor
    """[E, H]."""
    second_bias: Tensor
    """[E]; 0 where there is none."""
    activation: str
    """`gelu_tanh`, `gelu`, `relu` or `silu`."""


class Overwriting(NamedTuple):
    """An edit whose result does not depend on the live value at some positions: a target may leave that uncomputed, and
    pass anything there."""

    edit: Callable[[Tensor], Tensor | None]
    """What is called."""
    elsewhere: Tensor
    """[M] int64: positions of the flattened [B, T] where the live value does matter."""

    def __call__(self, x_BTD: Tensor) -> Tensor | None:
        """As any edit."""
        return self.edit(x_BTD)


Edit = Callable[[Tensor], Tensor | None] | Overwriting
"""Called with a site's live value [B, T, D] as the forward pass reaches it. Returns what the model goes on with, in
the same shape, or None to leave it as it is."""


class Truths(NamedTuple):
    """What a toy model is known to compute: T directions, each followed through all sites."""

    of: str
    """What they are, in words: features."""
    directions: Mapping[str, Tensor]
    """[T, width] by site name, float64: what the site holds where this truth alone is present; 0 where it has no part.
    """
    present: Callable[[Tensor], Tensor]
    """Of tokens [N] int64, which truths are present in each, [N, T] bool."""


class Directions(NamedTuple):
    """The weights of one source of a dictionary on raw activations, to be compared with a truth."""

    encoder: Tensor
    """[F, D] encoder rows."""
    decoder: Mapping[str, Tensor]
    """[F, E] decoder rows by written site."""
    skip: Mapping[str, Tensor]
    """[E, D] of a skip connection by written site; {} without."""


class Target(Protocol):
    """The model being explained: name its sites, read them, run it with some of them edited."""

    @property
    def name(self) -> str: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def n_ctx(self) -> int:
        """Longest context, tokens."""
        ...

    @property
    def n_vocab(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def identity(self) -> Mapping[str, object]:
        """What makes it this model and no other (name, revision, hash of the weights, dtype): JSON values."""
        ...

    @property
    def gated_mlp(self) -> bool:
        """Whether a neuron (an entry of `mlp_hidden`) has two rows of input weights, one of them a gate's."""
        ...

    def sites(self, patterns: Sequence[str], layers: Sequence[int] | None = None) -> tuple[Site, ...]:
        """Resolve site names, hook names and globs to sites in forward order.

        `layers` restricts bare taps such as `mlp_in` (None: all layers). Raises UserError with near misses for a
        pattern that matches nothing, and for a tap the architecture does not have.
        """
        ...

    def mlp_matrices(self, layer: int) -> MLPMatrices:
        """The weights of a layer's MLP. Raises UserError for one that is not two matrices with a nonlinearity between
        them."""
        ...

    def truths(self, sites: Sequence[Site]) -> Truths | None:
        """The exact solution, of a toy model; None of a language model. Of a toy, `logits` are its output [B, T, D]."""
        ...

    def record(self, tokens: Tensor, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Activations [B, T, width] of `sites` for `tokens` [B, T] int64, by site name.

        Stops after the last needed module; never computes logits. Padding, if any, must be on the right.
        """
        ...

    def logits(self, tokens: Tensor, edits: Mapping[str, Edit] | None = None) -> Tensor:
        """Next-token logits [B, T, V] for `tokens` [B, T], with `edits` by site name applied in forward order.

        Where an edit is `Overwriting`, what it overwrites may be left out of the computation.
        Differentiable in what the edits return when gradients are enabled.
        """
        ...


class Dictionary(Protocol):
    """One trained dictionary, acting on raw activations.

    A source is what one encoder reads: a site, or in a crosscoder several. A destination is a site it reconstructs. An
    SAE has one source that is its destination, a transcoder one of each, a CLT one of each per layer; a crosscoder has
    one source that reads all its destinations.
    """

    @property
    def name(self) -> str: ...

    @property
    def reads(self) -> tuple[str, ...]:
        """Site names that it reads, each once, in forward order."""
        ...

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """By source, the sites that it reads: what `encode` takes is their rows side by side (`side_by_side`)."""
        ...

    @property
    def causal(self) -> bool:
        """Whether the model reaches whatever a destination is computed from before that destination. Only then can the
        dictionary run along in a forward pass (the protocol `cascade`)."""
        ...

    @property
    def writes(self) -> tuple[str, ...]:
        """Site names of the destinations, in forward order."""
        ...

    @property
    def n_latents(self) -> int:
        """F, per source."""
        ...

    @property
    def n_parameters(self) -> int: ...

    @property
    def means(self) -> Mapping[str, Tensor]:
        """Mean of every destination over the training rows, [E] by site name: the mean-ablation baseline."""
        ...

    def write_norms(self) -> Tensor:
        """[sources, destinations] Σ_f ‖w_f‖², f's decoder rows for a destination; NaN where a source does not write."""
        ...

    def latent_costs(self, source: int) -> Tensor:
        """[F] weights that come into play where a latent is active: its encoder row and all that it writes with."""
        ...

    @property
    def fixed_cost(self) -> int:
        """Weights that are used on every token, whatever is active: those of a skip connection. Biases do not count."""
        ...

    def sources(self, destination: int) -> range:
        """Indices of the sources that write to a destination; in a CLT, those of its own layer and before."""
        ...

    def encode(self, source: int, x_ND: Tensor) -> Codes:
        """Codes of raw activations under the frozen inference rule: each token alone decides its own latents."""
        ...

    def decode(self, destination: int, codes: Sequence[Codes]) -> Tensor:
        """Reconstruction [N, E] in raw units from the codes of `sources(destination)`, in that order."""
        ...
