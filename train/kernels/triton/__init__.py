"""The primitives of kernels/choice.py on CUDA, in Triton. Importing this folder needs the package triton.

No kernel adds floats atomically: each output belongs to one program, which sums in a fixed order, so the same input
gives the same bits. No function here reads anything back from the device. Sums are float32 for float32 and shorter
formats, float64 for float64.
"""

from thresher.train.kernels.triton.adam import Rows, step, update
from thresher.train.kernels.triton.gather import decode
from thresher.train.kernels.triton.gradients import decoder_gradient, encoder_gradient, latent_sums

__all__ = ["Rows", "decode", "decoder_gradient", "encoder_gradient", "latent_sums", "step", "update"]
