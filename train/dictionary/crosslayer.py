"""Cross-layer transcoders: the latents of layer i read layer i and write to layers i, i + 1, …, L − 1.

ŷ_j = b_j + Σ_{i ≤ j} z_i W_dec^{i→j} (+ W_skip_j x_j). Decoders are triangular by construction: source i stores
[F, L − i, E], so no masked half is kept, and one gather of a latent's row serves all its destinations. Selection is per
layer. After Ameisen et al. 2025, "Circuit Tracing".
"""

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.topologies import register


@register("clt")
class CrossLayer(Coder):
    """L sources and L destinations, the former writing forward."""

    joint = True
    shareable = True
    admits = frozenset({"skip", "unit_per_target", "tied", "aux_scope", "pool"})
    starts = ("latents", "uniform")

    def written(self, source: int) -> range:
        """The source's own layer and all later ones."""
        return range(source, len(self.spec.writes))

    def sources(self, destination: int) -> range:
        """The destination's own layer and all earlier ones."""
        return range(destination + 1)
