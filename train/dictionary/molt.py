"""Mixtures of linear transforms (MoLT): sparsely gated low-rank maps from input to output.

    ŷ = b + Σ_t g_t U_t V_t (x − c)        g = act(W_enc x + b_enc)

Latent t is a transform of rank r_t: V_t [r_t, D] reads, U_t [E, r_t] writes, and its gate g_t is the code. Transforms
of one rank are stored as blocks `V` [C, r, D] and `U` [C, r, E] (U_t transposed, so that both are rows) and multiplied
densely: two products per rank for all tokens. c is not trained: 0 at first, and after folding the shift of the inputs,
since a gate multiplies what its transform makes of that shift as well.

Ranks and numbers: `ranks` r_1, r_2, … with `transforms` · `multiples` transforms each; the reference has 512, 256, 128,
64, 32 with N, 2N, 4N, 8N, 16N, thus 31N gates and Σ_t r_t = 2560N "equivalent latents", the width of a transcoder with
as many weights; `n_latents` and `expansion` ask for a number of those. The norm of a latent is ‖U_t V_t‖_F, from
‖UV‖²_F = tr((VVᵀ)(UᵀU)), without the [E, D] product. An active transform brings D + r(D + E) weights into play. After
"Sparse mixtures of linear transforms", Transformer Circuits Thread 2025.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from thresher.cache.contracts import Codes
from thresher.cache.errors import UserError
from thresher.train.dictionary import drawing
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.encoder import Fired
from thresher.train.dictionary.spec import (
    DictionaryConfig,
    DictionarySpec,
    _Settings,
    check_one_size,
    latents_asked,
)
from thresher.train.dictionary.topologies import register
from thresher.train.normalise import Affine

_ROWS = (
    ("prefixes", (None,), "whose transforms differ in rank, so that prefixes of them nest nothing"),
    ("resample", (0,), "whose transforms have no row to start anew from a token"),
    ("penalty_norm", ("l2", "none"), "whose transforms have the norm ‖U V‖_F and no row to take another of"),
)
"""Settings of the losses that ask for decoder rows, with the values that do not."""


class Group(NamedTuple):
    """The transforms of one rank, consecutive latents."""

    rank: int
    first: int
    """Index of the first of them."""
    number: int


def groups(settings: _Settings) -> tuple[Group, ...]:
    """By rank, in the order of `ranks`."""
    out, first = [], 0
    multiples = settings.multiples or tuple(2**i for i in range(len(settings.ranks)))
    for rank, multiple in zip(settings.ranks, multiples, strict=True):
        out.append(Group(rank, first, multiple * (settings.transforms or 0)))
        first += out[-1].number
    return tuple(out)


def equivalent_latents(settings: _Settings) -> int:
    """Σ_t r_t: latents of a transcoder with as many weights."""
    return sum(group.number * group.rank for group in groups(settings))


@register("molt")
class Molt(Coder):
    """One site read, one written, by gated transforms."""

    by_rows = False
    admits = frozenset({"transforms", "multiples", "ranks"})
    firing = "jumprelu"
    refuses: ClassVar[Mapping[str, str]] = {
        "gated": "its auxiliary loss decodes with a row for each latent, and a transform has none",
        "groupmax": "its groups would compete across ranks",
    }

    def __init__(self, spec: DictionarySpec, name: str = "", deployed: bool = False) -> None:
        super().__init__(spec, name, deployed)
        self.groups = groups(spec)
        self.V = nn.ParameterList(torch.zeros(g.number, g.rank, spec.d_in) for g in self.groups)
        self.U = nn.ParameterList(torch.zeros(g.number, g.rank, spec.d_out) for g in self.groups)
        self.register_buffer("centre", torch.zeros(spec.d_in))
        self.centre: Tensor

    @classmethod
    def check(cls, config: DictionaryConfig) -> None:
        """Raise UserError unless the transforms' number and ranks are told, and nothing that asks for decoder rows."""
        if config.transforms is None:
            check_one_size(config)
        elif config.n_latents is not None or config.expansion is not None:
            raise UserError(
                f"dictionary.transforms is {config.transforms}, and n_latents = {config.n_latents}, expansion = "
                f"{config.expansion}: the number of transforms is told twice. Keep one of the three."
            )
        if config.decoder not in ("auto", "free"):
            raise UserError(
                f"dictionary.decoder is {config.decoder!r} with kind = 'molt', which has transforms in place of "
                "decoder rows. Remove it."
            )
        for field, fine, why in _ROWS:
            if getattr(config, field) not in fine:
                raise UserError(
                    f"dictionary.{field} is {getattr(config, field)!r} with kind = 'molt', {why}. Remove it."
                )
        if config.init_decoder != "auto":
            raise UserError(
                f"dictionary.init_decoder is {config.init_decoder!r} with kind = 'molt', whose transforms have a start "
                "of their own. Remove it."
            )
        numbers = (config.transforms or 1, *config.ranks, *(config.multiples or ()))
        if not config.ranks or min(numbers) < 1 or len(config.multiples or config.ranks) != len(config.ranks):
            raise UserError(
                f"dictionary.transforms = {config.transforms}, ranks = {list(config.ranks)} and multiples = "
                f"{config.multiples and list(config.multiples)} do not fit; expected whole numbers from 1 on, and as "
                "many multiples as ranks."
            )

    @classmethod
    def check_spec(cls, spec: DictionarySpec) -> None:
        """Raise UserError for a rank that no matrix of these widths has."""
        if max(spec.ranks) > min(spec.d_in, spec.d_out):
            raise UserError(
                f"dictionary.ranks holds {max(spec.ranks)}, but maps from width {spec.d_in} to {spec.d_out} have at "
                f"most rank {min(spec.d_in, spec.d_out)}. Lower it."
            )

    @classmethod
    def sizes(cls, config: DictionaryConfig, width: int) -> dict[str, object]:
        """The number of transforms of all ranks, and N; of n_latents or expansion as near as whole N come."""
        one = dataclasses.replace(config, transforms=1, n_latents=None, expansion=None)
        wanted = latents_asked(config, width) / equivalent_latents(one)
        transforms = max(1, round(wanted)) if config.transforms is None else config.transforms
        return {"n_latents": transforms * sum(group.number for group in groups(one)), "transforms": transforms}

    @classmethod
    def work(cls, spec: DictionarySpec) -> int:
        """Multiply-adds of all transforms, per token."""
        return equivalent_latents(spec) * (spec.d_in + spec.d_out)

    def transformed(self, gates_NF: Tensor, x_ND: Tensor) -> Tensor:
        """[N, E] Σ_t g_t U_t V_t (x − c), densely, rank by rank."""
        out_NE: Tensor | float = 0.0
        x_ND = x_ND - self.centre
        for group, V_CrD, U_CrE in zip(self.groups, self.V, self.U, strict=True):
            h_NCr = (x_ND @ V_CrD.flatten(0, 1).T).unflatten(1, V_CrD.shape[:2])
            gated_NCr = h_NCr * gates_NF[:, group.first : group.first + group.number, None]
            out_NE = out_NE + gated_NCr.flatten(1) @ U_CrE.flatten(0, 1)
        assert isinstance(out_NE, Tensor)
        return out_NE

    def add(self, y_NSE: Tensor, source: int, part: Fired, x_ND: Tensor) -> Tensor:
        """The reconstruction with what the gates let through."""
        gates_NF, selection = part.z, part.selection
        if selection is not None:  # entries that are padding add 0 to the last token
            blank_NF = part.z.new_zeros(selection.tokens, selection.width)
            gates_NF = blank_NF.index_put((selection.rows, selection.latents), part.z, accumulate=True)
        return y_NSE + self.transformed(gates_NF, x_ND)[:, None]

    def explain(self, source: int, latents: Tensor, z_Nn: Tensor, x_ND: Tensor) -> Tensor:
        """[N, E] what some transforms write."""
        gates_NF = z_Nn.new_zeros(z_Nn.shape[0], self.n_latents).index_copy(1, latents, z_Nn)
        return self.transformed(gates_NF, x_ND)

    @torch.no_grad()
    def decode(self, destination: int, codes: Sequence[Codes]) -> Tensor:
        """[N, E] from the one source's codes and its input."""
        (part,) = codes
        assert part.x is not None, "codes of a MoLT carry its input"
        return self.b_dec[destination] + self.transformed(part.dense(), part.x)

    def decoder_norm(self, source: int) -> Tensor:
        """[F] ‖U_t V_t‖_F, with gradient; none at 0."""
        squares = [((V @ V.mT) * (U @ U.mT)).sum((1, 2)) for V, U in zip(self.V, self.U, strict=True)]
        squares_F = torch.cat(squares)
        positive = squares_F > 0
        return torch.where(positive, squares_F, 1.0).sqrt() * positive

    @torch.no_grad()
    def write_norms(self) -> Tensor:
        """[1, 1] Σ_t ‖U_t V_t‖²_F."""
        return self.decoder_norm(0).double().square().sum().reshape(1, 1).cpu()

    def latent_costs(self, source: int) -> Tensor:
        """[F] float64: encoder row and both factors."""
        width, out = self.spec.d_in, self.spec.d_in + self.spec.d_out
        costs = [torch.full((g.number,), float(width + g.rank * out), dtype=torch.float64) for g in self.groups]
        return torch.cat(costs)

    def draw(self, source: int, rng: torch.Generator) -> None:
        """Encoder and V uniform in ±1/√D, U zero, so that it starts as the mean; where transforms are ranked by their
        norm, which then must not be 0, U uniform in ±1/√E."""
        enc, _ = drawing.resolved(self.spec, self.starts)
        W_enc = self.encoder(source).W_enc
        W_enc.copy_(drawing.rows(enc, W_enc.shape, self.spec, rng))
        for V_CrD in self.V:
            V_CrD.copy_(drawing.uniform(V_CrD.shape, self.spec.d_in**-0.5, rng))
        for U_CrE in self.U if self.spec.rank_by == "norm" else ():
            U_CrE.copy_(drawing.uniform(U_CrE.shape, self.spec.d_out**-0.5, rng))

    def constrain(self, source: int) -> None:
        """Nothing: there are no rows."""

    def fold(self, trained: Coder, reads: Sequence[Affine], writes: Sequence[Affine], factor: float) -> None:
        """V diag(1/σ_x), diag(σ_y) U, and c ⊙ σ_x + μ_x."""
        assert isinstance(trained, Molt)
        device = self.mean.device
        for i in range(len(self.groups)):
            self.V[i].copy_(trained.V[i].double() / reads[0].scale.to(device))
            self.U[i].copy_(trained.U[i].double() * writes[0].scale.to(device))
        self.centre.copy_(trained.centre.double() * reads[0].scale.to(device) + reads[0].shift.to(device))

    def unfold(self, saved: Coder, reads: Sequence[Affine], writes: Sequence[Affine]) -> None:
        """The inverse of `fold`, where c need not come out as 0."""
        assert isinstance(saved, Molt)
        for i in range(len(self.groups)):
            self.V[i].copy_(saved.V[i].double().cpu() * reads[0].scale)
            self.U[i].copy_(saved.U[i].double().cpu() / writes[0].scale)
        self.centre.copy_((saved.centre.double().cpu() - reads[0].shift) / reads[0].scale)

    def decoder_tensors(self) -> dict[str, Tensor]:
        """`V.g`, `U.g` by rank, and the centre."""
        named = {f"V.{i}": weight.data for i, weight in enumerate(self.V)}
        return named | {f"U.{i}": weight.data for i, weight in enumerate(self.U)} | {"centre.0": self.centre}
