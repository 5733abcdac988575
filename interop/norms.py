"""Dictionaries of what an MLP reads, for a reader that takes its input before the norm's gain.

circuit-tracer can read `ln2.hook_normalized`, the norm before its gain γ and shift β are applied, where it cannot read
the MLP's own input (`mlp.hook_in`: on its nnsight backend, Gemma-2's). What ours were trained on is γ ⊙ x + β, so γ
and β go into the encoder (folds.before_gain). They belong to the target and are read from its files, without loading
the model. No other change of hooks has a fold: the residual stream before the norm is another tensor.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.interop import folds
from thresher.interop.canonical import Canonical
from thresher.interop.hooks import hook_name, tap_of

BEFORE_GAIN = "ln2.hook_normalized"


class Norm(NamedTuple):
    """The last step γ ⊙ x + β of the norm that an MLP reads from."""

    gamma: Tensor
    """[D]."""
    beta: Tensor
    """[D]; zeros where the norm has none."""


def reading_at(dictionary: Canonical, hook: str, norms: Mapping[int, Norm]) -> Canonical:
    """The same dictionary for a reader at another hook inside the block; `norms` by layer.

    Raises UserError for a hook that carries another tensor than it was trained on.
    """
    own = {tap_of(hook_name(site)) for site in dictionary.reads}
    if own == {hook}:
        return dictionary
    if hook != BEFORE_GAIN or own != {"mlp.hook_in"}:
        raise UserError(
            f"--hook is {hook!r}, but {dictionary.name} was trained on {', '.join(sorted(own))}, which is another "
            f"tensor: it would read what it has never seen. Only mlp.hook_in can be exported for {BEFORE_GAIN}, whose "
            "gain and shift fold into the encoder. Leave --hook out, or train on that site."
        )
    missing = [layer for layer in dictionary.layers if layer not in norms]
    if missing:
        raise UserError(f"--hook {hook}: the target's norms of layers {missing} are not known; expected one per layer.")
    mine = [norms[layer] for layer in dictionary.layers]
    for norm in mine:
        if norm.gamma.shape != (dictionary.d_in,) or norm.beta.shape != (dictionary.d_in,):
            raise UserError(
                f"--hook {hook}: the target's norm has width {norm.gamma.shape[0]}, but {dictionary.name} reads "
                f"{dictionary.d_in}. Give the model that it was trained on."
            )
    moved = folds.before_gain(dictionary, [norm.gamma for norm in mine], [norm.beta for norm in mine])
    return moved._replace(reads=tuple(f"blocks.{layer}.{hook}" for layer in dictionary.layers))


class _Named(NamedTuple):
    """Where a family of models keeps the norm before its MLPs."""

    prefix: str
    """Of the tensor names."""
    offset: float = 0.0
    """What is added to the stored gain."""


_NORMS = {
    "gpt2": _Named("h.LAYER.ln_2"),
    "gpt_neo": _Named("h.LAYER.ln_2"),
    "gpt_neox": _Named("layers.LAYER.post_attention_layernorm"),
    "llama": _Named("layers.LAYER.post_attention_layernorm"),
    "mistral": _Named("layers.LAYER.post_attention_layernorm"),
    "qwen2": _Named("layers.LAYER.post_attention_layernorm"),
    "qwen3": _Named("layers.LAYER.post_attention_layernorm"),
    "gemma": _Named("layers.LAYER.post_attention_layernorm", 1.0),
    "gemma2": _Named("layers.LAYER.pre_feedforward_layernorm", 1.0),
    "gemma3_text": _Named("layers.LAYER.pre_feedforward_layernorm", 1.0),
}
"""By `model_type` of config.json. Gemma stores its gains less 1."""


def norms_of(model: Path) -> dict[int, Norm]:
    """The norms before the MLPs of a model in a Hugging Face directory with safetensors, by layer.

    Raises UserError for a directory that is none, for a family that is not known here, and where no norm is found.
    """
    try:
        kind = json.loads((model / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"{model} is no model directory: its config.json cannot be read ({error}).") from error
    if kind not in _NORMS:
        raise UserError(
            f"{model}: where a {kind!r} model keeps the norm before its MLPs is not known; expected one of "
            f"{', '.join(_NORMS)}. Export without --hook: circuit-tracer reads mlp.hook_in too."
        )
    named = _NORMS[kind]
    pattern = re.compile(rf"(?:.*\.)?{re.escape(named.prefix).replace('LAYER', '([0-9]+)')}\.(weight|bias)")
    found: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    for file in sorted(model.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as handle:
            for match in filter(None, map(pattern.fullmatch, handle.keys())):
                found[match[2]][int(match[1])] = handle.get_tensor(match[0]).double()
    if not found["weight"]:
        raise UserError(
            f"{model}: its safetensors files hold no {named.prefix.replace('LAYER', '0')}.weight. Give the whole model."
        )
    gains = {layer: weight + named.offset for layer, weight in found["weight"].items()}
    return {layer: Norm(gain, found["bias"].get(layer, torch.zeros_like(gain))) for layer, gain in gains.items()}
