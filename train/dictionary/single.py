"""SAEs and transcoders: one site read, one site written.

An SAE reconstructs the site it reads. A transcoder reconstructs another one, and with `skip` starts from a linear map
of its input, ŷ = z W_dec + b_dec + W_skip x, W_skip [E, D] zero at first (Paulo, Shabalin and Belrose 2025,
arXiv:2501.18823).
"""

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.topologies import register


@register("sae")
class SAE(Coder):
    """x̂ = z W_dec + b_dec, rows of norm 1 unless told otherwise; the encoder starts as the decoder's transpose."""

    own_site = True
    raw_codes = True
    unit_rows = True
    shareable = True
    admits = frozenset({"pre_bias", "tied", "tied_encoder"})
    starts = ("tied", "rows")


@register("transcoder")
class Transcoder(Coder):
    """ŷ from x, one dictionary for each matched pair; starts as the mean. Input and output differ: nothing is tied."""

    shareable = True
    admits = frozenset({"skip", "tied", "tied_encoder"})
