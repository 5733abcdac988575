"""What a dictionary has to beat: the target's own neurons, and the best affine map.

Both are dictionaries (`contracts.Dictionary`), so the protocols of splice.py patch them in like any other:

- `Neurons`: of the k largest entries of what the MLP's last matrix multiplies, the rest set to zero. It writes at
  `mlp_hidden`, so the model's own matrix, bias and later norm make the reconstruction of `mlp_out`. Under `clean_input`
  the values written are those of the clean pass; each `mlp_out` of that pass is then the neurons' reconstruction of
  the clean stream, whatever the other layers do, and can be compared with the clean one.
- `Affine`: v ≈ B u + c, fitted on training tokens (fitting.py).

Their codes carry signs, where `Codes` promises values ≥ 0. So they are never counted: `Codes.l0` would miss what is
negative. What they cost follows from k (costs.py), and an affine map is not sparse at all.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.cache.contracts import Codes, Dictionary, Site
from thresher.cache.errors import UserError

CHUNK_ELEMENTS = 1 << 24
"""Neurons compared at a time, which bounds the memory that choosing takes."""


class Pair(NamedTuple):
    """What an affine map would read in place of a dictionary, and what it would write."""

    read: str
    written: str


def pairs(dictionaries: Sequence[Dictionary]) -> list[Pair]:
    """A read site for every site written, each pair once: of a CLT's sources the last, which lies in the same layer.

    Nothing for a dictionary that reads what it writes (an SAE): the best affine map there is the identity.
    """
    found: list[Pair] = []
    for dictionary in dictionaries:
        for j, written in enumerate(dictionary.writes):
            sources = [site for s in dictionary.sources(j) for site in dictionary.inputs[s]]
            if written not in sources:
                found.append(Pair(sources[-1], written))
    return list(dict.fromkeys(found))


def neuron_sites(sites: Sequence[Site]) -> list[str] | None:
    """The `mlp_hidden` sites behind written sites that are all `mlp_out`; None where others are among them, or none.

    The target may lack them (a mixture of experts): `Target.sites` says why.
    """
    if not sites or any(site.tap != "mlp_out" for site in sites):
        return None
    return [f"{site.name.removesuffix(site.tap)}mlp_hidden" for site in sites]


class Neurons:
    """The k neurons of largest magnitude of every token, at one `mlp_hidden` site."""

    def __init__(self, site: Site, k: int) -> None:
        """Raises UserError for a k that the site does not have."""
        if not 1 <= k <= site.width:
            raise UserError(
                f"The baseline of the top-{k} neurons at {site.name!r} cannot be made; expected k from 1 to "
                f"{site.width}, the number of neurons there."
            )
        self.name, self.k = f"{site.name}-top{k}", k
        self.reads = self.writes = (site.name,)
        self.inputs, self.causal, self.fixed_cost = (self.reads,), True, 0
        self.n_latents, self.n_parameters = site.width, 0
        self.means: Mapping[str, Tensor] = {}
        """Empty: the sites ablated beside this baseline are those of `mlp_out`."""

    def sources(self, destination: int) -> range:
        """The one source."""
        return range(1)

    def write_norms(self) -> Tensor:
        """[1, 1]: one unit row per neuron."""
        return torch.tensor([[float(self.n_latents)]])

    def latent_costs(self, source: int) -> Tensor:
        """0: what neurons cost, the model's own matrices say (costs.py)."""
        return torch.zeros(self.n_latents, dtype=torch.float64)

    def encode(self, source: int, x_ND: Tensor) -> Codes:
        """The k entries of largest magnitude, with their signs; the lowest index among equals."""
        tokens, width = x_ND.shape
        parts = x_ND.split(max(1, CHUNK_ELEMENTS // width))
        chosen_NK = torch.cat([_largest(part, self.k) for part in parts])
        offsets = torch.arange(tokens + 1, device=x_ND.device) * self.k
        return Codes(x_ND.gather(1, chosen_NK).flatten(), chosen_NK.flatten(), offsets, width)

    def decode(self, destination: int, codes: Sequence[Codes]) -> Tensor:
        """[N, D]: the chosen entries in their places, zero elsewhere."""
        return codes[0].dense()


def _largest(x_ND: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the largest magnitudes; NaN counts as the largest, so that it is not lost."""
    size_ND = x_ND.abs()
    least_N, chosen_NK = size_ND.topk(k, dim=1)
    tied_N = (size_ND >= least_N[:, -1:]).sum(1) > k  # topk promises no order among equals
    if bool(tied_N.any()):
        chosen_NK[tied_N] = size_ND[tied_N].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return chosen_NK


class Affine:
    """v ≈ B u + c; encoding carries u as it is."""

    def __init__(self, pair: Pair, weight_ED: Tensor, bias_E: Tensor, mean_E: Tensor) -> None:
        """`weight_ED` B, `bias_E` c, `mean_E` the mean of v over the rows it was fitted on."""
        self.name = f"affine-{pair.written}"
        self.reads, self.writes = (pair.read,), (pair.written,)
        self.inputs, self.causal = (self.reads,), True
        self.fixed_cost = weight_ED.numel()
        self.weight_ED, self.bias_E, self.mean_E = weight_ED, bias_E, mean_E
        self.n_latents, self.n_parameters = weight_ED.shape[1], weight_ED.numel() + bias_E.numel()
        self.means: Mapping[str, Tensor] = {pair.written: mean_E}

    def sources(self, destination: int) -> range:
        """The one source."""
        return range(1)

    def write_norms(self) -> Tensor:
        """[1, 1]: ‖B‖²."""
        return self.weight_ED.double().square().sum().reshape(1, 1)

    def latent_costs(self, source: int) -> Tensor:
        """0: all of B is used on every token."""
        return torch.zeros(self.n_latents, dtype=torch.float64)

    def encode(self, source: int, x_ND: Tensor) -> Codes:
        """All D entries of every token."""
        tokens, width = x_ND.shape
        index = torch.arange(width, device=x_ND.device)
        offsets = torch.arange(tokens + 1, device=x_ND.device) * width
        return Codes(x_ND.flatten(), index.repeat(tokens), offsets, width)

    def decode(self, destination: int, codes: Sequence[Codes]) -> Tensor:
        """[N, E] = u Bᵀ + c in the dtype of the rows. Raises RuntimeError for rows of another width."""
        u_ND = codes[0].values.view(codes[0].tokens, codes[0].width)
        return torch.addmm(self.bias_E.to(u_ND.dtype), u_ND, self.weight_ED.to(u_ND.dtype).T)
