"""Crosscoders: one code that reads several sites at once and reconstructs all of them.

    a = Σ_s W_enc^s x_s + b_enc        x̂_s = z W_dec^s + b_s

The encoder is one matrix [F, S·D] on the sites side by side, the decoder [F, S, E]. The norm of a latent's row is that
of the concatenated row, or with `norm = "sum"` Σ_s ‖w_f^s‖, which also favours latents of few sites. The loss is the
mean over sites; AuxK sees the residuals of all sites as one. After Lindsey et al. 2024, "Sparse crosscoders".

A code needs the last site before the first is reconstructed, so it cannot run along in a forward pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import register


@register("crosscoder")
class Crosscoder(Coder):
    """One source that reads all sites, and as many destinations."""

    causal = False
    joint = True
    own_site = True
    shareable = True
    admits = frozenset({"norm", "tied", "tied_encoder"})
    starts = ("tied", "rows")

    @classmethod
    def inputs_of(cls, reads: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """All sites for the one source."""
        return (tuple(reads),)

    @classmethod
    def width(cls, site: int, sites: int) -> int:
        """S·D."""
        return site * sites

    @classmethod
    def check_spec(cls, spec: DictionarySpec) -> None:
        """Raise UserError for a row norm that the decoder's constraint would contradict."""
        super().check_spec(spec)
        if spec.unit_norm and spec.norm == "sum":
            raise UserError(
                "dictionary.norm is 'sum' with decoder = 'unit', which fixes the norm of the concatenated row instead. "
                "Set norm = 'joined', or decoder = 'free'."
            )

    def written(self, source: int) -> range:
        """All sites."""
        return range(len(self.spec.writes))

    def explained(self, source: int) -> range:
        """All sites."""
        return range(len(self.spec.writes))

    def decoder_norm(self, source: int) -> Tensor:
        """[F] norm of the concatenated row, or the sum of its sites' norms, with gradient."""
        if self.spec.norm == "joined":
            return super().decoder_norm(source)
        return torch.linalg.vector_norm(self.W_dec[source], dim=2).sum(1)
