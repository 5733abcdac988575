"""The frame of every dictionary: sources that are encoded, destinations that are reconstructed, and what links them.

A source is what one encoder reads, a destination a site that is reconstructed. Here there is one of each,

    ŷ = z W_dec + b_dec (+ W_skip x)        z from x

and the topologies (single.py, crosslayer.py, crosscoder.py, molt.py, registered in topologies.py) say what differs:
in what they read, write and take (form.py), or in how they compute it.
All decoders are stored by source, [F, T, E], T the destinations that the source writes; latent f's row is contiguous
over all of them.

The same class trains (`forward`, in the training space of train/normalise.py) and serves (`encode`, `decode`, on raw
activations, once dictionary/fold.py made the weights so); it implements cache.contracts.Dictionary.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from thresher.cache.contracts import Codes
from thresher.train.anneal import Anneal
from thresher.train.dictionary import drawing
from thresher.train.dictionary.encoder import Chosen, Encoder, Fired
from thresher.train.dictionary.form import Form
from thresher.train.dictionary.holding import Holding, Sums
from thresher.train.dictionary.pools import choose
from thresher.train.dictionary.rules import facts
from thresher.train.dictionary.shared import Beside, cut_codes, decode_shared, shared_pass
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.gradients import Sink, Sinks
from thresher.train.kernels.prefixes import add_segments
from thresher.train.kernels.sparse import add_decoded, bags
from thresher.train.kernels.weights import folded_bias, row_norms
from thresher.train.normalise import Affine, Frame, modes, token_frame
from thresher.train.stages import stage


class Pass(NamedTuple):
    """A training pass."""

    fired: tuple[Fired, ...]
    """Per source."""
    y: Tensor
    """[N, S, E] reconstructions of all destinations, with gradient."""
    prefixes: tuple[Tensor, ...] = ()
    """[N, S, E] those by Matryoshka's prefixes, without the last, which is `y`; with gradient."""
    wide: Tensor | None = None
    """[N, S, E] that by Multi-TopK's second code, with gradient; None: there is none."""
    sums: Sums | None = None
    """Of ranks that share latents: sums over all latents, with gradient to this rank's; None: one rank has all."""


def wide_of(fired: Sequence[Fired]) -> list[Fired]:
    """Multi-TopK's second codes in the place of the main ones; none where there are none."""
    return [part._replace(selection=part.wide.selection, z=part.wide.z) for part in fired if part.wide]


class Coder(Form):
    """One source, one destination, and what the topologies holding."""

    def __init__(
        self, spec: DictionarySpec, name: str = "", deployed: bool = False, holding: Holding | None = None
    ) -> None:
        """Weights are zero until `initialise` or a load; `deployed` swaps learned rules for constant thresholds.

        `holding`: only these latents (holding.py), while `spec` stays that of all.
        """
        super().__init__()
        self.spec = spec
        self.holding = holding
        self.label = name
        self.deployed = deployed
        own = spec if holding is None else holding.own_spec(spec)
        self.encoders = nn.ModuleList(Encoder(own, deployed) for _ in self.inputs)
        self.W_dec = nn.ParameterList(
            torch.zeros(own.n_latents, len(self.written(source)), spec.d_out)
            for source in range(len(self.inputs))
            if self.by_rows
        )
        self.b_dec = nn.Parameter(torch.zeros(len(spec.writes), spec.d_out))
        skip = torch.zeros(len(spec.writes), spec.d_out, spec.d_in) if spec.skip else None
        self.W_skip = None if skip is None else nn.Parameter(skip)
        self.register_buffer("mean", torch.zeros(len(spec.writes), spec.d_out))
        self.mean: Tensor
        self.anneal = Anneal(spec) if spec.resolved_penalty == "lp" and not deployed else None
        for source in range(len(self.inputs)):
            self.encoder(source).aux_width = len(self.explained(source)) * spec.d_out
        self.sinks: Sinks | None = None
        self.dead: list[list[int]] = []
        """By rank and source, of ranks that share latents: how many are dead, as of the last `recount`."""
        self.partial: list[Tensor] = []
        """[S, E] what a pre-bias read of `b_dec`: leaves whose gradients ranks that share latents add up, or those."""
        for source in range(len(self.inputs) if holding is not None else 0):
            self.encoder(source).asks, self.encoder(source).aux_width = True, 0
        self.use(Kernels())

    # What cache.contracts.Dictionary asks for, beside what it reads and writes.

    @property
    def means(self) -> Mapping[str, Tensor]:
        """[E] by site name: means of the destinations over the training rows."""
        return {site: self.mean[index] for index, site in enumerate(self.writes)}

    @torch.no_grad()
    def write_norms(self) -> Tensor:
        """[sources, destinations] Σ_f ‖w_f‖²; NaN where a source does not write."""
        out = torch.full((len(self.inputs), len(self.writes)), torch.nan, dtype=torch.float64)
        for source, weight_FTE in enumerate(self.W_dec):
            squares_T = torch.linalg.vector_norm(weight_FTE, dim=(0, 2), dtype=torch.float64).square()
            out[source, list(self.written(source))] = squares_T.cpu()
        return out

    @property
    def n_latents(self) -> int:
        """F, per source; of a share as many as are here."""
        return self.spec.n_latents if self.holding is None else self.holding.size

    def latent_costs(self, source: int) -> Tensor:
        """[F] float64: encoder row and rows for all destinations."""
        spec = self.spec
        cost = spec.d_in + len(self.written(source)) * spec.d_out
        return torch.full((self.n_latents,), float(cost), dtype=torch.float64)

    @property
    def fixed_cost(self) -> int:
        """Weights of the skip connection."""
        return 0 if self.W_skip is None else self.W_skip.numel()

    def encode(self, source: int, x_ND: Tensor) -> Codes:
        """Codes of one source under the frozen rule."""
        frame = self.frame(x_ND)
        x_ND = x_ND if frame is None else frame.enter(x_ND)
        codes = self.encoder(source).encode(x_ND, self.bias(source).detach(), self.rank_norms(source))
        if self.holding is not None:
            codes = cut_codes(self, source, codes)
        if self.W_skip is not None or not self.by_rows:
            codes = codes._replace(x=x_ND)
        return (
            codes if frame is None or self.spec.normalise != "per_token" else codes._replace(frame=torch.cat(frame, 1))
        )

    def frame(self, x_ND: Tensor) -> Frame | None:
        """What a deployed dictionary normalises each row with before it encodes it; None: rows stay as they are."""
        return token_frame(x_ND) if self.deployed and modes(self.spec.normalise)[0] == "per_token" else None

    @torch.no_grad()
    def decode(self, destination: int, codes: Sequence[Codes]) -> Tensor:
        """[N, E] from the codes of `sources(destination)`, in that order."""
        y_NE = self.b_dec[destination].expand(codes[0].tokens, -1)
        if self.holding is not None:
            return decode_shared(self, self.holding, destination, codes)
        for source, part in zip(self.sources(destination), codes, strict=True):
            span = self.written(source)
            table = self.W_dec[source].flatten(0, 1)  # row f·T + t: latent f's row for its t-th destination
            index = part.latents * len(span) + (destination - span.start)
            y_NE = y_NE + bags(table, index, part.offsets, part.values)
            if self.W_skip is not None and source == destination:
                assert part.x is not None, "codes of a dictionary with a skip connection carry its input"
                y_NE = torch.addmm(y_NE, part.x, self.W_skip[destination].T)
        return self.outside(y_NE, codes)

    def outside(self, y_NE: Tensor, codes: Sequence[Codes]) -> Tensor:
        """Reconstructions as they are outside of the frames that a dictionary gives every token."""
        frame_N2 = codes[0].frame
        return y_NE if frame_N2 is None else Frame(frame_N2[:, :1], frame_N2[:, 1:]).leave(y_NE)

    # What training asks for.

    def use(self, kernels: Kernels) -> None:
        """Let its choices hold here, in the encoders and in their rules."""
        self.kernels = kernels
        for source in range(len(self.inputs)):
            encoder = self.encoder(source)
            encoder.kernels = encoder.rule.kernels = kernels

    def at(self, step: int) -> None:
        """Let rules be as in the training step of that number, counted from 0."""
        for source in range(len(self.inputs)):
            self.encoder(source).rule.at(step)

    def gather(self) -> Sinks:
        """From now on, gradients of encoders and decoders go to sinks (kernels/gradients.py) and not to autograd."""
        encoders = [self.encoder(source) for source in range(len(self.inputs))]
        self.sinks = Sinks([*(encoder.W_enc for encoder in encoders), *self.W_dec])
        for encoder in encoders:
            encoder.sink = self.sinks.of(encoder.W_enc)
        return self.sinks

    def encoder(self, source: int) -> Encoder:
        """One source's encoder."""
        module = self.encoders[source]
        assert isinstance(module, Encoder)
        return module

    def bias(self, source: int) -> Tensor:
        """[F] encoder bias with the pre-bias folded in: W (x − b_dec) + b_enc = W x + (b_enc − W b_dec)."""
        encoder = self.encoder(source)
        if not self.spec.pre_bias or self.deployed:
            return encoder.b_enc
        b_dec_D = self.b_dec[source]
        if (
            self.holding is not None and torch.is_grad_enabled()
        ):  # other ranks' latents teach it as well: added up later
            leaf_SE = self.b_dec.detach().requires_grad_()
            self.partial.append(leaf_SE)
            b_dec_D = leaf_SE[source]
        if self.kernels.forced == "plain":
            return encoder.b_enc - encoder.W_enc @ b_dec_D
        return folded_bias(encoder.b_enc, encoder.W_enc, b_dec_D, encoder.sink)

    def partial_gradient(self) -> Tensor:
        """[S, E] what this rank's latents add to the gradient of b_dec by reading it."""
        total_SE = torch.zeros_like(self.b_dec)
        for leaf_SE in self.partial:
            found_SE = leaf_SE.grad if leaf_SE.requires_grad else leaf_SE
            if found_SE is not None:
                total_SE += found_SE
        return total_SE

    @torch.no_grad()
    def recount(self) -> None:
        """Tell one another how many latents are dead, where ranks share them: after a load, or a change from outside.
        A collective."""
        if self.holding is not None:
            encoders = [self.encoder(source) for source in range(len(self.inputs))]
            counts = torch.stack([torch.count_nonzero(e.dead(e.dead_after)) for e in encoders])
            self.dead = self.holding.group.gather(counts).tolist()

    def dead_of(self, source: int) -> int:
        """How many of a source's latents are dead on all ranks that share them."""
        return sum(counts[source] for counts in self.dead)

    def forward(
        self, xs: Sequence[Tensor], chosen: Sequence[Chosen | None] | None = None, beside: Beside | None = None
    ) -> Pass:
        """Training codes and reconstructions of one batch; xs: per source [N, D]; `chosen`: selections made before.

        `beside`: what ranks that share latents add up together with the reconstructions.
        """
        if self.holding is not None and (chosen is None or any(one is None for one in chosen)):
            chosen = choose(self, [xs])[0]
        if chosen is None and self.spec.pool == "joint":
            chosen = choose(self, [xs])[0]
        before = chosen or [None] * len(xs)
        fired = tuple(self.fire(source, x_ND, before[source]) for source, x_ND in enumerate(xs))
        if self.holding is not None:
            return shared_pass(self, self.holding, xs, fired, beside)
        with stage("decode"):
            *prefixes, y_NSE = self._reconstructed(xs, fired, self.spec.prefix_ends)
            wide = wide_of(fired)
            second = self._reconstructed(xs, wide)[0] if wide else None
        return Pass(fired, y_NSE, tuple(prefixes), second)

    def _reconstructed(self, xs: Sequence[Tensor], codes: Sequence[Fired], ends: Sequence[int] = ()) -> list[Tensor]:
        """[N, S, E] reconstructions by the first latents of every source up to each end, the last F; or by all.

        `codes`: by source, of which the selection and z count.
        """
        sums = [self.without_codes(xs)]
        sums += [torch.zeros_like(sums[0]) for _ in ends[1:]]
        return list(itertools.accumulate(self.written_by(sums, xs, codes, ends)))

    def written_by(
        self, sums: list[Tensor], xs: Sequence[Tensor], codes: Sequence[Fired], ends: Sequence[int]
    ) -> list[Tensor]:
        """The sums [N, S, E], which may be changed in place, each with what the codes of its segment of latents add;
        of one segment, all of them, where there are no `ends`."""
        for source, (part, x_ND) in enumerate(zip(codes, xs, strict=True)):
            if ends:
                sums = self.add_segments(sums, source, part, x_ND, ends)
            else:
                sums = [self.add(sums[0], source, part, x_ND)]
        return sums

    def add_segments(
        self, sums: Sequence[Tensor], source: int, part: Fired, x_ND: Tensor, ends: Sequence[int]
    ) -> list[Tensor]:
        """`add` to each of several what a segment of latents writes; they end at `ends` (kernels/prefixes.py)."""
        W_dec, first, sink = self.W_dec[source], self.written(source).start, self.decoder_sink(source)
        return list(add_segments(sums, part.z, W_dec, part.selection, ends, first, self.kernels, sink))

    def without_codes(self, xs: Sequence[Tensor]) -> Tensor:
        """[N, S, E] what is reconstructed when nothing fires: biases, and the skip of each destination's own input."""
        if self.W_skip is None:
            return self.begin(xs[0].shape[0])
        return torch.stack([torch.addmm(b, x, W.T) for b, x, W in zip(self.b_dec, xs, self.W_skip, strict=True)], 1)

    def add(self, y_NSE: Tensor, source: int, part: Fired, x_ND: Tensor) -> Tensor:
        """The reconstructions with what one source's codes write; `y_NSE` may be changed in place."""
        W_dec, first, sink = self.W_dec[source], self.written(source).start, self.decoder_sink(source)
        return add_decoded(y_NSE, part.z, W_dec, part.selection, first, self.kernels, sink)

    def explain(self, source: int, latents: Tensor, z_Nn: Tensor, x_ND: Tensor) -> Tensor:
        """[N, T·E] what codes of some latents [n] write to the `explained` destinations, without biases."""
        return z_Nn @ self.own_rows(source).index_select(0, latents)

    def own_rows(self, source: int) -> Tensor:
        """[F, T·E] view of the decoder for the `explained` destinations, which come first in a row."""
        return self.W_dec[source][:, : len(self.explained(source))].flatten(1)

    # With `add` the same source by source, where a later one reads what follows from an earlier one's writing.

    def fire(self, source: int, x_ND: Tensor, chosen: Chosen | None = None) -> Fired:
        """Training codes of one source."""
        norms = self.rank_norms(source) if chosen is None else chosen.norms
        fired: Fired = self.encoder(source)(x_ND, self.bias(source), chosen, norms)
        return fired

    def begin(self, tokens: int) -> Tensor:
        """[N, S, E] the decoder's biases, before any source was read."""
        return self.b_dec.expand(tokens, -1, -1).clone(memory_format=torch.contiguous_format)

    def skip(self, y_NSE: Tensor, source: int, x_ND: Tensor) -> Tensor:
        """The reconstructions with the skip connection of one source's own destination."""
        if self.W_skip is None:
            return y_NSE
        own_N1E = y_NSE[:, source : source + 1] + (x_ND @ self.W_skip[source].T)[:, None]
        return torch.cat([y_NSE[:, :source], own_N1E, y_NSE[:, source + 1 :]], 1)

    def decoder_sink(self, source: int) -> Sink | None:
        """Where the gradient of a source's decoder goes; None: to autograd."""
        return None if self.sinks is None or not self.by_rows else self.sinks.of(self.W_dec[source])

    def rank_norms(self, source: int) -> Tensor | None:
        """[F] what pre-activations are multiplied with to rank latents, without gradient; None: nothing.

        A deployed dictionary has it in its thresholds, or carries it for a rule that has none.
        """
        if self.spec.rank_by != "norm":
            return None
        if self.deployed:
            return None if facts(self.spec.firing).thresholded else self.encoder(source).norms
        return self.decoder_norm(source).detach()

    def decoder_norm(self, source: int) -> Tensor:
        """[F] norm of each latent's row over all its destinations together, with gradient."""
        if self.kernels.forced == "plain":
            return torch.linalg.vector_norm(self.W_dec[source].flatten(1), dim=1)
        return row_norms(self.W_dec[source], self.decoder_sink(source))

    # How weights begin, fold and are stored.

    def draw(self, source: int, rng: torch.Generator) -> None:
        """Set a source's initial encoder and decoder, before the decoder's constraint; of a share its own rows."""
        enc, dec = drawing.resolved(self.spec, self.starts)
        W_enc, W_dec = self.encoder(source).W_enc, self.W_dec[source]
        if enc == "tied":
            W_dec.copy_(drawing.rows(dec, W_dec.flatten(1).shape, self.spec, rng, self.holding).view_as(W_dec))
            W_enc.copy_(W_dec.flatten(1))
            return
        W_enc.copy_(drawing.rows(enc, W_enc.shape, self.spec, rng, self.holding))
        if dec == "tied":  # for several destinations: each one's part of a row, unless the encoder's spans them all
            W_dec.copy_(W_enc.unflatten(1, (-1, W_dec.shape[2])).expand_as(W_dec))
        else:
            W_dec.copy_(drawing.rows(dec, W_dec.flatten(1).shape, self.spec, rng, self.holding).view_as(W_dec))

    def constrain(self, source: int) -> None:
        """Set the norm of decoder rows to 1, as far as the spec wants it."""
        if self.spec.unit_norm:
            self.W_dec[source].div_(self.decoder_norm(source)[:, None, None])
        if self.spec.unit_per_target:
            self.W_dec[source].copy_(nn.functional.normalize(self.W_dec[source], dim=2))

    def fold(self, trained: "Coder", reads: Sequence[Affine], writes: Sequence[Affine], factor: float) -> None:
        """Take over a trained module's decoder, made to write in raw units (fold.py)."""
        for source in range(len(self.inputs)):
            scales_TE = torch.stack([writes[destination].scale for destination in self.written(source)])
            self.W_dec[source].copy_(trained.W_dec[source].double() * scales_TE.to(self.mean.device) / factor)

    def unfold(self, saved: "Coder", reads: Sequence[Affine], writes: Sequence[Affine]) -> None:
        """Take over what a deployed module has beside encoders, rows and biases (unfold.py); on the CPU."""
        if self.W_skip is not None and saved.W_skip is not None:
            for j, (read, site) in enumerate(zip(reads, writes, strict=True)):
                W_ED = saved.W_skip[j].double().cpu() * read.scale / site.scale[:, None]
                self.W_skip[j] = W_ED.to(self.W_skip)

    def decoder_tensors(self) -> dict[str, Tensor]:
        """What a run file holds of decoder and skip connection, by name."""
        named = {f"W_dec.{source}": weight.data for source, weight in enumerate(self.W_dec)}
        if self.W_skip is not None:
            named |= {f"W_skip.{destination}": weight for destination, weight in enumerate(self.W_skip.data)}
        return named
