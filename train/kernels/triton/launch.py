"""What the launches have in common: formats, block sizes, and the device they run on.

With the environment variable TRITON_INTERPRET=1, set before triton is first imported, kernels run on CPU tensors in
Triton's interpreter: slow, but the same program text, which is how the tests reach it without a GPU.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

COLUMNS = 256
"""Columns of a row that one program handles."""
ENTRIES = 8
"""Rows gathered at a time."""


def accumulator(*tensors: Tensor) -> Any:
    """The format that sums are kept in."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def columns(width: int) -> int:
    """Block size for rows of a width: a power of two, at least 16."""
    return min(COLUMNS, max(16, 1 << (width - 1).bit_length()))


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's device, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
