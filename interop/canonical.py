"""The one form that every dictionary takes between our files and those of other tools.

    pre = W_enc x + b_enc
    z   = ReLU(pre) ⊙ 1[pre > θ]           or the k largest of ReLU(pre), or the largest of each of k groups
    y_j = Σ_s z_s W_dec_s→j + b_dec_j + W_skip_j x_j

on raw activations, in float64. θ ≥ 0 is in the unit of `pre`, before anything the decoder scales. All tensors hold one
row per latent, as ours do; a format that stores the transpose transposes.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.rules import Deployed
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build

Kind = Literal["sae", "transcoder", "clt"]
Firing = Literal["relu", "threshold", "topk", "groupmax"]
KINDS: tuple[Kind, ...] = ("sae", "transcoder", "clt")


class Source(NamedTuple):
    """One encoder and what its latents write."""

    W_enc: Tensor
    """[F, D]."""
    b_enc: Tensor
    """[F]."""
    threshold: Tensor | None
    """[F] 0 ≤ θ < ∞; None for topk and groupmax."""
    W_dec: Tensor
    """[F, T, E], T the destinations that it writes, its own first."""


class Canonical(NamedTuple):
    """A dictionary on raw activations, float64 on the CPU."""

    name: str
    kind: Kind
    reads: tuple[str, ...]
    """Names of the sites read, by source."""
    writes: tuple[str, ...]
    """Names of the sites written, by destination."""
    layers: tuple[int, ...]
    """Layer of each site read."""
    firing: Firing
    """`relu`: every threshold is 0."""
    k: int | None
    """Of topk and groupmax."""
    sources: tuple[Source, ...]
    b_dec: tuple[Tensor, ...]
    """[E] by destination."""
    W_skip: tuple[Tensor, ...] | None = None
    """[E, D] by destination, on the raw input of its own source."""

    @property
    def n_latents(self) -> int:
        """F, per source."""
        return self.sources[0].W_enc.shape[0]

    @property
    def d_in(self) -> int:
        """D."""
        return self.sources[0].W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """E."""
        return self.b_dec[0].shape[0]

    def sources_of(self, destination: int) -> range:
        """Indices of the sources that write to a destination."""
        return range(destination + 1) if self.kind == "clt" else range(1)


def firing_of(thresholds: Sequence[Tensor]) -> Firing:
    """`relu` where all thresholds are 0, else `threshold`."""
    return "threshold" if any(bool((theta > 0).any()) for theta in thresholds) else "relu"


def codes(dictionary: Canonical, source: int, x_ND: Tensor) -> Tensor:
    """[N, F] float64: dense codes of one source, straight from the equation."""
    part = dictionary.sources[source]
    pre_NF = x_ND.double() @ part.W_enc.T + part.b_enc
    if part.threshold is not None:
        return torch.relu(pre_NF) * (pre_NF > part.threshold)
    assert dictionary.k is not None, "whoever counts knows how many"
    z_NF, k = torch.relu(pre_NF), dictionary.k
    if dictionary.firing == "topk":
        best = z_NF.topk(k, dim=1)
        return torch.zeros_like(z_NF).scatter(1, best.indices, best.values)
    z_Nkg = z_NF.unflatten(1, (k, -1))
    best = z_Nkg.max(2, keepdim=True)
    return torch.zeros_like(z_Nkg).scatter(2, best.indices, best.values).flatten(1)


def decoded(dictionary: Canonical, z: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
    """[N, E] by destination, from codes [N, F] and raw inputs [N, D] by source."""
    out = []
    for j, b_dec in enumerate(dictionary.b_dec):
        y_NE = b_dec.expand(z[0].shape[0], -1)
        for s in dictionary.sources_of(j):
            y_NE = y_NE + z[s] @ dictionary.sources[s].W_dec[:, j - s if dictionary.kind == "clt" else 0]
        if dictionary.W_skip is not None:
            y_NE = y_NE + x[j].double() @ dictionary.W_skip[j].T
        out.append(y_NE)
    return out


@torch.no_grad()
def from_coder(coder: Coder) -> Canonical:
    """A finished run's dictionary.

    Where topk or groupmax ranks by a · n, the norm moves from the decoder's row into the encoder's: codes are then
    a · n, reconstructions the same. A latent that never fires (θ = ∞: it writes nothing) gets a pre-activation of 0 and
    θ = 0, since an infinity in a file looks like damage. Raises UserError, naming the nearest route, for what has no
    such form.
    """
    spec = coder.spec
    _check(spec, coder.label)
    firing, k = spec.firing, None
    sources = []
    for index in range(len(coder.inputs)):
        encoder = coder.encoder(index)
        W_enc, b_enc = encoder.W_enc.detach().double().cpu(), encoder.b_enc.detach().double().cpu()
        W_dec = coder.W_dec[index].detach().double().cpu()
        threshold = None
        if isinstance(encoder.rule, Deployed):
            threshold = encoder.rule.threshold.double().cpu().clamp_min(0.0)
            never = threshold.isinf()
            W_enc, b_enc = W_enc.masked_fill(never[:, None], 0.0), b_enc.masked_fill(never, 0.0)
            threshold = threshold.masked_fill(never, 0.0)
        else:
            k = int(spec.k or 0)
            if encoder.norms is not None:
                n_F = encoder.norms.double().cpu()
                W_enc, b_enc = W_enc * n_F[:, None], b_enc * n_F
                W_dec = torch.where(n_F[:, None, None] > 0, W_dec / n_F[:, None, None], 0.0)
        sources.append(Source(W_enc, b_enc, threshold, W_dec))
    thresholds = [part.threshold for part in sources if part.threshold is not None]
    return Canonical(
        name=coder.label,
        kind=spec.kind,  # type: ignore[arg-type]  # one of KINDS, as checked
        reads=spec.reads,
        writes=spec.writes,
        layers=spec.layers,
        firing=firing_of(thresholds) if thresholds else firing,  # type: ignore[arg-type]
        k=k,
        sources=tuple(sources),
        b_dec=tuple(coder.b_dec.detach().double().cpu()),
        W_skip=None if coder.W_skip is None else tuple(coder.W_skip.detach().double().cpu()),
    )


def _check(spec: DictionarySpec, name: str) -> None:
    if spec.kind not in KINDS:
        raise UserError(
            f"Run {name} is a {spec.kind}, which no other tool has a form for; expected one of {', '.join(KINDS)}. "
            "Its weights.safetensors is documented in docs/formats.md."
        )
    if spec.normalise.startswith("per_token"):
        raise UserError(
            f"Run {name} normalises every token by itself (normalise = {spec.normalise!r}), which is no linear map and "
            "cannot be folded into weights: no other tool would compute the same. Train with normalise = 'scale' or "
            "'per_dim'."
        )


@torch.no_grad()
def to_coder(dictionary: Canonical, firing: str | None = None, k: float | None = None) -> Coder:
    """The dictionary as a deployed module of ours, float32.

    `firing`: what a thresholded one fires by elsewhere. It is batchtopk here too where `k` is known. Of other rules we
    know the thresholds and not what they came from, so they keep the name with `imported` before it: ours of the same
    name would ask for a penalty's coefficient.
    """
    counted = dictionary.firing in ("topk", "groupmax")
    known = firing == "batchtopk" and k is not None
    named = f"imported {firing or dictionary.firing}"
    spec = DictionarySpec(
        kind=dictionary.kind,
        reads=dictionary.reads,
        writes=dictionary.writes,
        layers=dictionary.layers,
        d_in=dictionary.d_in,
        d_out=dictionary.d_out,
        n_latents=dictionary.n_latents,
        unit_norm=False,
        firing=dictionary.firing if counted else "batchtopk" if known else named,
        k=dictionary.k if counted else k if known else None,
        skip=dictionary.W_skip is not None,
        normalise="none",
    )
    coder = build(spec, dictionary.name, deployed=True)
    for index, part in enumerate(dictionary.sources):
        encoder = coder.encoder(index)
        encoder.W_enc.copy_(part.W_enc)
        encoder.b_enc.copy_(part.b_enc)
        coder.W_dec[index].copy_(part.W_dec)
        if isinstance(encoder.rule, Deployed):
            assert part.threshold is not None, "a rule that compares has something to compare with"
            encoder.rule.threshold.copy_(part.threshold)
    coder.b_dec.copy_(torch.stack(dictionary.b_dec))
    if coder.W_skip is not None and dictionary.W_skip is not None:
        coder.W_skip.copy_(torch.stack(dictionary.W_skip))
    return coder.requires_grad_(False)
