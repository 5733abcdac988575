"""SAEBench: the object that `thresher.to_saebench` makes of a run, here where SAEBench is installed and gives it its
base class. It takes a run directory, not exported files. Thresher is installed beside it."""

from pathlib import Path

import torch
from common import main
from sae_bench.custom_saes.base_sae import BaseSAE
from torch import Tensor

from thresher.interop.saebench import to_saebench


def load(directory: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Code and output, after the checks of SAEBench's own loaders."""
    sae = to_saebench(directory)
    assert isinstance(sae, BaseSAE), type(sae).__mro__
    assert sae.check_decoder_norms(), "SAEBench wants rows of norm 1"
    assert sae.cfg.to_dict()["d_sae"] == sae.W_dec.shape[0]
    sae.to(dtype=x_ND.dtype)
    with torch.no_grad():
        return sae.encode(x_ND), sae(x_ND)


if __name__ == "__main__":
    main("sae-bench", load)
