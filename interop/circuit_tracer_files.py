"""circuit-tracer's files as they are stored, and what each may mean; circuit_tracer.py has layout and equation.

A negative threshold is kept in the tool's own equation, where it lets negative codes through, and raised to 0 in ours,
which has none: the measured difference says whether that matters. Left out: lists of files elsewhere (`transcoders`),
and feature pages.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.interop.canonical import Canonical, Source, firing_of
from thresher.interop.formats import Foreign, Reading
from thresher.interop.tensors import Stored

CONFIG = "config.yaml"
SET, CLT = "transcoder_set", "cross_layer_transcoder"
THRESHOLD = "activation_function.threshold"
_NEGATIVE = ", negative thresholds raised to 0"


def read(path: Path) -> list[Foreign]:
    """The transcoders of a directory, by layer, or its CLT.

    Raises UserError for missing layers and for tensors that do not fit.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no directory of circuit-tracer. Give the one that holds its {CONFIG}.")
    settings = _settings(path / CONFIG)
    cross = _numbered(path, "W_enc_*.safetensors")
    kind = settings.get("model_kind") or (CLT if cross else SET)
    if kind not in (SET, CLT):
        raise UserError(f"{path / CONFIG}: model_kind is {kind!r}; expected {SET} or {CLT}.")
    return [_cross(path, settings, cross)] if kind == CLT else _set(path, settings)


def _settings(file: Path) -> dict[str, Any]:
    """config.yaml; nothing where there is none, as the tool's own `to_safetensors` leaves it."""
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML ({' '.join(str(error).split())}). Restore the file.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds a {type(found).__name__}; expected names with values.")
    return found


def _numbered(path: Path, pattern: str) -> list[int]:
    """Numbers in the names of files. Raises UserError when one of 0, 1, … is missing."""
    found = sorted(int(match[1]) for file in path.glob(pattern) if (match := re.search(r"_(\d+)\.", file.name)))
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing:
        names = ", ".join(pattern.replace("*", str(layer)) for layer in missing[:4])
        raise UserError(f"{path} has no {names}, but files of later layers; expected all layers from 0 on. Restore it.")
    return found


def _hooks(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Hooks inside a block, read and written; what the tool itself assumes where nothing says them."""
    given = (settings.get("feature_input_hook"), settings.get("feature_output_hook"))
    return str(given[0] or "hook_resid_mid"), str(given[1] or "hook_mlp_out")


def _facts(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {
        "tool": "circuit-tracer",
        "version": None,
        "architecture": kind,
        "model": settings.get("model_name"),
        "hook_name": _hooks(settings)[0],
    }


def _set(path: Path, settings: Mapping[str, Any]) -> list[Foreign]:
    if settings.get("transcoders"):
        raise UserError(
            f"{path / CONFIG} names files elsewhere (transcoders: …). Fetch them, and put them beside it as "
            "layer_0.safetensors, layer_1.safetensors, …; Gemma Scope's .npz files come in with --from npz."
        )
    layers = _numbered(path, "layer_*.safetensors")
    if not layers:
        raise UserError(f"{path} holds neither layer_0.safetensors nor W_enc_0.safetensors: it is no directory of it.")
    return [_layer(path / f"layer_{layer}.safetensors", layer, settings) for layer in layers]


def _layer(file: Path, layer: int, settings: Mapping[str, Any]) -> Foreign:
    """One transcoder; of those with TopK, which later versions know, k is in the file or in the config."""
    stored = Stored.safetensors(file)
    W_enc = stored.take("W_enc", None, None)
    m, d = W_enc.shape
    old = "W_dec" in stored and m != d and tuple(stored.tensors["W_dec"].shape) == (d, m)
    W_dec = stored.take("W_dec", d, m).T if old else stored.take("W_dec", m, d)
    b_enc, b_dec = stored.take("b_enc", m), stored.take("b_dec", d)
    theta = stored.take(THRESHOLD, m) if THRESHOLD in stored else None
    W_skip = stored.take("W_skip", d, d) if "W_skip" in stored else None
    k = int(stored.take("k")) if "k" in stored else None
    if k is None and settings.get("activation") == "topk":
        k = int(settings.get("k") or 0)
        if not 0 < k <= m:
            raise UserError(
                f"{file.parent / CONFIG}: k is {settings.get('k')!r} with activation: topk; expected 1 to {m}."
            )
    stored.done()
    inside, outside = _hooks(settings)
    base = Canonical(
        name="", kind="transcoder", reads=(f"blocks.{layer}.{inside}",), writes=(f"blocks.{layer}.{outside}",),
        layers=(layer,), firing="relu", k=None, b_dec=(b_dec,), W_skip=None if W_skip is None else (W_skip,),
        sources=(Source(W_enc, b_enc, torch.zeros_like(b_enc), W_dec[:, None]),),
    )  # fmt: skip
    readings = [_reading("as its files say", base, [theta])]
    if k is not None:
        readings = [_counted(base, k), readings[0]._replace(label="ReLU, as in a local directory")]
    firing = "topk" if k is not None else "relu" if theta is None else "jumprelu"
    return Foreign(tuple(readings), firing, None if k is None else float(k), _facts(settings, SET))


class _Parts(NamedTuple):
    """The files of a CLT, by layer."""

    sources: list[Source]
    thetas: list[Tensor | None]
    b_dec: list[Tensor]
    skips: list[Tensor | None]


def _parts(path: Path, layers: Sequence[int]) -> _Parts:
    parts = _Parts([], [], [], [])
    for layer in layers:
        stored = Stored.safetensors(path / f"W_enc_{layer}.safetensors")
        W_enc = stored.take(f"W_enc_{layer}", *(parts.sources[0].W_enc.shape if layer else (None, None)))
        m, d = W_enc.shape
        b_enc = stored.take(f"b_enc_{layer}", m)
        parts.b_dec.append(stored.take(f"b_dec_{layer}", d))
        jumps = parts.thetas[0] is not None if layer else "threshold_0" in stored
        if not jumps and f"threshold_{layer}" in stored:
            raise UserError(
                f"{stored.path} has thresholds, but layer 0 has none, which says for all layers that they fire by "
                "ReLU: circuit-tracer would leave them unread. Add threshold_0 (zeros for ReLU), or remove them."
            )
        parts.thetas.append(stored.take(f"threshold_{layer}", m) if jumps else None)
        parts.skips.append(stored.take(f"W_skip_{layer}", d, d) if f"W_skip_{layer}" in stored else None)
        stored.done()
        decoder = Stored.safetensors(path / f"W_dec_{layer}.safetensors")
        W_dec = decoder.take(f"W_dec_{layer}", m, len(layers) - layer, d)
        decoder.done()
        parts.sources.append(Source(W_enc, b_enc, torch.zeros_like(b_enc), W_dec))
    return parts


def _cross(path: Path, settings: Mapping[str, Any], layers: Sequence[int]) -> Foreign:
    if not layers:
        raise UserError(f"{path} holds no W_enc_0.safetensors, but {CONFIG} calls it a {CLT}. Restore it.")
    parts = _parts(path, layers)
    inside, outside = _hooks(settings)
    base = Canonical(
        name="", kind="clt", reads=tuple(f"blocks.{layer}.{inside}" for layer in layers),
        writes=tuple(f"blocks.{layer}.{outside}" for layer in layers), layers=tuple(layers), firing="relu", k=None,
        sources=tuple(parts.sources), b_dec=tuple(parts.b_dec),
    )  # fmt: skip
    readings = [_reading("as its files say", base, parts.thetas)]
    if any(skip is not None for skip in parts.skips):
        zeros = torch.zeros(base.d_out, base.d_in, dtype=torch.float64)
        W_skip = tuple(zeros if skip is None else skip for skip in parts.skips)
        turned = base._replace(W_skip=tuple(weight.T for weight in W_skip))
        readings = [
            _reading("W_skip left out, as circuit-tracer 0.5.0 does", base, parts.thetas),
            _reading("with x @ W_skip, as newer ones do", turned, parts.thetas),
            _reading("with x @ W_skipᵀ, as for transcoders", base._replace(W_skip=W_skip), parts.thetas),
        ]
    firing = "relu" if parts.thetas[0] is None else "jumprelu"
    return Foreign(tuple(readings), firing, None, _facts(settings, CLT))


def _reading(label: str, base: Canonical, thetas: Sequence[Tensor | None]) -> Reading:
    """`base` with thresholds by source; None: ReLU. Its forward lets through what lies between a negative θ and 0."""
    raised = [
        torch.zeros_like(p.b_enc) if t is None else t.clamp_min(0.0) for p, t in zip(base.sources, thetas, strict=True)
    ]
    parts = tuple(part._replace(threshold=theta) for part, theta in zip(base.sources, raised, strict=True))
    negative = any(theta is not None and bool((theta < 0).any()) for theta in thetas)

    def forward(xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        codes = []
        for x_ND, part, theta in zip(xs, base.sources, thetas, strict=True):
            pre_NF = x_ND.double() @ part.W_enc.T + part.b_enc
            codes.append(pre_NF.relu() if theta is None else pre_NF * (pre_NF > theta))
        return codes, _outputs(base, codes, xs)

    dictionary = base._replace(sources=parts, firing=firing_of(raised))
    return Reading(label + (_NEGATIVE if negative else ""), dictionary, forward)


def _counted(base: Canonical, k: int) -> Reading:
    """`base` with the k largest codes of each token."""

    def forward(xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        z_NF = (xs[0].double() @ base.sources[0].W_enc.T + base.sources[0].b_enc).relu()
        best = z_NF.topk(k, dim=1)
        codes = [torch.zeros_like(z_NF).scatter(1, best.indices, best.values)]
        return codes, _outputs(base, codes, xs)

    part = base.sources[0]._replace(threshold=None)
    return Reading("the k largest, as its files say", base._replace(sources=(part,), firing="topk", k=k), forward)


def _outputs(base: Canonical, codes: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
    """y by layer: of a transcoder from its own codes, of a CLT from those of all layers up to it."""
    out = []
    for layer, b_dec in enumerate(base.b_dec):
        y_NE = b_dec.expand(codes[0].shape[0], -1)
        for s in range(layer + 1):
            y_NE = y_NE + codes[s] @ base.sources[s].W_dec[:, layer - s]
        out.append(y_NE if base.W_skip is None else y_NE + xs[layer].double() @ base.W_skip[layer].T)
    return out
