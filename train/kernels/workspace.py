"""Memory that products of many encoders are made in, one after the other."""

import threading

import torch
from torch import Tensor


class Workspace:
    """Memory for pre-activations, used again by every encoder that shares it.

    They are only needed until the selected values are copied out, so one block for each thread serves a whole sweep.
    Taking it anew each time costs a fifth of the product on a CPU, in page faults.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def block(self, tokens: int, W_enc: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[N, F] uninitialised, for the product of N rows with an encoder; None: in the encoder's own format."""
        size, dtype = tokens * W_enc.shape[0], dtype or W_enc.dtype
        memory: Tensor | None = getattr(self._local, "memory", None)
        if memory is None or memory.numel() < size or memory.dtype != dtype or memory.device != W_enc.device:
            with torch.inference_mode(False):  # or training could not use it afterwards
                memory = self._local.memory = torch.empty(size, dtype=dtype, device=W_enc.device)
        return memory[:size].view(tokens, W_enc.shape[0])
