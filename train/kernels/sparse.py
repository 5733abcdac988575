"""Products with sparse codes: everything after the encoder's matrix product, at a cost of O(active).

A dictionary step multiplies one dense matrix (x by the encoder) and then knows which latents of which tokens matter:
a `Selection`. All further products need only those entries. Two primitives carry them:

- `bags`: for every group of entries the weighted sum of table rows (the decoder's output, both weight gradients and
  the input's gradient; for a weight gradient the groups are latents and the table holds tokens);
- `dots`: for every entry the product of a token's row with a latent's row (the gradient of the codes).

Neither builds the [A, D] block of gathered rows, which costs more memory traffic than all the rest of a step. A
weight gradient needs the entries ordered by latent; the order is found once per selection and serves both weights.
On a CPU sums run in a fixed order, so the same input gives the same bits.

Where a selection would hold a large share of all entries, dense products are faster and smaller. A selection of None
stands for "every latent of every token", with values as [N, F]; the functions here take both forms.

Library calls do both, on CPU and CUDA; kernels of our own do them in fewer passes where kernels/choice.py says so, and
write a weight's gradient where it is wanted.

Suffixes: A entries of a selection, T destinations that one source writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.train.kernels.choice import Kernels, has_triton, primitives
from thresher.train.kernels.gradients import Opened, Sink

DENSE_SHARE = 1 / 12
"""Share of selected entries above which the products go dense. Forward and backward break even at 0.09 for N × D × F =
1024 × 768 × 6144 and at 0.18 for 2048 × 128 × 1024 (one CPU thread); not measured on CUDA."""


class Selection:
    """Entries in compressed rows: token n owns entries offsets[n] to offsets[n + 1]."""

    def __init__(self, latents: Tensor, offsets: Tensor, width: int) -> None:
        """latents [A] int64 in [0, width); offsets [N + 1] int64 from 0 to A."""
        self.latents = latents
        self.offsets = offsets
        self.width = width

    @property
    def tokens(self) -> int:
        """N."""
        return self.offsets.shape[0] - 1

    @cached_property
    def rows(self) -> Tensor:
        """[A] int64: the token of each entry."""
        tokens = torch.arange(self.tokens, device=self.offsets.device)
        return tokens.repeat_interleave(self.offsets.diff(), output_size=self.latents.shape[0])

    @cached_property
    def by_latent(self) -> "ByLatent":
        """The same entries ordered by latent, tokens ascending within one latent."""
        order = stable_order(self.latents, self.width)
        counts = torch.bincount(self.latents, minlength=self.width)
        offsets = torch.zeros(self.width + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        return ByLatent(order, self.rows.index_select(0, order), offsets)

    def take(self, a_NF: Tensor) -> Tensor:
        """[A]: the entries' values in a dense block."""
        return a_NF.reshape(-1).take(torch.add(self.latents, self.rows, alpha=self.width))


class ByLatent:
    """A selection turned over: latent f owns entries offsets[f] to offsets[f + 1]."""

    def __init__(self, order: Tensor, tokens: Tensor, offsets: Tensor) -> None:
        self.order = order
        """[A] int64: where each entry stands in the selection."""
        self.tokens = tokens
        """[A] int64: the token of each entry."""
        self.offsets = offsets
        """[F + 1] int64."""


def stable_order(latents: Tensor, width: int) -> Tensor:
    """[A] int64 that sorts `latents`, equal ones in their old order.

    On the CPU numpy sorts 16-bit keys by radix, many times faster than a comparison sort of 64-bit keys; wider keys
    take two such passes, the lower half first.
    """
    if latents.device.type != "cpu":
        keys = latents.to(torch.int16) if width <= 1 << 15 else latents.to(torch.int32)
        return torch.sort(keys, stable=True).indices
    numbers = latents.numpy()
    order = np.argsort(numbers.astype(np.uint16), kind="stable")
    if width > 1 << 16:
        order = order[np.argsort((numbers[order] >> 16).astype(np.uint16), kind="stable")]
    return torch.from_numpy(order)


def bags(table_MD: Tensor, index_A: Tensor, offsets: Tensor, weights_A: Tensor) -> Tensor:
    """[groups, D]: Σ weights · table[index] over each group of entries; without gradient."""
    if index_A.shape[0] == 0:
        return table_MD.new_zeros(offsets.shape[0] - 1, table_MD.shape[1])
    return torch.nn.functional.embedding_bag(
        index_A, table_MD, offsets, mode="sum", per_sample_weights=weights_A, include_last_offset=True
    )


def dots(left_ND: Tensor, right_FD: Tensor, selection: Selection) -> Tensor:
    """[A]: left[token] · right[latent] for every entry; without gradient."""
    if selection.latents.shape[0] == 0:
        return left_ND.new_zeros(0)
    pattern = torch.sparse_csr_tensor(
        selection.offsets,
        selection.latents,
        left_ND.new_zeros(selection.latents.shape[0]),
        (selection.tokens, selection.width),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, left_ND, right_FD.T, beta=0.0).values()


def per_latent(values: Tensor, selection: Selection | None) -> Tensor:
    """[F]: the sum of each latent's values ([A], or [N, F] without a selection); without gradient."""
    if selection is None:
        return values.sum(0)
    if values.is_cuda and has_triton():  # index_add_ adds there in whatever order threads arrive
        summed: Tensor = primitives("triton").latent_sums(values, selection)
        return summed
    return values.new_zeros(selection.width).index_add_(0, selection.latents, values)


def weight_gradient(g: Tensor, rows_ND: Tensor, selection: Selection | None) -> Tensor:
    """[F, D]: Σ over tokens of g[token, latent] · rows[token]."""
    if selection is None:
        return g.T @ rows_ND
    turned = selection.by_latent
    return bags(rows_ND, turned.tokens, turned.offsets, g.index_select(0, turned.order))


class _Ways(NamedTuple):
    """How a product is done and where its weight's gradient goes."""

    kernels: Kernels
    sink: Sink | None

    def primitives(self, operation: str, like: Tensor, selection: Selection, width: int) -> Any:
        """The module whose kernels do an operation; None: library calls."""
        work = selection.latents.shape[0] * width
        return primitives(self.kernels.pick(operation, like.device, like.dtype, work))

    @contextmanager
    def gradient(self, weight: Tensor, by_kernel: bool) -> Iterator[Opened]:
        """The matrix to write a weight's gradient to; `by_kernel`: one of ours, which takes all of `Opened`."""
        if self.sink is None:
            yield Opened(torch.empty_like(weight), True, None, None)
        else:
            yield self.sink.open(facts=by_kernel, begun=by_kernel)
            self.sink.close()

    def returned(self, dW: Tensor) -> Tensor | None:
        """What autograd gets."""
        return dW if self.sink is None else None


def _put(dW: Tensor, value: Tensor, fresh: bool) -> None:
    dW.copy_(value) if fresh else dW.add_(value)


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, selection: Selection | None, ways: _Ways
    ) -> Tensor:
        ctx.save_for_backward(x_ND, W_enc)
        ctx.selection, ctx.ways = selection, ways
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, W_enc = ctx.saved_tensors
        selection = ctx.selection
        grad_x = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = g @ W_enc if selection is None else bags(W_enc, selection.latents, selection.offsets, g)
        if ctx.needs_input_grad[1]:
            grad_W, grad_b = _encoder_gradients(g, x_ND, W_enc, selection, ctx.ways)
        elif ctx.needs_input_grad[2]:
            grad_b = per_latent(g, selection)
        return grad_x, grad_W, grad_b, None, None, None


def _encoder_gradients(
    g: Tensor, x_ND: Tensor, W_enc: Tensor, selection: Selection | None, ways: _Ways
) -> tuple[Tensor | None, Tensor]:
    """Gradients to W_enc, unless a sink took it, and b_enc."""
    module = None if selection is None else ways.primitives("encoder gradient", x_ND, selection, x_ND.shape[1])
    with ways.gradient(W_enc, by_kernel=module is not None) as opened:
        dW, fresh = opened.matrix, opened.fresh
        if selection is None:
            torch.addmm(dW, g.T, x_ND, beta=0.0 if fresh else 1.0, out=dW)
            grad_b = g.sum(0)
        elif module is not None:
            grad_b = module.encoder_gradient(g.contiguous(), x_ND, selection, *opened)
        else:
            _put(dW, weight_gradient(g, x_ND, selection), fresh)
            grad_b = per_latent(g, selection)
    return ways.returned(dW), grad_b


def gathered_linear(
    x_ND: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    values: Tensor,
    selection: Selection | None,
    kernels: Kernels | None = None,
    sink: Sink | None = None,
) -> Tensor:
    """Pre-activations x W_encᵀ + b_enc at the selected entries, [A] (or [N, F]), with gradients to x, W_enc, b_enc.

    `values` are those numbers, taken from the dense product that the selection was made from: nothing is computed
    twice. W_enc's gradient goes to its sink where there is one. Specification: `plain_gathered_linear`.
    """
    kernels = kernels or Kernels()
    if kernels.forced == "plain":
        kernels.pick("encoder gradient", x_ND.device, x_ND.dtype, 0)
        return plain_gathered_linear(x_ND, W_enc, b_enc, selection)
    out: Tensor = _GatheredLinear.apply(x_ND, W_enc, b_enc, values, selection, _Ways(kernels, sink))
    return out


def plain_gathered_linear(x_ND: Tensor, W_enc: Tensor, b_enc: Tensor, selection: Selection | None) -> Tensor:
    """What `gathered_linear` must equal, with all its gradients."""
    a_NF = x_ND @ W_enc.T + b_enc
    return a_NF if selection is None else a_NF[selection.rows, selection.latents]


class _AddDecoded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_NSE: Tensor, z: Tensor, W_dec_FTE: Tensor, selection: Selection | None, first: int, ways: _Ways
    ) -> Tensor:
        ctx.save_for_backward(z, W_dec_FTE)
        ctx.selection, ctx.first, ctx.ways = selection, first, ways
        W_FM = W_dec_FTE.flatten(1)
        module = None if selection is None else ways.primitives("decode", z, selection, W_FM.shape[1])
        if module is None:
            last = first + W_dec_FTE.shape[1]
            y_NSE[:, first:last] += decoded(z, W_FM, selection).view(-1, *W_dec_FTE.shape[1:])
        else:
            module.decode(_destinations(y_NSE, first, W_dec_FTE), z.contiguous(), W_FM, selection)
        ctx.mark_dirty(y_NSE)
        return y_NSE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NSE: Tensor) -> tuple[Tensor | None, ...]:
        z, W_dec_FTE = ctx.saved_tensors
        selection, ways = ctx.selection, ctx.ways
        g_NSE = g_NSE.contiguous()
        g_NM = _destinations(g_NSE, ctx.first, W_dec_FTE)  # M = T·E: one gather serves all destinations
        W_FM = W_dec_FTE.flatten(1)
        grad_z = grad_W = None
        if ctx.needs_input_grad[2]:
            grad_z, grad_W = _decoder_gradients(z, g_NM, W_FM, selection, ways)
            grad_W = None if grad_W is None else grad_W.view_as(W_dec_FTE)
        elif ctx.needs_input_grad[1]:
            grad_z = g_NM @ W_FM.T if selection is None else dots(g_NM, W_FM, selection)
        return g_NSE, grad_z, grad_W, None, None, None


def _destinations(y_NSE: Tensor, first: int, W_dec_FTE: Tensor) -> Tensor:
    """[N, T·E] view of the T destinations from `first` on that a decoder writes to."""
    width = y_NSE.shape[2]
    return y_NSE.view(y_NSE.shape[0], -1)[:, first * width : (first + W_dec_FTE.shape[1]) * width]


def _decoder_gradients(
    z: Tensor, g_NM: Tensor, W_FM: Tensor, selection: Selection | None, ways: _Ways
) -> tuple[Tensor, Tensor | None]:
    """Gradients to the codes and, unless a sink took it, to W."""
    module = None if selection is None else ways.primitives("decoder gradient", z, selection, W_FM.shape[1])
    with ways.gradient(W_FM, by_kernel=module is not None) as opened:
        dW, fresh = opened.matrix, opened.fresh
        if selection is None:
            torch.addmm(dW, z.T, g_NM, beta=0.0 if fresh else 1.0, out=dW)
            grad_z = g_NM @ W_FM.T
        elif module is not None:
            grad_z = module.decoder_gradient(z.contiguous(), g_NM, W_FM, selection, *opened)
        else:
            g_NM = g_NM.contiguous()
            grad_z = dots(g_NM, W_FM, selection)
            _put(dW, weight_gradient(z, g_NM, selection), fresh)
    return grad_z, ways.returned(dW)


def decoded(z: Tensor, W_dec_FM: Tensor, selection: Selection | None) -> Tensor:
    """[N, M]: codes times decoder rows, without gradient."""
    if selection is None:
        return z @ W_dec_FM
    return bags(W_dec_FM, selection.latents, selection.offsets, z)


def add_decoded(
    y_NSE: Tensor,
    z: Tensor,
    W_dec_FTE: Tensor,
    selection: Selection | None,
    first: int,
    kernels: Kernels | None = None,
    sink: Sink | None = None,
) -> Tensor:
    """Add one source's contribution to T destinations from `first` on in place; gradients to y, z and W_dec.

    z [A] (or [N, F]), W_dec [F, T, E] with first + T ≤ S. y must not be a leaf that requires grad, and is contiguous.
    W_dec's gradient goes to its sink where there is one. Specification: `plain_add_decoded`.
    """
    kernels = kernels or Kernels()
    if kernels.forced == "plain":
        kernels.pick("decode", z.device, z.dtype, 0)
        return plain_add_decoded(y_NSE, z, W_dec_FTE, selection, first)
    out: Tensor = _AddDecoded.apply(y_NSE, z, W_dec_FTE, selection, first, _Ways(kernels, sink))
    return out


def plain_add_decoded(y_NSE: Tensor, z: Tensor, W_dec_FTE: Tensor, selection: Selection | None, first: int) -> Tensor:
    """What `add_decoded` must equal, with all its gradients."""
    z_NF = z
    if selection is not None:
        z_NF = z.new_zeros(selection.tokens, selection.width).index_put((selection.rows, selection.latents), z)
    part_NTE = torch.einsum("nf,fte->nte", z_NF, W_dec_FTE)
    last = first + W_dec_FTE.shape[1]
    return torch.cat([y_NSE[:, :first], y_NSE[:, first:last] + part_NTE, y_NSE[:, last:]], 1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v_F: Tensor, selection: Selection) -> Tensor:
        ctx.selection = selection
        return v_F.index_select(0, selection.latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return per_latent(g, ctx.selection), None


def spread(v_F: Tensor, selection: Selection | None) -> Tensor:
    """A per-latent vector at every entry: [A], or [F] to be broadcast over [N, F]; with gradient to the vector."""
    if selection is None:
        return v_F
    out: Tensor = _Spread.apply(v_F, selection)
    return out
