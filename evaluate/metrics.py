"""What is measured: language-model loss, reconstruction and code statistics, as pure functions and mergeable sums.

Every reported number is one ratio of sums over all scored tokens, never a mean of batch ratios, so that it does not
depend on how the text was cut into batches. Sums are float64; log-probabilities are float32, or wider when the
model's logits are. Kept per token is one ratio per site for a median, nothing of the size of the vocabulary or the
dictionary.

`score_tokens_plain` says what is scored; `score_tokens` computes the same from three reductions over the logits.

Left out: reverse KL, which would need a second softmax per pass (swap the arguments of `kl_divergence` to have it).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.contracts import Codes
from thresher.evaluate.scoring import reductions

SUMS = ("nll", "kl", "correct", "agree")
"""Columns of the language-model sums of one arm, [G, 4] by segment."""
SMALLEST_GAP = 1e-6
"""Below this distance between two baselines a recovered fraction is undefined (null)."""


# --- language model -------------------------------------------------------------------------------------------------


class TokenScores(NamedTuple):
    """Per scored token, float64 [N]."""

    nll: Tensor
    """-log p(next token), nats."""
    kl: Tensor
    """KL(clean ‖ this arm), nats."""
    correct: Tensor
    """1 where the most likely next token is the next token."""
    agree: Tensor
    """1 where the most likely next token is that of the clean model."""

    def stacked(self) -> Tensor:
        """[N, 4] in the order of `SUMS`."""
        return torch.stack(list(self), dim=1)


class CleanScores(NamedTuple):
    """What the other arms need to know of the clean pass for N tokens."""

    p: Tensor
    """[N, V] next-token distribution."""
    constant: Tensor
    """[N] float64: Σ_v p log p up to the same rounding as `score_tokens`, so that equal logits give KL 0 exactly."""
    top: Tensor
    """[N] most likely next token."""


def kl_divergence(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p (log p - log q) per token, [N]; both arguments are log-probabilities."""
    return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)


def score_tokens_plain(logits_NV: Tensor, target_N: Tensor, clean_NV: Tensor) -> TokenScores:
    """Score N positions against their next tokens and the clean logits, by definition."""
    logq_NV, logp_NV = logits_NV.double().log_softmax(-1), clean_NV.double().log_softmax(-1)
    top_N = logits_NV.argmax(-1)
    return TokenScores(
        -logq_NV.gather(1, target_N[:, None])[:, 0],
        kl_divergence(logp_NV, logq_NV),
        (top_N == target_N).double(),
        (top_N == clean_NV.argmax(-1)).double(),
    )


def clean_scores(logits_NV: Tensor) -> CleanScores:
    """Prepare the clean side of `score_tokens`."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    p_NV = logits_NV.softmax(-1)
    found = reductions(logits_NV, p_NV, torch.zeros(len(p_NV), dtype=torch.int64, device=p_NV.device))
    return CleanScores(p_NV, found.dots - found.normaliser, found.top)


def score_tokens(logits_NV: Tensor, target_N: Tensor, clean: CleanScores) -> TokenScores:
    """As `score_tokens_plain`, without a [N, V] temporary: KL = Σ p log p - (Σ_v p·logit - logsumexp logit)."""
    found = reductions(logits_NV.to(clean.p.dtype), clean.p, target_N)
    return TokenScores(
        found.normaliser - found.chosen,
        clean.constant - (found.dots - found.normaliser),
        (found.top == target_N).double(),
        (found.top == clean.top).double(),
    )


def language_metrics(
    count: np.ndarray, clean: np.ndarray, arm: np.ndarray, zero: np.ndarray | None, mean: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Metrics of an arm from summed scores [..., 4] and token counts [...]; NaN where one is undefined.

    Leading axes let the same lines serve the point estimate and all bootstrap resamples.
    """
    ce = {name: sums[..., 0] / count for name, sums in (("clean", clean), ("arm", arm))}
    nan = np.full_like(ce["arm"], np.nan)
    ce_zero = nan if zero is None else zero[..., 0] / count
    ce_mean = nan if mean is None else mean[..., 0] / count
    delta = (arm[..., 0] - clean[..., 0]) / count
    kl = arm[..., 1] / count
    return {
        "ce": ce["arm"],
        "ce_clean": ce["clean"],
        "ce_zero": ce_zero,
        "ce_mean": ce_mean,
        "delta": delta,
        "ppl": np.exp(ce["arm"]),
        "ppl_ratio": np.exp(delta),
        "recovered_zero": _recovered(ce_zero, ce["arm"], ce["clean"]),
        "recovered_mean": _recovered(ce_mean, ce["arm"], ce["clean"]),
        "kl": kl,
        "kl_score": nan if zero is None else 1 - _ratio(kl, zero[..., 1] / count),
        "acc": arm[..., 2] / count,
        "acc_clean": clean[..., 2] / count,
        "acc_drop": (clean[..., 2] - arm[..., 2]) / count,
        "agree": arm[..., 3] / count,
    }


def _recovered(ce_baseline: np.ndarray, ce_arm: np.ndarray, ce_clean: np.ndarray) -> np.ndarray:
    gap = ce_baseline - ce_clean
    return _ratio(ce_baseline - ce_arm, np.where(gap >= SMALLEST_GAP, gap, np.nan))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.asarray(above / below)
    return np.where(np.isfinite(out), out, np.nan)


# --- reconstruction -------------------------------------------------------------------------------------------------


@dataclass
class TargetSums:
    """Moments of the true activations of one site, shared by all replacements; merged as in parallel variance."""

    count: int = 0
    mean: Tensor | None = None
    """[E]"""
    m2: Tensor | None = None
    """[E] squared distance from the mean, summed."""
    square: float = 0.0

    def add(self, y_NE: Tensor) -> None:
        """Take in N more rows."""
        if y_NE.shape[0] == 0:
            return
        y_NE = y_NE.double()
        mean_E = y_NE.mean(0)
        m2_E = (y_NE - mean_E).square().sum(0)
        self.merge(TargetSums(y_NE.shape[0], mean_E, m2_E, float(y_NE.square().sum())))

    def merge(self, other: "TargetSums") -> None:
        """Take in the rows of others, by Chan, Golub and LeVeque 1983."""
        if other.mean is None or other.m2 is None:
            return
        self.square += other.square
        if self.mean is None or self.m2 is None:
            self.count, self.mean, self.m2 = other.count, other.mean, other.m2
            return
        shift_E, total = other.mean - self.mean, self.count + other.count
        self.mean = self.mean + shift_E * (other.count / total)
        self.m2 = self.m2 + other.m2 + shift_E.square() * (self.count * other.count / total)
        self.count = total

    def copy(self) -> "TargetSums":
        """The same sums, to be merged into."""
        return TargetSums(self.count, self.mean, self.m2, self.square)

    def without(self, other: "TargetSums") -> "TargetSums":
        """These rows less some of them."""
        if other.mean is None or other.m2 is None:
            return self
        assert self.mean is not None
        assert self.m2 is not None
        count = self.count - other.count
        if count == 0:
            return TargetSums()
        mean_E = self.mean + (self.mean - other.mean) * (other.count / count)
        shift_E = other.mean - mean_E
        m2_E = self.m2 - other.m2 - shift_E.square() * (count * other.count / self.count)
        return TargetSums(count, mean_E, m2_E.clamp_min(0.0), self.square - other.square)


@dataclass
class ReconstructionSums:
    """Sums over one replacement's reconstructions of one site."""

    residual: Tensor | float = 0.0
    """[E] Σ r"""
    residual2: Tensor | float = 0.0
    """[E] Σ r²"""
    square: Tensor | float = 0.0
    dot: Tensor | float = 0.0
    cosine: Tensor | float = 0.0
    norm_ratio: Tensor | float = 0.0
    cosines: Tensor | int = 0
    """Rows in which neither vector is zero."""
    ratios: Tensor | int = 0
    """Rows in which the true vector is not zero."""
    token_fvu: list[np.ndarray] = field(default_factory=list)
    """‖r‖²/‖y‖² per row, float32, for the median."""

    def add(self, y_NE: Tensor, yhat_NE: Tensor) -> "Errors":
        """Take in N more rows of truth and reconstruction; returns the squared errors of these."""
        y_NE, yhat_NE = y_NE.double(), yhat_NE.double()
        r_NE = y_NE - yhat_NE
        r2_NE = r_NE.square()
        y2_N, yhat2_N, dot_N = y_NE.square().sum(1), yhat_NE.square().sum(1), (y_NE * yhat_NE).sum(1)
        errors = Errors(r2_NE.sum(1), r_NE.sum(0), r2_NE.sum(0))
        self.residual = self.residual + errors.total
        self.residual2 = self.residual2 + errors.by_dim
        self.square = self.square + yhat2_N.sum()
        self.dot = self.dot + dot_N.sum()
        real_N, both_N = y2_N > 0, (y2_N > 0) & (yhat2_N > 0)
        self.cosine = self.cosine + (dot_N / (y2_N * yhat2_N).sqrt())[both_N].sum()
        self.norm_ratio = self.norm_ratio + (yhat2_N / y2_N).sqrt()[real_N].sum()
        self.cosines = self.cosines + both_N.sum()
        self.ratios = self.ratios + real_N.sum()
        self.token_fvu.append((errors.squares / y2_N)[real_N].float().cpu().numpy())
        return errors

    def plus(self, other: "ReconstructionSums", sign: int = 1) -> "ReconstructionSums":
        """These rows and others, or (sign -1) without others that are among them, which leaves no median."""
        sums = {
            f.name: getattr(self, f.name) + sign * getattr(other, f.name) for f in fields(self) if f.name != "token_fvu"
        }
        return ReconstructionSums(**sums, token_fvu=self.token_fvu + other.token_fvu if sign > 0 else [])


class Errors(NamedTuple):
    """Of the rows of one batch, float64."""

    squares: Tensor
    """[N] ‖r‖² by row."""
    total: Tensor
    """[E] Σ r"""
    by_dim: Tensor
    """[E] Σ r²"""


def reconstruction_metrics(target: TargetSums, sums: ReconstructionSums) -> dict[str, float | None]:
    """Metrics of one site; None where a denominator is 0."""
    assert target.m2 is not None
    assert isinstance(sums.residual, Tensor)
    assert isinstance(sums.residual2, Tensor)
    error, spread = float(sums.residual2.sum()), float(target.m2.sum())
    varying_E = target.m2 > 0
    per_dim = (sums.residual2 / target.m2)[varying_E]
    tokens = np.concatenate(sums.token_fvu) if sums.token_fvu else np.zeros(0)
    offset = float((sums.residual / target.count).square().sum()) * target.count
    return {
        "fvu": _quotient(error, spread),
        "fvu_dim_mean": float(per_dim.mean()) if len(per_dim) else None,
        "constant_dims": float((~varying_E).sum()),
        "fvu_token_median": float(np.median(tokens)) if len(tokens) else None,
        "fvu_uncentred": _quotient(error, target.square),
        "offset_share": _quotient(offset, spread),
        "cosine": _quotient(float(sums.cosine), float(sums.cosines)),
        "norm_ratio": _quotient(float(sums.norm_ratio), float(sums.ratios)),
        "zero_rows": float(target.count - float(sums.cosines)),
        "gamma": _quotient(float(sums.square), float(sums.dot)),
    }


def _quotient(above: float, below: float) -> float | None:
    return above / below if below != 0 else None


# --- codes ----------------------------------------------------------------------------------------------------------


@dataclass
class CodeSums:
    """Counts over the codes of one source: how many latents fire per token, how often each latent fires."""

    tokens: int = 0
    l0_histogram: Tensor | int = 0
    """[F + 1] tokens by number of active latents."""
    firings: Tensor | int = 0
    """[F] tokens on which each latent fired."""

    def add(self, codes: Codes) -> Tensor:
        """Take in the codes of N more tokens; returns their L0, [N]."""
        l0_N = codes.l0()
        self.tokens += codes.tokens
        self.l0_histogram = self.l0_histogram + torch.bincount(l0_N, minlength=codes.width + 1)
        self.firings = self.firings + torch.bincount(codes.latents[codes.values > 0], minlength=codes.width)
        return l0_N


def code_metrics(sums: CodeSums) -> dict[str, float]:
    """L0 and latent-use statistics of one source."""
    assert isinstance(sums.firings, Tensor)
    assert isinstance(sums.l0_histogram, Tensor)
    firings, width = sums.firings.cpu().numpy(), sums.firings.shape[0]
    density = firings / sums.tokens
    return {
        "n_latents": float(width),
        "tokens": float(sums.tokens),
        **l0_metrics(sums.l0_histogram.cpu().numpy()),
        "alive": float((firings > 0).mean()),
        "dead": float((firings == 0).mean()),
        "dense_1": float((density > 0.01).mean()),
        "dense_10": float((density > 0.10).mean()),
    }


def l0_metrics(histogram: np.ndarray) -> dict[str, float]:
    """Mean and exact quantiles of a count histogram."""
    tokens = histogram.sum()
    return {
        "l0": float(histogram @ np.arange(len(histogram)) / tokens),
        "l0_median": float(count_quantile(histogram, 0.5)),
        "l0_p5": float(count_quantile(histogram, 0.05)),
        "l0_p95": float(count_quantile(histogram, 0.95)),
    }


def count_quantile(histogram: np.ndarray, q: float) -> int:
    """The smallest count that at least a share q of the tokens do not exceed."""
    below = np.cumsum(histogram)
    return int(np.searchsorted(below, q * below[-1] - 1e-9))


def density_histogram(firings_F: np.ndarray, tokens: int) -> dict[str, list[float]]:
    """Latents by log10 density in quarter decades from about 1/tokens to 1, and the number that never fired."""
    steps = max(1, math.ceil(4 * math.log10(max(tokens, 2))))
    edges = np.arange(-steps, 1) / 4
    alive = firings_F[firings_F > 0]
    counts, _ = np.histogram(np.log10(alive / tokens), bins=edges)
    return {
        "log10_edges": [float(edge) for edge in edges],
        "latents": [float(count) for count in counts],
        "dead": [float((firings_F == 0).sum())],
    }


def finite(metrics: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Scalars with NaN as None, for JSON."""
    return {key: float(value) if np.isfinite(value) else None for key, value in metrics.items()}


def finite_or_none(value: float) -> float | None:
    """For JSON."""
    return value if np.isfinite(value) else None
