"""A trainer in the ordinary dense way, written from the equations alone: what the fast one is held to.

Dense codes under plain autograd, `torch.topk` over rows or over the whole block, dense products, `torch.optim.Adam` as
it comes, one batch in one piece. Nothing of thresher.train is imported; initial weights come in as tensors, so that
two trainers can start from the same place and see the same rows.

An SAE or a transcoder is the case of one layer. In a CLT source i writes to layers i, i + 1, …, L − 1:

    a_i = W_enc_i x_i + b_enc_i        ŷ_j = b_dec_j + Σ_{i ≤ j} z_i W_dec_i[:, j − i]

    loss = mean over layers of ⟨‖y − ŷ‖²⟩ / V  +  α · AuxK  +  λ (L0/k − 1)²    (the last for JumpReLU alone)

N tokens, D width in, E width out, F latents, L layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Batch = tuple[Sequence[Tensor], Sequence[Tensor]]
"""[N, D] by source and [N, E] by destination."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is trained and how."""

    firing: Literal["topk", "batchtopk", "jumprelu"]
    """topk: the k largest of a token. batchtopk: the ⌊kN⌋ largest of a batch. jumprelu: those above exp(log_theta)."""
    k: float
    """Latents per token and layer; of jumprelu the L0 aimed at."""
    sparsity: float = 0.0
    """λ of (L0/k − 1)²."""
    unit: bool = False
    """Whether decoder rows keep norm 1, over all layers they write to together."""
    pre_bias: bool = False
    """Whether b_dec is taken off the input; one layer only."""
    aux: float = 1 / 32
    """α."""
    aux_k: int
    """Dead latents per token in AuxK."""
    dead_after: int
    """Tokens without firing from which on a latent is dead."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class Weights(NamedTuple):
    """Where to start; copied."""

    W_enc: Sequence[Tensor]
    """[F, D] by source."""
    b_enc: Sequence[Tensor]
    """[F] by source."""
    W_dec: Sequence[Tensor]
    """[F, L − i, E] by source i."""
    b_dec: Tensor
    """[L, E]."""
    log_theta: Sequence[Tensor] = ()
    """[F] by source, of jumprelu."""
    windows: Sequence[float] = ()
    """ε by source, of jumprelu."""


def named(state: Mapping[str, Tensor]) -> Weights:
    """Weights from tensors by name: `encoders.0.W_enc`, `W_dec.0`, `b_dec`, … as a saved state has them."""

    def all_of(form: str) -> list[Tensor]:
        return [state[name] for name in takewhile(state.__contains__, (form.format(i) for i in count()))]

    jumps = all_of("encoders.{}.rule.log_theta"), [float(w) for w in all_of("encoders.{}.rule.window")]
    encoders = all_of("encoders.{}.W_enc"), all_of("encoders.{}.b_enc")
    return Weights(*encoders, all_of("W_dec.{}"), state["b_dec"], *jumps)


class Dense:
    """A dictionary in training."""

    def __init__(self, rules: Rules, weights: Weights) -> None:
        self.rules, self.windows = rules, weights.windows
        self.W_enc, self.b_enc, self.W_dec, self.log_theta = (_copies(group) for group in weights[:3] + weights[4:5])
        (self.b_dec,) = _copies([weights.b_dec])
        self.parameters = [*self.W_enc, *self.b_enc, *self.W_dec, self.b_dec, *self.log_theta]
        self.adam = torch.optim.Adam(self.parameters, betas=rules.betas, eps=rules.eps)
        self.silent = [torch.zeros(len(b_F), dtype=torch.int64) for b_F in self.b_enc]
        self.theta = [torch.zeros(()) for _ in self.b_enc]
        """Frozen thresholds of batchtopk, by source; `calibrate` sets them."""

    def preactivations(self, source: int, x_ND: Tensor) -> Tensor:
        """a [N, F]."""
        shifted_ND = x_ND - self.b_dec[source] if self.rules.pre_bias else x_ND
        return shifted_ND @ self.W_enc[source].T + self.b_enc[source]

    def fire(self, source: int, a_NF: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [N, F] in training and, of jumprelu, the gates whose sum is L0."""
        if self.rules.firing == "jumprelu":
            return _jump(a_NF, self.log_theta[source].exp(), self.windows[source])
        if self.rules.firing == "topk":
            best = torch.topk(a_NF.detach(), int(self.rules.k), dim=1).indices
            kept_NF = torch.zeros_like(a_NF).scatter_(1, best, 1.0)
        else:
            flat = torch.relu(a_NF.detach()).flatten()
            best = torch.topk(flat, int(self.rules.k * a_NF.shape[0])).indices
            kept_NF = torch.zeros_like(flat).scatter_(0, best, 1.0).view_as(a_NF)
        return torch.relu(a_NF) * kept_NF, kept_NF

    def decode(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """ŷ [N, E] by layer."""
        return [
            self.b_dec[j] + sum(codes[i] @ self.W_dec[i][:, j - i] for i in range(j + 1))  # type: ignore[misc]
            for j in range(len(codes))
        ]

    def step(self, xs: Sequence[Tensor], ys: Sequence[Tensor], variances: Sequence[float], rate: float) -> Tensor:
        """One step at a learning rate; the loss before it."""
        fired = [self.fire(source, self.preactivations(source, x)) for source, x in enumerate(xs)]
        errors = [y - guess for y, guess in zip(ys, self.decode([z for z, _ in fired]), strict=True)]
        fvus = [e.square().sum(1).mean() / v for e, v in zip(errors, variances, strict=True)]
        loss = torch.stack(fvus).mean() + self.rules.aux * self.auxiliary(xs, errors)
        if self.rules.sparsity:
            misses = [gate.sum(1).mean() / self.rules.k - 1 for _, gate in fired]
            loss = loss + self.rules.sparsity * torch.stack(misses).square().mean()
        self.adam.zero_grad()
        loss.backward()
        self._update(rate)
        for count_F, (z_NF, _) in zip(self.silent, fired, strict=True):
            count_F += z_NF.shape[0]
            count_F[(z_NF > 0).any(0)] = 0
        return loss.detach()

    def auxiliary(self, xs: Sequence[Tensor], errors: Sequence[Tensor]) -> Tensor:
        """AuxK: dead latents explain what is left of their own layer; the mean over layers that have some."""
        terms = []
        for source, (x_ND, error_NE) in enumerate(zip(xs, errors, strict=True)):
            dead_F = self.silent[source] >= self.rules.dead_after
            n, e_NE = int(dead_F.sum()), error_NE.detach()
            if n:
                shifted_ND = x_ND - self.b_dec[source].detach() if self.rules.pre_bias else x_ND
                a_Nn = shifted_ND @ self.W_enc[source][dead_F].T + self.b_enc[source][dead_F]
                best = torch.topk(a_Nn, min(self.rules.aux_k, n), dim=1)
                z_Nn = torch.zeros_like(a_Nn).scatter(1, best.indices, torch.relu(best.values))
                guess_NE = z_Nn @ self.W_dec[source][dead_F, 0]
                around = (e_NE - e_NE.mean(0)).square().sum()
                terms.append(min(n / self.rules.aux_k, 1.0) * (guess_NE - e_NE).square().sum() / around)
        return torch.stack(terms).mean() if terms else torch.zeros(())

    @torch.no_grad()
    def _update(self, rate: float) -> None:
        """Take the part along the row out of decoder gradients, clip, Adam, norm 1."""
        for W_FTE in self.W_dec if self.rules.unit else ():
            assert W_FTE.grad is not None
            along_F = (W_FTE.grad * W_FTE).sum((1, 2))
            W_FTE.grad -= along_F[:, None, None] * W_FTE
        norm = torch.stack([p.grad.norm() for p in self.parameters if p.grad is not None]).norm()
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad *= min(1.0, self.rules.clip / float(norm))
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        for W_FTE in self.W_dec if self.rules.unit else ():
            W_FTE /= W_FTE.square().sum((1, 2)).sqrt()[:, None, None]

    def dead(self) -> float:
        """Share of latents that are dead, the mean over layers."""
        shares = [(count_F >= self.rules.dead_after).double().mean() for count_F in self.silent]
        return float(torch.stack(shares).mean())

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch], tokens: int) -> None:
        """Freeze batchtopk's thresholds: per source the ⌊kN⌋-th largest relu(a) over all `tokens` rows of `batches`."""
        count = int(self.rules.k * tokens)
        best = [torch.zeros(0) for _ in self.b_enc]
        for xs, _ in batches:
            for source, x_ND in enumerate(xs):
                a = torch.relu(self.preactivations(source, x_ND)).flatten()
                both = torch.cat([best[source].to(a), a])
                best[source] = torch.topk(both, min(count, len(both))).values
        self.theta = [values[count - 1] for values in best]

    @torch.no_grad()
    def encode(self, source: int, x_ND: Tensor) -> Tensor:
        """Codes [N, F] with every token on its own."""
        a_NF = self.preactivations(source, x_ND)
        if self.rules.firing == "topk":
            return self.fire(source, a_NF)[0]
        theta = self.log_theta[source].exp() if self.rules.firing == "jumprelu" else self.theta[source]
        return a_NF * (a_NF > theta)

    @torch.no_grad()
    def held_out(self, batches: Iterable[Batch], means: Sequence[Tensor]) -> tuple[float, float]:
        """FVU against the training means [E] by layer, and L0, under the frozen rule; both the mean over layers."""
        left, whole = torch.zeros(2, len(means), dtype=torch.float64)
        active, tokens = 0, 0
        for xs, ys in batches:
            codes = [self.encode(source, x) for source, x in enumerate(xs)]
            for layer, (y, guess) in enumerate(zip(ys, self.decode(codes), strict=True)):
                left[layer] += (y - guess).double().square().sum()
                whole[layer] += (y - means[layer]).double().square().sum()
            active += sum(int((z > 0).sum()) for z in codes)
            tokens += len(xs[0])
        return float((left / whole).mean()), active / tokens / len(means)


def rate(peak: float, step: int, total: int, warmup: int) -> float:
    """Linear from 0 over `warmup` steps, then the peak, then linear to 0 over the last fifth; steps from 0."""
    return peak * min(1.0, (step + 1) / warmup) * min(1.0, 5 * (total - step) / total)


def _jump(a_NF: Tensor, theta_F: Tensor, window: float) -> tuple[Tensor, Tensor]:
    """a · H(a − θ) and H(a − θ); ∂/∂θ is −(θ/ε) K((a − θ)/ε) of the first and −(1/ε) K of the second."""
    above_NF = (a_NF > theta_F).to(a_NF)
    near_NF = ((a_NF - theta_F).abs() < window / 2).to(a_NF).detach()
    pull_NF = -(theta_F / window) * near_NF
    pull_NF = pull_NF - pull_NF.detach()  # 0 in value, with the window's gradient
    return a_NF * above_NF + theta_F.detach() * pull_NF, above_NF + pull_NF


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]
