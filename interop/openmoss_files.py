"""OpenMOSS's directories as they are stored: found, checked, every layout brought to one row per latent.

openmoss.py has the layouts and what they mean.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.interop.canonical import Kind, Source
from thresher.interop.tensors import Stored, read_json

CONFIGS = ("config.json", "hyperparams.json")
WEIGHTS = ("sae_weights.safetensors", "checkpoints/pruned.safetensors", "checkpoints/final.safetensors")
NORM = "dataset_average_activation_norm"
_LOG = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
_OVER_BATCH = (
    "a token's latents then depend on the other {} of the batch, and the files hold no threshold. Convert it to "
    "jumprelu with the tool's own topk_to_jumprelu_conversion, and import that."
)


class Files(NamedTuple):
    """A dictionary as it is stored, with one row per latent."""

    kind: Kind
    act: str
    """relu, jumprelu or topk."""
    k: int | None
    hooks: tuple[tuple[str, ...], tuple[str, ...]]
    """Read by source, written by destination."""
    parts: tuple[Source, ...]
    """`threshold` is what the gate is compared with; None unless jumprelu."""
    b_dec: tuple[Tensor, ...]
    """[d] by destination."""


class Found(NamedTuple):
    """All that a directory holds."""

    weights: Path
    config: dict[str, Any]
    files: Files
    norms: dict[str, float]
    """Average norms by hook, or by `in` and `out`, as they are."""
    scalar: bool
    """Whether there is one threshold for all latents."""


def found(path: Path) -> Found:
    """Read a directory. Raises UserError as openmoss.read says."""
    if not path.is_dir():
        raise UserError(f"{path} is no directory of OpenMOSS. Give the one that holds its {' or '.join(CONFIGS)}.")
    place = path / next((name for name in CONFIGS if (path / name).is_file()), CONFIGS[0])
    raw = read_json(place, "an OpenMOSS directory")
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if weights is None:
        raise UserError(
            f"{path} holds none of {', '.join(WEIGHTS)}. Other forms (.pt, .dcp) are not read: save it anew."
        )
    _check(place, raw)
    stored = Stored.safetensors(weights)
    norms = _norms(stored, raw)
    scalar = None if any(name in stored for name in _LOG) else raw.get("jump_relu_threshold")
    files = _clt(place, raw, stored) if raw.get("sae_type") == "clt" else _sae(place, raw, stored, scalar)
    stored.done()
    return Found(weights, raw, files, norms, scalar is not None)


def _check(place: Path, raw: Mapping[str, Any]) -> None:
    """Refuse what has no canonical form."""
    kind, act = raw.get("sae_type", "sae"), _act(raw)
    if kind not in ("sae", "clt"):
        raise UserError(f"{place}: sae_type is {kind!r}; expected sae or clt, which alone have a form here.")
    if raw.get("use_glu_encoder"):
        raise UserError(
            f"{place}: use_glu_encoder is true: codes are products of two functions of the input there, which one "
            "encoder cannot compute. It cannot be imported."
        )
    norm = raw.get("norm_activation", "dataset-wise")
    if norm not in ("dataset-wise", "inference"):
        raise UserError(
            f"{place}: norm_activation is {norm!r}, which rescales every token or batch by itself and folds into no "
            "weights. Expected dataset-wise or inference; it cannot be imported."
        )
    if act in ("batchtopk", "batchlayertopk"):
        others = "tokens" if act == "batchtopk" else "tokens and layers"
        raise UserError(f"{place}: act_fn is {act!r}: {_OVER_BATCH.format(others)}")
    if act == "layertopk" and len(raw.get("hook_points_in", ())) != 1:
        raise UserError(
            f"{place}: act_fn is 'layertopk', whose layers compete for k latents of a token: no source of a dictionary "
            "here knows the others. Convert it to jumprelu with the tool's own topk_to_jumprelu_conversion, and import "
            "that."
        )
    if act not in ("relu", "jumprelu", "topk", "layertopk"):
        raise UserError(f"{place}: act_fn is {act!r}; expected relu, jumprelu or topk.")


def _act(raw: Mapping[str, Any]) -> str:
    return str(raw.get("act_fn", "relu")).lower()


def _norms(stored: Stored, raw: Mapping[str, Any]) -> dict[str, float]:
    """Average norms by hook, or by `in` and `out`, as they are: whether they make sense matters where they are used."""
    found = {name: float(norm) for name, norm in (raw.get(NORM) or {}).items()}
    for name in [name for name in stored.tensors if name.startswith(f"{NORM}.")]:
        found[name.removeprefix(f"{NORM}.")] = float(stored.tensors.pop(name).double())
    return found


def factor(norms: Mapping[str, float], hook: str, side: str, d: int) -> float | None:
    """s of a hook; None: its norm is missing or was never set."""
    norm = norms.get(hook, norms.get(side, math.nan))
    return math.sqrt(d) / norm if math.isfinite(norm) and norm > 0 else None


def _hooks(place: Path, raw: Mapping[str, Any], *names: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    missing = [name for name in names if not raw.get(name)]
    if missing:
        raise UserError(f"{place} has no {' and no '.join(missing)}, which say what it acts on. Restore the file.")
    first, second = ((raw[name],) if isinstance(raw[name], str) else tuple(raw[name]) for name in names)
    return first, second


def _k(place: Path, raw: Mapping[str, Any], m: int) -> int | None:
    if _act(raw) not in ("topk", "layertopk"):
        return None  # jumprelu keeps the k of its warm-up
    k = raw.get("top_k")
    if not isinstance(k, int) or not 0 < k <= m:
        raise UserError(f"{place}: top_k is {k!r} with act_fn = {raw['act_fn']!r}; expected 1 to {m}.")
    return k


def _size(raw: Mapping[str, Any]) -> int | None:
    """M as the config has it."""
    if raw.get("d_sae"):
        return int(raw["d_sae"])
    return int(int(raw["d_model"]) * float(raw["expansion_factor"])) if raw.get("expansion_factor") else None


def _sae(place: Path, raw: Mapping[str, Any], stored: Stored, scalar: float | None) -> Files:
    hooks = _hooks(place, raw, "hook_point_in", "hook_point_out")
    d, biased = int(raw["d_model"]), bool(raw.get("use_decoder_bias", True))
    zeros = torch.zeros(d, dtype=torch.float64)
    if "W_E" in stored:
        W_E, W_D = stored.take("W_E", d, _size(raw)).T, stored.take("W_D", _size(raw), d)
        b_E, b_D = stored.take("b_E", len(W_E)), stored.take("b_D", d) if biased else zeros
    else:
        W_E, W_D = stored.take("encoder.weight", _size(raw), d), stored.take("decoder.weight", d, _size(raw)).T
        b_E, b_D = stored.take("encoder.bias", len(W_E)), stored.take("decoder.bias", d) if biased else zeros
    theta = None
    if _act(raw) == "jumprelu":
        if scalar is not None:
            theta = torch.full_like(b_E, float(scalar))
        else:
            name = next((name for name in _LOG if name in stored), _LOG[0])
            theta = stored.take(name, len(W_E)).exp()
    return Files(
        kind="sae" if hooks[0] == hooks[1] else "transcoder",
        act=_act(raw).removeprefix("layer"),
        k=_k(place, raw, len(W_E)),
        hooks=hooks,
        parts=(Source(W_E, b_E, theta, W_D[:, None]),),
        b_dec=(b_D,),
    )


def _clt(place: Path, raw: Mapping[str, Any], stored: Stored) -> Files:
    hooks = _hooks(place, raw, "hook_points_in", "hook_points_out")
    count, d = len(hooks[0]), int(raw["d_model"])
    if len(hooks[1]) != count:
        raise UserError(f"{place}: {count} hook_points_in and {len(hooks[1])} hook_points_out; expected as many.")
    W_E = stored.take("W_E", count, d, _size(raw))
    m = W_E.shape[2]
    b_E = stored.take("b_E", count, m)
    by_target = [stored.take(f"W_D.{t}", t + 1, m, d) for t in range(count)]
    zeros = torch.zeros(d, dtype=torch.float64)
    biased = bool(raw.get("use_decoder_bias", True))
    b_D = tuple(stored.take(f"b_D.{t}", d) if biased or f"b_D.{t}" in stored else zeros for t in range(count))
    theta = stored.take(_LOG[0], count, m).exp() if _act(raw) == "jumprelu" else None
    parts = tuple(
        Source(
            W_E[s].T,
            b_E[s],
            None if theta is None else theta[s],
            torch.stack([by_target[t][s] for t in range(s, count)], dim=1),
        )
        for s in range(count)
    )
    return Files("clt", _act(raw).removeprefix("layer"), _k(place, raw, m), hooks, parts, b_D)
