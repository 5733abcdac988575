"""Latent sharding: which of a dictionary's latents one rank holds, and how sums over all of them come about.

Of the F latents of every source, rank r of a group of R holds the consecutive ones from bounds[r] to bounds[r + 1]:
their rows of encoder and decoder (over all destinations), biases, thresholds, counters and optimiser state. What is no
latent's own (b_dec, W_skip, single thresholds) every rank has, and since all see the same rows and the same sums, it
stays the same on all of them. Everything that a step needs of all latents is a sum over them:

    ŷ = b_dec + Σ_r Σ_{f of rank r} z_f w_f

so the ranks add up their partial reconstructions, together with the other sums that losses ask for (`Sums`), in one
collective. Every rank then computes the same loss, whose gradient to a partial sum is the one to the sum: the backward
pass of the collective is the identity, and needs none.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.cache.errors import UserError
from thresher.train.mesh import Group

if TYPE_CHECKING:
    from thresher.train.dictionary.spec import DictionarySpec


class Sums(NamedTuple):
    """Sums over latents that losses ask for beside reconstructions: first of a rank's latents, then of all."""

    sparsity: Tensor | None = None
    """[sources] what the sparsity penalty adds up over tokens and latents, before any weight."""
    preact: Tensor | None = None
    """[sources] the same of the pre-activation loss."""
    rule: Tensor | None = None
    """[N, S, E] what the firing rule's own terms decode."""
    aux: Tensor | None = None
    """[N, S, E] AuxK's reconstruction."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One rank's latents of every source."""

    group: Group
    """The ranks that hold the others."""
    bounds: tuple[int, ...]
    """[R + 1] first latent of every rank, then F."""

    @property
    def first(self) -> int:
        """Its first latent."""
        return self.bounds[self.group.index]

    @property
    def stop(self) -> int:
        """The latent after its last."""
        return self.bounds[self.group.index + 1]

    @property
    def size(self) -> int:
        """How many it holds."""
        return self.stop - self.first

    @property
    def width(self) -> int:
        """F."""
        return self.bounds[-1]

    @property
    def widest(self) -> int:
        """The most that a rank holds."""
        return max(stop - first for first, stop in itertools.pairwise(self.bounds))

    def ends(self, ends: Sequence[int]) -> list[int]:
        """Ends of prefixes of all latents, counted in those of this rank."""
        return [min(max(end - self.first, 0), self.size) for end in ends]

    def own_spec(self, spec: "DictionarySpec") -> "DictionarySpec":
        """The spec of the rank's own latents, as encoders and rules are built from: what follows from F is settled."""
        part = copy.copy(spec)
        settled: dict[str, Any] = {"n_latents": self.size}
        if spec.k is not None:
            settled["k_start"] = spec.resolved_k_start
        if spec.firing == "jumprelu":
            settled["theta"] = spec.resolved_theta
        if spec.firing == "groupmax" and spec.k is not None:
            settled["k"] = settled["k_start"] = spec.k * self.size // self.width
        for name, value in settled.items():
            object.__setattr__(part, name, value)  # it is no recipe's: what was checked is the whole
        return part

    def add_up(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over all ranks, with gradient; one collective."""
        return list(_AddUp.apply(self.group, *tensors))

    def whole(self, own_F: Tensor) -> Tensor:
        """[F] of all latents, from each rank's vector of its own; without gradient, one collective."""
        padded = own_F.new_zeros(self.widest)
        padded[: self.size] = own_F.detach()
        sizes = [stop - first for first, stop in itertools.pairwise(self.bounds)]
        gathered = self.group.gather(padded)
        return torch.cat([row[:size] for row, size in zip(gathered, sizes, strict=True)])


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        flat = torch.cat([part.reshape(-1) for part in parts])
        group.add_up([flat])
        pieces = flat.split([part.numel() for part in parts])
        return tuple(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients


def holding_of(spec: "DictionarySpec", group: Group) -> Holding | None:
    """A rank's share of a dictionary; None where it holds all of it.

    Raises UserError for a dictionary that cannot be shared, with the reason.
    """
    if group.alone:
        return None
    _check(spec)
    unit = spec.n_latents // int(spec.k or 1) if spec.firing == "groupmax" else 1
    units = spec.n_latents // unit
    if units < group.size:
        what = f"{units} groups (k)" if spec.firing == "groupmax" else f"{units} latents"
        raise UserError(
            f"parallel.latents is {group.size}, but the dictionary has only {what} to share; expected at most as many "
            "processes. Lower parallel.latents."
        )
    return Holding(group=group, bounds=tuple(unit * (units * rank // group.size) for rank in range(group.size + 1)))


def _check(spec: "DictionarySpec") -> None:
    from thresher.train.dictionary import rules
    from thresher.train.dictionary.topologies import topology

    rule = rules.facts(spec.firing)
    if not topology(spec.kind).shareable:
        raise UserError(
            f"dictionary.kind is {spec.kind!r}, whose latents cannot be shared by several processes "
            "(parallel.latents): what it writes is no row of one decoder per latent. Use parallel.data, or spread the "
            "dictionaries of a sweep instead."
        )
    if not rule.shareable:
        raise UserError(
            f"dictionary.firing is {spec.firing!r}, of which it is not known how it chooses among latents of several "
            "processes (parallel.latents); expected a rule that says `shareable = True` (docs/extending.md). Use "
            "parallel.data, or spread the dictionaries of a sweep instead."
        )
    if spec.firing == "groupmax" and spec.k_anneal:
        raise UserError(
            f"dictionary.k_anneal is {spec.k_anneal} with firing = 'groupmax', whose groups then change their size, "
            "but processes that share latents (parallel.latents) hold whole groups. Set k_anneal = 0, or use "
            "parallel.data."
        )
