"""SAELens: the object that `thresher.to_saelens` makes of a run directory. Thresher is installed beside it."""

from pathlib import Path

import torch
from common import main
from sae_lens import SAE
from torch import Tensor

from thresher.interop.saelens_object import to_saelens


def load(directory: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Code and output."""
    sae = to_saelens(directory)
    assert isinstance(sae, SAE), type(sae).__mro__
    sae = sae.to(dtype=x_ND.dtype)
    with torch.no_grad():
        return sae.encode(x_ND), sae(x_ND)


if __name__ == "__main__":
    main("sae-lens", load)
