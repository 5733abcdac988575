"""Decoding in segments of latents, from which Matryoshka's prefixes follow by a running sum.

The first g latents reconstruct ŷ^(g) = b + Σ_{f<g} z_f w_f. With prefix ends g_1 < … < g_G = F the latents from g_m to
g_{m+1} are a segment; what each segment writes is decoded once, so all prefixes together cost about one decode, and so
do their gradients: a segment's entries meet the sum of the gradients of all prefixes that contain it, which is what
autograd makes of the running sum.

A selection is split by latent, and each segment's rows of the decoder and of its gradient are taken as a matrix of
their own. Where entries must not be counted (a selection of fixed capacity, on a device) every segment takes all
entries instead, with codes of the others set to 0: exact, at the cost of a decode per segment.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.gradients import Facts, Sink
from thresher.train.kernels.padded import Padded
from thresher.train.kernels.sparse import (
    Selection,
    _destinations,
    _Ways,
    decoded,
    dots,
    plain_add_decoded,
    weight_gradient,
)


class Segment(NamedTuple):
    """Some consecutive latents and the entries that are theirs."""

    latents: slice
    """Rows of the decoder; all of them where entries are only masked."""
    entries: Tensor | None
    """[a] int64: where they stand in the whole selection; None: there is none, or all are taken."""
    selection: Selection | None
    """Of these entries, latents counted from the segment's first; None: all."""
    mask: Tensor | None = None
    """[A] bool: the entries that count, where all are taken."""

    def take(self, z: Tensor) -> Tensor:
        """The codes of the segment."""
        if self.mask is not None:
            return z * self.mask
        if self.selection is None:
            return z[:, self.latents]
        assert self.entries is not None
        return z.index_select(0, self.entries)

    def put(self, out: Tensor, part: Tensor) -> None:
        """Write what belongs to the segment's codes to its place among all."""
        if self.mask is not None:
            out.add_(part * self.mask)
        elif self.selection is None:
            out[:, self.latents] = part
        else:
            assert self.entries is not None
            out.index_copy_(0, self.entries, part)


def segments(selection: Selection | None, ends: Sequence[int]) -> list[Segment]:
    """A selection by segments that end at `ends`, ascending; None: of all entries."""
    spans = [slice(first, stop) for first, stop in zip((0, *ends[:-1]), ends, strict=True)]
    if selection is None:
        return [Segment(span, None, None) for span in spans]
    latents = selection.latents
    if isinstance(selection, Padded):
        masks = [(latents >= span.start) & (latents < span.stop) for span in spans]
        return [Segment(slice(0, selection.width), None, selection, mask) for mask in masks]
    return [_split(selection, span) for span in spans]


def _split(selection: Selection, span: slice) -> Segment:
    mask = (selection.latents >= span.start) & (selection.latents < span.stop)
    entries = torch.nonzero(mask).view(-1)
    offsets = torch.nn.functional.pad(mask.cumsum(0), (1, 0)).index_select(0, selection.offsets)
    latents = selection.latents.index_select(0, entries) - span.start
    return Segment(span, entries, Selection(latents, offsets, span.stop - span.start))


class _AddSegments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, W_dec_FTE: Tensor, parts: list[Segment], first: int, ways: _Ways, *outs_NSE: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(z, W_dec_FTE)
        ctx.parts, ctx.first, ctx.ways = parts, first, ways
        W_FM = W_dec_FTE.flatten(1)
        for part, out_NSE in zip(parts, outs_NSE, strict=True):
            codes, rows, out_NM = part.take(z), W_FM[part.latents], _destinations(out_NSE, first, W_dec_FTE)
            module = _module("decode", codes, part, ways, W_FM.shape[1])
            if module is None:
                out_NM += decoded(codes, rows, part.selection)
            else:
                module.decode(out_NM, codes.contiguous(), rows, part.selection)
        ctx.mark_dirty(*outs_NSE)
        return outs_NSE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs_NSE: Tensor) -> tuple[Tensor | None, ...]:
        z, W_dec_FTE = ctx.saved_tensors
        W_FM = W_dec_FTE.flatten(1)
        gs_NM = [_destinations(g_NSE.contiguous(), ctx.first, W_dec_FTE) for g_NSE in gs_NSE]
        grad_z, grad_W = torch.zeros_like(z), None
        if ctx.needs_input_grad[1]:
            grad_W = _gradients(z, gs_NM, W_FM, ctx.parts, ctx.ways, grad_z)
            grad_W = None if grad_W is None else grad_W.view_as(W_dec_FTE)
        else:
            for part, g_NM in zip(ctx.parts, gs_NM, strict=True):
                rows = W_FM[part.latents]
                part.put(grad_z, g_NM @ rows.T if part.selection is None else dots(g_NM, rows, part.selection))
        return grad_z, grad_W, None, None, None, *gs_NSE


def _module(operation: str, codes: Tensor, part: Segment, ways: _Ways, width: int) -> Any:
    return None if part.selection is None else ways.primitives(operation, codes, part.selection, width)


def _gradients(
    z: Tensor, gs_NM: Sequence[Tensor], W_FM: Tensor, parts: Sequence[Segment], ways: _Ways, grad_z: Tensor
) -> Tensor | None:
    """The gradient to W, unless a sink took it; the codes' goes to `grad_z`, which holds 0."""
    modules = [_module("decoder gradient", z, part, ways, W_FM.shape[1]) for part in parts]
    told = all(module is not None and part.mask is None for module, part in zip(modules, parts, strict=True))
    if ways.sink is None:
        dW, fresh, facts = torch.empty_like(W_FM), True, None
    else:
        dW, fresh, facts, _ = ways.sink.open(facts=told)
    for index, (part, g_NM, module) in enumerate(zip(parts, gs_NM, modules, strict=True)):
        codes, rows, out = part.take(z), W_FM[part.latents], dW[part.latents]
        new = fresh and (part.mask is None or index == 0)  # masked segments all write all rows
        if part.selection is None:
            torch.addmm(out, codes.T, g_NM, beta=0.0 if new else 1.0, out=out)
            part.put(grad_z, g_NM @ rows.T)
        elif module is not None:
            own = None if facts is None else Facts(*(fact[part.latents] for fact in facts))
            part.put(grad_z, module.decoder_gradient(codes.contiguous(), g_NM, rows, part.selection, out, new, own))
        else:
            g_NM = g_NM.contiguous()
            grad = weight_gradient(codes, g_NM, part.selection)
            out.copy_(grad) if new else out.add_(grad)
            part.put(grad_z, dots(g_NM, rows, part.selection))
    if ways.sink is None:
        return dW
    ways.sink.close()
    return None


def add_segments(
    outs_NSE: Sequence[Tensor],
    z: Tensor,
    W_dec_FTE: Tensor,
    selection: Selection | None,
    ends: Sequence[int],
    first: int,
    kernels: Kernels,
    sink: Sink | None = None,
) -> tuple[Tensor, ...]:
    """Add to each output [N, S, E] what one source's latents of a segment write, in place; else as `add_decoded`.

    Segments end at `ends`, the last at F. Specification: `plain_add_segments`.
    """
    if kernels.forced == "plain":
        kernels.pick("decode", z.device, z.dtype, 0)
        return plain_add_segments(outs_NSE, z, W_dec_FTE, selection, ends, first)
    parts, ways = segments(selection, ends), _Ways(kernels, sink)
    out: tuple[Tensor, ...] = _AddSegments.apply(z, W_dec_FTE, parts, first, ways, *outs_NSE)
    return out


def plain_add_segments(
    outs_NSE: Sequence[Tensor],
    z: Tensor,
    W_dec_FTE: Tensor,
    selection: Selection | None,
    ends: Sequence[int],
    first: int,
) -> tuple[Tensor, ...]:
    """What `add_segments` must equal, with all its gradients."""
    latents = torch.arange(W_dec_FTE.shape[0], device=z.device) if selection is None else selection.latents
    starts = (0, *ends[:-1])
    masks = [(latents >= start) & (latents < end) for start, end in zip(starts, ends, strict=True)]
    return tuple(
        plain_add_decoded(out, z * mask, W_dec_FTE, selection, first) for out, mask in zip(outs_NSE, masks, strict=True)
    )
