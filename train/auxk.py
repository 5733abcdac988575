"""AuxK: latents that have been silent too long reconstruct what the dictionary left.

After Gao et al. 2024, arXiv:2406.04093. Of a source's n dead latents each token takes the k' = min(k_aux, n) with the
largest pre-activations a. With z' = relu(a) and e = y − ŷ, detached,

    ê = Σ z' w (no decoder bias)        AuxK = min(n / k_aux, 1) · Σ‖ê − e‖² / Σ‖e − ē‖²

(`spec.aux_divisor` names another divisor, `spec.aux_scale` leaves the factor out), so only dead rows of encoder and
decoder learn, and b_dec does not. In a CLT every layer's dead latents take their own layer's residual through their
rows for that layer, and the term is the mean over the layers that have dead latents; with `spec.aux_scope = "all"` they
explain all layers together (train/auxk_joint.py). A
crosscoder's take the residuals of all its sites as one long e. A MoLT's are transforms, and go the plain way.

`plain_error` is the specification, by ordinary autograd. The fast form takes the pre-activations from the block that
the encoder has made anyway (kernels/silent.py), and then costs O(codes): everything is linear in ê − e, so its backward
pass is three products with the same entries, whose rows are added to the gradients of dead rows alone. Where the codes
fill a large share of [N, n], dense products on the gathered rows are faster.

On CUDA, where nothing may be read back, the list of dead latents has a fixed length (kernels/silent.py), the products
are dense and take operands in the format of the encoder's, and how many are dead is a number over there.

On a CPU with a matrix unit for bfloat16 (AMX) large products of this term alone take operands rounded to bfloat16, as
all of a GPU's do, also in float32 training: they are four to five times faster than float32 and the sparse ones no more
than one and a half times. The gradient then is off by up to 0.4 %; where AuxK woke 30 % dead latents, final held-out
FVU moved by 0.0001 to 0.0002, and by 0.003 between seeds. Parts of bfloat16 (high · high + high · low + low ·
high) would bring back the digits, but need products with float32 results, which torch offers on a CPU only through a
setting of the whole process. `kernels = "plain"` has none of this.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.train.auxk_joint import joint
from thresher.train.dictionary.coder import Coder, Pass
from thresher.train.dictionary.encoder import Encoder
from thresher.train.kernels import low, padded, slabs
from thresher.train.kernels.gradients import Sink
from thresher.train.kernels.residual import Left
from thresher.train.kernels.silent import Dead, Silent, SilentBlock, by_latent, plain_silent
from thresher.train.kernels.tiles import tile_rows

_DENSE_SHARE = 0.3
"""Share of [N, n] filled by codes above which four dense products should be faster than four sparse ones: reckoned from
the times of single products, not measured as a whole."""


def auxiliary(
    coder: Coder, done: Pass, xs: Sequence[Tensor], lefts: Sequence[Left], divisor_S: Tensor | None = None
) -> Tensor:
    """The mean over the sources that have dead latents; 0 when none has.

    `lefts`: what `done` left of every destination. `divisor_S`: what Σ‖ê − e‖² is divided by, per destination; None: by
    Σ‖e − ē‖², these rows being the whole batch.
    """
    xs = [x_ND.detach() for x_ND in xs]  # what made them, in training end to end, does not learn from AuxK
    if coder.spec.aux_scope == "all":
        return joint(coder, done, xs, lefts, [dead_latents(coder, i, done) for i in range(len(xs))], divisor_S)
    terms, counts = [], []
    for source, x_ND in enumerate(xs):
        dead = dead_latents(coder, source, done)
        if dead is not None:
            span = coder.explained(source)
            own = [lefts[destination] for destination in span]
            apart_S = (
                torch.stack([left.variation() for left in own])
                if divisor_S is None
                else divisor_S[span.start : span.stop]
            )
            residual_NE = own[0].residual if len(own) == 1 else torch.cat([left.residual for left in own], 1)
            terms.append(_share(coder, source, dead, done.fired[source].silent, x_ND, residual_NE, apart_S.sum()))
            counts += [] if dead.number is None else [dead.number]
    if not terms:
        return done.y.new_zeros(())
    if not counts:
        return torch.stack(terms).mean()
    return torch.stack(terms).sum() / torch.count_nonzero(torch.stack(counts)).clamp_min(1)  # others are 0


def dead_latents(coder: Coder, source: int, done: Pass) -> Dead | None:
    """Which are dead, as the encoder's pass knew it; None: none."""
    silent = done.fired[source].silent
    if silent is not None:
        return Dead(silent.latents, silent.number if isinstance(silent, Silent) else None)
    encoder = coder.encoder(source)
    if encoder.rule.aux_floor() is not None:
        return encoder.asleep(done.fired[source].tokens)
    if padded.must_not_ask(encoder.W_enc) and coder.kernels.forced != "plain":
        return None
    latents = encoder.dead_latents()
    return None if latents is None else Dead(latents)


def _share(
    coder: Coder,
    source: int,
    dead: Dead,
    silent: Silent | SilentBlock | None,
    x_ND: Tensor,
    residual_NE: Tensor,
    total: Tensor,
) -> Tensor:
    """One source's term."""
    enough = coder.spec.resolved_aux_k if coder.spec.aux_scale else 1
    weight: Tensor | float = min(dead.latents.shape[0] / enough, 1.0)
    if dead.number is not None:
        weight = (dead.number.to(total.dtype) / enough).clamp_max(1.0)
    factor = weight / total.where(total > 0, torch.inf)  # nothing to explain: 0
    if silent is None or not coder.by_rows:
        if silent is None:
            coder.kernels.pick("auxk", x_ND.device, x_ND.dtype, 0)
        return factor * plain_error(coder, source, dead, x_ND, residual_NE)
    encoder, b_dec_D = coder.encoder(source), coder.b_dec[source].detach() if coder.spec.pre_bias else None
    weights = (encoder.W_enc, encoder.b_enc, coder.W_dec[source])
    sinks = (encoder.sink, coder.decoder_sink(source))
    out: Tensor = _Error.apply(
        *weights, silent.latents, x_ND, residual_NE, b_dec_D, way_of(coder, encoder, silent), sinks
    )
    return factor * out


def plain_error(coder: Coder, source: int, dead: Dead, x_ND: Tensor, residual_NE: Tensor) -> Tensor:
    """Σ‖ê − e‖² by ordinary autograd: the specification; and the only form for a rule with a floor of its own."""
    guess_NE = plain_guess(coder, source, dead, x_ND)
    return (guess_NE - residual_NE).square().sum()


def plain_guess(coder: Coder, source: int, dead: Dead, x_ND: Tensor, chosen: Silent | None = None) -> Tensor:
    """[N, T·E] what dead latents reconstruct. `chosen`: which of their codes are woken, where that is known."""
    encoder, latents = coder.encoder(source), dead.latents
    shifted_ND = x_ND - coder.b_dec[source].detach() if coder.spec.pre_bias else x_ND
    a_Nn = F.linear(shifted_ND, encoder.W_enc[latents], encoder.b_enc[latents])
    a_Nn = a_Nn if dead.number is None else a_Nn.masked_fill(~dead.real(), padded.PADDING)
    floor = encoder.rule.aux_floor()
    if chosen is not None:
        kept_Nn = torch.zeros_like(a_Nn, dtype=torch.bool)
        kept_Nn[chosen.selection.rows, chosen.selection.latents] = True
    elif floor is None:
        kept_Nn = plain_silent(a_Nn.detach(), torch.arange(len(latents), device=a_Nn.device), coder.spec.resolved_aux_k)
    else:
        kept_Nn = a_Nn.detach() > floor
    return coder.explain(source, latents, a_Nn * kept_Nn, x_ND)


class _Error(torch.autograd.Function):
    """Σ‖ê − e‖² with gradients to the rows of dead latents."""

    @staticmethod
    def forward(
        ctx: Any,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec_FTE: Tensor,
        latents: Tensor,
        x_ND: Tensor,
        residual_NE: Tensor,
        b_dec_D: Tensor | None,
        way: "Way",
        sinks: tuple[Sink | None, Sink | None],
    ) -> Tensor:
        products = way(W_dec_FTE.flatten(1)[:, : residual_NE.shape[1]])
        total = products.error(residual_NE)
        ctx.products, ctx.latents, ctx.sinks = products, latents, sinks
        ctx.save_for_backward(W_enc, b_enc, W_dec_FTE, x_ND, b_dec_D)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, b_enc, W_dec_FTE, x_ND, b_dec_D = ctx.saved_tensors
        products, ctx.products = ctx.products, None  # autograd frees only what was saved with it
        found = products.gradients(x_ND, b_dec_D, 2 * g)
        return *to_rows(W_enc, b_enc, W_dec_FTE, ctx.latents, found, ctx.sinks), *[None] * 6


class _Gradients(NamedTuple):
    """To dead rows."""

    W_dec: Tensor
    """[n, E]"""
    W_enc: Tensor
    """[n, D]"""
    b_enc: Tensor
    """[n]"""
    factor: float = 1.0
    """The gradients to the two weights are these times this; they may be in a shorter format."""


def to_rows(
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec_FTE: Tensor,
    latents: Tensor,
    found: _Gradients,
    sinks: tuple[Sink | None, Sink | None],
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """What autograd gets for the weights of which `found` are rows."""
    db_F = torch.zeros_like(b_enc).index_copy_(0, latents, found.b_enc)
    dW_enc = _delivered(W_enc, latents, found.W_enc, found.factor, sinks[0])
    return dW_enc, db_F, _delivered(W_dec_FTE, latents, found.W_dec, found.factor, sinks[1])


def _delivered(weight: Tensor, latents: Tensor, rows: Tensor, factor: float, sink: Sink | None) -> Tensor | None:
    """What autograd gets: nothing where a sink takes the rows. They are the first columns of the weight's rows."""
    if sink is not None:
        beyond = weight[0].numel() - rows.shape[1]
        sink.add_rows(latents, F.pad(rows, (0, beyond)) if beyond else rows, factor)
        return None
    full = torch.zeros_like(weight)
    full.flatten(1)[:, : rows.shape[1]].index_copy_(0, latents, rows.to(full.dtype).mul_(factor))
    return full


def _less(x_ND: Tensor, b_dec_D: Tensor | None) -> Tensor:
    return x_ND if b_dec_D is None else x_ND - b_dec_D


def way_of(coder: Coder, encoder: Encoder, silent: Silent | SilentBlock) -> "Way":
    if isinstance(silent, SilentBlock):
        coder.kernels.used.setdefault("auxk in bfloat16", ["torch"])
        return functools.partial(_Low, silent)
    values, room = silent.values, silent.selection.tokens * silent.selection.width
    share = values.shape[0] / max(room, 1)
    if silent.number is None and values.device.type == "cpu" and share <= _DENSE_SHARE:
        how = coder.kernels.pick("auxk", values.device, values.dtype, values.shape[0] * encoder.aux_width)
        if how == "numba":
            return functools.partial(_Sparse, silent)
    seen = coder.kernels.used.setdefault("auxk", [])
    seen += [] if "torch" in seen else ["torch"]
    return functools.partial(_Dense, silent, low=None if silent.number is None else encoder.matmul_dtype)


class _Sparse:
    """Products at the codes' entries, on a CPU."""

    def __init__(self, silent: Silent, W_dec_FE: Tensor) -> None:
        self.silent = silent
        self.W_dec_nE = W_dec_FE.index_select(0, silent.latents)

    def error(self, residual_NE: Tensor) -> Tensor:
        """Σ‖ê − e‖²; keeps ê − e."""
        selection, out_NE = self.silent.selection, torch.neg(residual_NE)
        index = (selection.offsets.numpy(), selection.latents.numpy(), self.silent.values.numpy())
        slabs.bags(out_NE.numpy(), self.W_dec_nE.numpy(), *index)
        self.error_NE = out_NE
        return torch.dot(out_NE.view(-1), out_NE.view(-1))

    def gradients(self, x_ND: Tensor, b_dec_D: Tensor | None, scale: Tensor) -> _Gradients:
        """What follows from ê − e, times `scale`, for inputs less b_dec."""
        turned = by_latent(self.silent.selection)
        z_A = self.silent.values.index_select(0, turned.order).mul_(scale)
        offsets, tokens = turned.offsets.numpy(), turned.tokens.numpy()
        dW_dec_nE = torch.zeros_like(self.W_dec_nE)
        error, W_dec = self.error_NE.numpy(), self.W_dec_nE.numpy()
        dots = slabs.bags_and_dots(dW_dec_nE.numpy(), error, W_dec, offsets, tokens, z_A.numpy())
        da_A = torch.from_numpy(dots).mul_(scale)
        dW_enc_nD = x_ND.new_zeros(self.W_dec_nE.shape[0], x_ND.shape[1])
        slabs.bags(dW_enc_nD.numpy(), _less(x_ND, b_dec_D).contiguous().numpy(), offsets, tokens, da_A.numpy())
        latents = torch.arange(turned.offsets.shape[0] - 1).repeat_interleave(turned.offsets.diff())
        db_n = da_A.new_zeros(dW_dec_nE.shape[0]).index_add_(0, latents, da_A)
        return _Gradients(dW_dec_nE, dW_enc_nD, db_n)


class _Low:
    """Dense products with operands rounded to bfloat16, sums in float32: AMX, the matrix unit of a CPU."""

    def __init__(self, silent: SilentBlock, W_dec_FE: Tensor) -> None:
        self.z_Nn = silent.codes
        self.W_dec_nE = low.gather(W_dec_FE, silent.latents)

    def error(self, residual_NE: Tensor) -> Tensor:
        """Σ‖ê − e‖²; keeps ê − e."""
        guess_NE = self.z_Nn.new_empty(residual_NE.shape)
        for z_Mn, guess_ME in zip(self.z_Nn.chunk(2), guess_NE.chunk(2), strict=True):
            torch.mm(z_Mn, self.W_dec_nE, out=guess_ME)  # whole, this product gets only one thread from oneDNN
        self.error_NE, total = low.difference(guess_NE, residual_NE)
        return total

    def gradients(self, x_ND: Tensor, b_dec_D: Tensor | None, scale: Tensor) -> _Gradients:
        """What follows from ê − e, times `scale`, for inputs less b_dec."""
        da_Nn = self.error_NE @ self.W_dec_nE.T
        db_n = low.keep(da_Nn, self.z_Nn).mul_(scale)
        low_ND = x_ND.bfloat16() if b_dec_D is None else low.less(x_ND, b_dec_D)
        return _Gradients(self.z_Nn.T @ self.error_NE, da_Nn.T @ low_ND, db_n, float(scale))


class _Dense:
    """Dense products with the gathered rows, for tokens in tiles where [N, n] is large."""

    def __init__(self, silent: Silent, W_dec_FE: Tensor, low: torch.dtype | None = None) -> None:
        """`low`: a shorter format to round operands to."""
        self.silent = silent
        self.low = low
        W_dec_nE = W_dec_FE.index_select(0, silent.latents)
        self.W_dec_nE = W_dec_nE if low is None else W_dec_nE.to(low)
        self._made: Tensor | None = None

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Tokens and their codes [N, n]; made once if one tile is enough."""
        tokens = self.silent.selection.tokens
        rows = tile_rows(max(self.silent.selection.width, 1), self.W_dec_nE.itemsize, self.W_dec_nE.device)
        for first in range(0, tokens, rows):
            stop = min(first + rows, tokens)
            z_Nn = self._block(first, stop) if self._made is None else self._made
            self._made = z_Nn if rows >= tokens else None
            yield slice(first, stop), z_Nn

    def _block(self, first: int, stop: int) -> Tensor:
        values, selection = self.silent.values, self.silent.selection
        if self.silent.number is None:
            start, end = int(selection.offsets[first]), int(selection.offsets[stop])
        else:  # every token has as many
            start, end = (values.shape[0] // selection.tokens * token for token in (first, stop))
        z_Nn = self.W_dec_nE.new_zeros(stop - first, selection.width)
        places = (selection.rows[start:end] - first) * selection.width + selection.latents[start:end]
        z_Nn.view(-1)[places] = values[start:end].to(z_Nn.dtype)
        return z_Nn

    def error(self, residual_NE: Tensor) -> Tensor:
        """Σ‖ê − e‖²; keeps ê − e."""
        if self.low is None:
            parts = [torch.addmm(residual_NE[span], z, self.W_dec_nE, beta=-1) for span, z in self.tiles()]
        else:
            parts = [(z @ self.W_dec_nE).to(residual_NE.dtype).sub_(residual_NE[span]) for span, z in self.tiles()]
        self.error_NE = parts[0] if len(parts) == 1 else torch.cat(parts)
        return torch.dot(self.error_NE.view(-1), self.error_NE.view(-1))

    def gradients(self, x_ND: Tensor, b_dec_D: Tensor | None, scale: Tensor) -> _Gradients:
        """What follows from ê − e, times `scale`, for inputs less b_dec."""
        x_ND = _less(x_ND, b_dec_D)
        parts = (self._tile(z, self.error_NE[span], x_ND[span], scale) for span, z in self.tiles())
        dW_dec_nE, dW_enc_nD, db_n = next(parts)
        for more_dec, more_enc, more_b in parts:
            dW_dec_nE += more_dec
            dW_enc_nD += more_enc
            db_n += more_b
        return _Gradients(dW_dec_nE, dW_enc_nD, db_n)

    def _tile(self, z_Nn: Tensor, error_NE: Tensor, x_ND: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.low is None:
            da_Nn = (error_NE @ self.W_dec_nE.T).mul_(z_Nn > 0).mul_(scale)
            return (z_Nn.T @ error_NE).mul_(scale), da_Nn.T @ x_ND, da_Nn.sum(0)
        low_NE, full = (error_NE * scale).to(self.low), x_ND.dtype
        da_Nn = (low_NE @ self.W_dec_nE.T).mul_(z_Nn > 0)
        return (z_Nn.T @ low_NE).to(full), (da_Nn.T @ x_ND.to(self.low)).to(full), da_Nn.sum(0, dtype=full)


Way = Callable[[Tensor], _Sparse | _Low | _Dense]
