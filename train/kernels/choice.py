"""Which implementation does an operation: by device, number format and shape, or as forced; and what was used.

Every operation of a step exists as a plain formula under ordinary autograd, which specifies it, and in faster forms:
`torch` by library calls, `numba` by compiled loops on a CPU, `triton` by kernels on CUDA. The last two implement the
same primitives under the same names and signatures, in kernels/cpu.py and in kernels/triton/. Matrices have unit
stride along rows, which may lie apart (a view of some destinations is a matrix); none of them needs gradients.

- `decode(out_NM, z_A, W_FM, selection)`: out[n] += Σ z · W[latent] over the token's entries.
- `decoder_gradient(z_A, g_NM, W_FM, selection, dW_FM, fresh, facts, begun)`: dW[f] = Σ z · g[token] over the latent's
  entries (added to what is there unless `fresh`; dW None: not wanted) and, as result [A], dz = g[token] · W[latent].
- `encoder_gradient(da_A, x_ND, selection, dW_FD, fresh, facts, begun)`: dW[f] = Σ da · x[token], likewise; result [F]:
  Σ da.
- `update(weight_FM, grad_FM, m_FM, v_FM, along_F, scale, adam, unit)`: each row's gradient becomes
  scale · (grad + along · weight), Adam moves the row, and `unit` sets its norm to 1.

`facts` (kernels/gradients.py) receives of each row what clipping and projection ask for, or is None; `begun` has rows
that a fresh gradient starts from in place of 0, on a CPU, or is None. An entry with
z = 0 and entries past offsets[N] contribute nothing. Sums run in a fixed order whatever the number of threads.
"""

import importlib.util
import math
from collections.abc import Collection
from functools import cache
from typing import Any, Literal

import torch

from thresher.cache.errors import UserError

Forced = Literal["auto", "plain", "fast"]
Implementation = Literal["plain", "torch", "numba", "triton"]

_COMPILED = (torch.float32, torch.float64)
_WORTHWHILE = {"select": math.inf}
"""Work from which a compiled loop is taken on a CPU. Selection is NumPy's and torch's matter there. Products and the
update gain at every shape measured, from 256 × 32 × 128 (N × D × F; 7 % of the step) to 1024 × 768 × 6144 (19 %)."""


class Kernels:
    """The choices of one dictionary."""

    def __init__(self, forced: Forced = "auto") -> None:
        self.forced = forced
        """auto: the best available; plain: the specification; fast: the best, and an error where that is no kernel
        of ours."""
        self.used: dict[str, list[Implementation]] = {}
        """What did each operation so far, in the order of first use."""

    def pick(
        self, operation: str, device: torch.device, dtype: torch.dtype, work: int, own: Collection[str] | None = None
    ) -> Implementation:
        """Choose, and note it. `work`: multiply-adds of a product, numbers touched by anything else.

        `own`: kernels that the operation has; None: all. Where it has none, library calls do it.
        """
        chosen: Implementation = "plain" if self.forced == "plain" else _best(operation, device, dtype, work)
        if own is not None and chosen in ("numba", "triton") and chosen not in own:
            chosen = "torch"
        if self.forced == "fast" and device.type == "cuda" and not has_triton():
            raise UserError(
                "train.kernels is 'fast', but the package triton, which CUDA kernels are compiled with, is not "
                "installed. Install it, or set train.kernels = 'auto'."
            )
        seen = self.used.setdefault(operation, [])
        if chosen not in seen:
            seen.append(chosen)
        return chosen

    def described(self) -> str:
        """For the log: `decode numba, update numba`."""
        return ", ".join(f"{operation} {'/'.join(names)}" for operation, names in self.used.items())


def _best(operation: str, device: torch.device, dtype: torch.dtype, work: int) -> Implementation:
    if device.type == "cpu" and dtype in _COMPILED:
        return "numba" if work >= _WORTHWHILE.get(operation, 0) else "torch"
    if device.type == "cuda" and dtype in _COMPILED and has_triton():
        return "triton"
    return "torch"


@cache
def has_triton() -> bool:
    """Whether CUDA kernels can be compiled."""
    return importlib.util.find_spec("triton") is not None


def primitives(how: Implementation) -> Any:
    """The module that holds kernels/choice.py's primitives; None for `torch`. Imported when first used."""
    if how == "numba":
        from thresher.train.kernels import cpu

        return cpu
    if how == "triton":
        from thresher.train.kernels import triton

        return triton
    return None
