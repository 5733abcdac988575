"""Where the gradient of a large weight is gathered: one permanent buffer, written by kernels and not by autograd.

Autograd makes a new tensor for every gradient and adds it to what is there: for a weight of 400 MB that is page
faults, a write and two reads for each term of the loss. Here a kernel writes or adds its own term, rows that few
latents need (AuxK) go to those rows alone, and a multiple of the weight itself (the gradient of a row's norm) is only
noted, one number per row: the update has the row at hand. Autograd then gets None for the weight.

A sink without terms is `fresh`, which is when `parameter.grad` is None. Terms that autograd adds itself, before or
after, are welcome: the buffer simply becomes `parameter.grad`, or a tensor that autograd put there the buffer.

Rows that come before the first whole term wait for it. On a CPU a kernel that overwrites the matrix begins with them,
so that none is read back from memory; otherwise they are added as soon as the matrix is there.

Each row's facts, ‖g‖², g · w and ‖w‖², which clipping and projection ask for, fall out of the kernel that writes the
row. Rows that are added here tell theirs anew; they hold until anybody else adds something.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from thresher.cache.kernels.cpu_pool import over_rows
from thresher.train.kernels import cpu_update
from thresher.train.kernels.low import patterns

_NONE = np.empty(0)


class Facts(NamedTuple):
    """Of every row of a gradient g and its weight w; float64, so that differences of them keep their digits."""

    squares: Tensor
    """[F] ‖g‖²."""
    dots: Tensor
    """[F] g · w."""
    weights: Tensor
    """[F] ‖w‖²."""


class Rows(NamedTuple):
    """A term of a gradient [F, M] that only some rows have."""

    rows: Tensor
    """[n] int64, all different."""
    values: Tensor
    """[n, M]; bfloat16 will do for a gradient in float32."""
    factor: float
    """The term is this times the values."""


class Opened(NamedTuple):
    """What a kernel that writes a gradient is given."""

    matrix: Tensor
    """[F, M]."""
    fresh: bool
    """Whether it is to be overwritten: there may be anything in it."""
    facts: Facts | None
    """To be filled; None: not wanted, or the matrix is not fresh."""
    begun: Rows | None
    """What the gradient is begun with, 0 in all other rows; None: 0."""


def no_facts(rows: int, device: torch.device | None = None) -> Facts:
    """Zeros, to be filled."""
    return Facts(*torch.zeros(3, rows, dtype=torch.float64, device=device).unbind(0))


class Sink:
    """The gradient of one parameter [F, …], rows first."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.along: Tensor | None = None
        """[F]: the gradient has this multiple of the weight's row added; None: nothing."""
        self._buffer: Tensor | None = None
        self._late: list[Rows] = []
        self._facts: Facts | None = None
        self._version = -1

    @property
    def fresh(self) -> bool:
        """Whether nothing was written yet: `open` then gives memory with anything in it."""
        return self.parameter.grad is None

    def open(self, facts: bool = False, begun: bool = False) -> Opened:
        """The matrix [F, M] to write. `close` must follow.

        `facts`: they will be told; `begun`: the matrix will be begun with rows that wait, if it is on a CPU and fresh.
        """
        grad = self.parameter.grad
        fresh = grad is None
        if grad is None:
            grad = self.parameter.grad = self._memory()
        self._facts = no_facts(grad.shape[0], grad.device) if facts and fresh else None
        matrix = grad.flatten(1)
        wait = begun and fresh and len(self._late) == 1 and _one_pass(matrix, self._late[0].values)
        return Opened(matrix, fresh, self._facts, self._late.pop() if wait else None)

    def close(self) -> None:
        """All of `open`'s matrix is written."""
        assert self.parameter.grad is not None
        self._version = self.parameter.grad._version
        late, self._late = self._late, []
        for term in late:
            self.add_rows(*term)

    def add_rows(self, rows: Tensor, values: Tensor, factor: float = 1.0) -> None:
        """Add factor · `values` [n, …] to some rows [n], all different; at once, or after the first whole term.

        `values` may be in a shorter format than the gradient.
        """
        if self.parameter.grad is None:
            self._late.append(Rows(rows, values, factor))
            return
        known, matrix = self.facts(), self.parameter.grad.flatten(1)
        if _one_pass(matrix, values):
            self._add_compiled(Rows(rows, values, factor), matrix, known)
        else:
            matrix.index_add_(0, rows, values.flatten(1).to(matrix.dtype), alpha=factor)
            self._facts = None

    def _add_compiled(self, term: Rows, matrix: Tensor, known: Facts | None) -> None:
        """`add_rows` in one pass, on a CPU."""
        weight, grad = (t.detach().reshape(-1).numpy() for t in (self.parameter, matrix))
        told = [t.numpy() for t in (known.squares, known.dots)] if known is not None else [_NONE, _NONE]
        flat = (term.rows.numpy(), numbers(term.values), grad.dtype.type(term.factor), weight, grad)

        def piece(first: int, stop: int) -> None:
            cpu_update.add_rows(first, stop, matrix.shape[1], *flat, *told)

        over_rows(term.rows.shape[0], piece, 3 * term.values.numel())

    def add_along(self, multiples_F: Tensor) -> None:
        """Add a multiple of the weight's own row to every row."""
        self.along = multiples_F if self.along is None else self.along + multiples_F

    def facts(self) -> Facts | None:
        """Of the matrix alone, without `along`; None when it was added to since the kernel that knew them."""
        grad = self.parameter.grad
        if grad is None or self._facts is None or grad._version != self._version:
            return None
        return self._facts

    def lend(self, memory: Tensor) -> None:
        """From now on write into this, of the parameter's shape and contiguous, until the next `release`."""
        self._buffer = memory

    def replaced(self) -> None:
        """Take note that the gradient was written from outside."""
        self._facts = None

    def settle(self, whole: bool = False) -> None:
        """Write what waits: rows without a first term, and, for a `whole` gradient, the multiples of the weight."""
        if self._late and self.parameter.grad is None:
            self.parameter.grad = self._memory().zero_()
            self.close()
        if whole and self.along is not None:
            grad = self.parameter.grad
            if grad is None:
                grad = self.parameter.grad = self._memory().zero_()
            grad.flatten(1).addcmul_(self.parameter.detach().flatten(1), self.along[:, None])
            self.along = None

    def clear(self) -> None:
        """Forget all terms; the memory stays."""
        self.parameter.grad = None
        self.along = self._facts = None
        self._late.clear()

    def release(self) -> None:
        """Forget all terms and give the memory back."""
        self.clear()
        self._buffer = None

    def _memory(self) -> Tensor:
        if self._buffer is None or self._buffer.device != self.parameter.device:
            self._buffer = torch.empty_like(self.parameter, memory_format=torch.contiguous_format)
        return self._buffer


def numbers(values: Tensor) -> np.ndarray:
    """All numbers one after the other; of bfloat16 the bit patterns (uint16)."""
    flat = values.reshape(-1)
    return patterns(flat) if flat.dtype == torch.bfloat16 else flat.numpy()


def _one_pass(matrix: Tensor, values: Tensor) -> bool:
    """Whether the loops of a CPU take such values for such a matrix."""
    alike = values.dtype == matrix.dtype or (values.dtype, matrix.dtype) == (torch.bfloat16, torch.float32)
    return matrix.device.type == "cpu" and alike


class Sinks:
    """The sinks of a dictionary's encoders and decoders; everything else stays with autograd."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self._sinks = {weight: Sink(weight) for weight in weights}

    def of(self, weight: nn.Parameter) -> Sink:
        """A weight's sink."""
        return self._sinks[weight]

    def find(self, parameter: nn.Parameter) -> Sink | None:
        """A parameter's sink, if it has one."""
        return self._sinks.get(parameter)

    def settle(self, whole: bool = False) -> None:
        """Write what waits in any of them."""
        for sink in self._sinks.values():
            sink.settle(whole)

    def clear(self) -> None:
        """Forget all terms."""
        for sink in self._sinks.values():
            sink.clear()

    def release(self) -> None:
        """Forget all terms and give the memory back."""
        for sink in self._sinks.values():
            sink.release()
