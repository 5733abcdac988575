"""A cross-layer transcoder in the ordinary dense way, to compare with.

Plain autograd, dense codes, selection by torch.topk over the flattened block, one dense product per source and all its
destinations (triangular: no masked half), torch.nn.utils.clip_grad_norm_, torch.optim.Adam as it comes. The same
weights, inputs and loss as the dictionary it is made from.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from thresher.train.counting import entries
from thresher.train.dictionary.coder import Coder


class DenseCLT(nn.Module):
    """L sources and L destinations."""

    def __init__(self, coder: Coder) -> None:
        """Copies the weights of a cross-layer transcoder with BatchTopK."""
        super().__init__()
        encoders = [coder.encoder(source) for source in range(len(coder.reads))]
        assert coder.spec.firing == "batchtopk"
        assert coder.spec.k is not None
        self.k = float(coder.spec.k)
        self.W_enc = nn.ParameterList(encoder.W_enc.detach().clone() for encoder in encoders)
        self.b_enc = nn.ParameterList(encoder.b_enc.detach().clone() for encoder in encoders)
        self.W_dec = nn.ParameterList(weight.detach().clone() for weight in coder.W_dec)
        self.b_dec = nn.Parameter(coder.b_dec.detach().clone())
        self.adam = torch.optim.Adam(self.parameters(), lr=3e-4)

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        """[N, L, E] reconstructions of inputs [N, D]."""
        ys = list(self.b_dec.unbind(0))
        for source, x_ND in enumerate(xs):
            a_NF = torch.relu(x_ND @ self.W_enc[source].T + self.b_enc[source])
            best = torch.topk(a_NF.flatten(), entries(self.k, x_ND.shape[0]), sorted=False)
            z_NF = torch.zeros_like(a_NF).flatten().scatter(0, best.indices, best.values).view_as(a_NF)
            part_NTE = (z_NF @ self.W_dec[source].flatten(1)).view(x_ND.shape[0], -1, self.b_dec.shape[1])
            for place, part_NE in enumerate(part_NTE.unbind(1)):
                ys[source + place] = ys[source + place] + part_NE
        return torch.stack(ys, 1)

    def step(self, xs: Sequence[Tensor], ys: Sequence[Tensor], variances: Sequence[float]) -> Tensor:
        """One training step; the loss before it."""
        guess_NLE = self(xs)
        shares = [
            (guess_NLE[:, layer] - y).square().sum() / (y.shape[0] * variance)
            for layer, (y, variance) in enumerate(zip(ys, variances, strict=True))
        ]
        loss = torch.stack(shares).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.adam.step()
        self.adam.zero_grad()
        return loss.detach()
