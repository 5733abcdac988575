"""A LlamaSimpleMLP's directory: config.json, weights under the published names, a tokenizer if there is one.

Published are pickles of a plain state dict; they are read with `weights_only`, so nothing in them is run. Written is
model.safetensors without `lm_head.weight`, which is tied to `wte.weight`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.publish import publish
from thresher.cache.records import from_dict, nearest, to_dict
from thresher.harvest.simple_mlp import ARCHITECTURE, LlamaSimpleMLP, SimpleMLPConfig

TIED = "lm_head.weight"

_VARIANTS = {
    "mlp_bias": False,
    "attn_bias": False,
    "rotary_adjacent_pairs": False,
    "use_grouped_query_attention": True,
    "tie_word_embeddings": True,
    "attention_sinks": False,
}
"""Switches of the published configuration: only so is the model implemented here."""

_WITHOUT_EFFECT = {
    "architecture",
    "model_type",
    "architectures",
    "block_size",
    "rotary_dim",
    "flash_attention",
    "dtype",
}
"""Keys that change nothing: the rotary width is the head's, whatever is configured."""


def read_config(folder: Path) -> SimpleMLPConfig:
    """The sizes in a directory's config.json. Raises UserError for an unknown key and for another variant."""
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    for key, value in _VARIANTS.items():
        if raw.get(key, value) != value:
            raise UserError(
                f"target.model: {key} in {path} is {raw[key]!r}; expected {value!r}, the only {ARCHITECTURE} that is "
                "published and known here. Take another model."
            )
    known = {field.name for field in fields(SimpleMLPConfig)}
    skipped = _WITHOUT_EFFECT | set(_VARIANTS) | {"transformers_version"}
    sizes = {key: value for key, value in raw.items() if key in known or key not in skipped}
    return from_dict(SimpleMLPConfig, sizes, str(path))


def load_simple_mlp(folder: Path, weights: Sequence[Path]) -> LlamaSimpleMLP:
    """The model of a directory's config.json with the tensors of `weights`, in float32 on the CPU.

    Raises UserError for a file that cannot be read and for tensors that are not exactly the model's.
    """
    config = read_config(folder)
    found: dict[str, Tensor] = {}
    for file in weights:
        found |= _read(file)
    with torch.device("meta"):
        model = LlamaSimpleMLP(config)
    where = ", ".join(str(file) for file in weights)
    state = _checked(found, model.state_dict(), where)
    model.load_state_dict({key: value.to(torch.float32) for key, value in state.items()}, assign=True)
    model.lm_head.weight = model.wte.weight
    return model


def save_simple_mlp(model: LlamaSimpleMLP, folder: Path, dtype: torch.dtype) -> None:
    """Write weights, rounded to `dtype`, and then config.json, which makes the directory a model."""
    tensors = {
        key: value.detach().to("cpu", dtype).contiguous() for key, value in model.state_dict().items() if key != TIED
    }
    publish(folder / "model.safetensors", [save(tensors, metadata={"format": "pt"})])
    document = {"architecture": ARCHITECTURE, "model_type": ARCHITECTURE, **to_dict(model.config)}
    publish(folder / "config.json", [json.dumps(document, indent=2).encode()])


def _read(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a file, by key."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files, and pickles that ask for more than tensors, fail in many ways
        raise UserError(_unreadable(file, error)) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = f" with the keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else ""
        raise UserError(
            f"target.model: {file} holds a {type(content).__name__}{keys}; expected a state dict, tensors by name. "
            "Save the model's state_dict() alone."
        )
    return content


def _unreadable(file: Path, error: Exception) -> str:
    return (
        f"target.model: {file} cannot be read as tensors ({type(error).__name__}: "
        f"{' '.join(str(error).split())[:200]}). Expected safetensors, or a pickle of a plain state dict, since "
        "nothing else is unpickled. Copy it again, or save it as .safetensors."
    )


def _checked(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
    """Exactly the wanted tensors; the tied one may be missing and must not differ."""
    strange = [key for key in found if key not in wanted]
    missing = [key for key in wanted if key not in found and key != TIED]
    if strange or missing:
        lines = [f"{key} is none of the model's.{nearest(key, wanted)}" for key in strange[:3]]
        lines += [f"{key} is missing." for key in missing[:3]]
        raise UserError(
            f"target.model: {where} does not hold a {ARCHITECTURE} of its config.json: {' '.join(lines)} Expected "
            f"{len(wanted) - 1} tensors and perhaps {TIED}, got {len(found)}. Check n_layer, and save the plain "
            "state_dict()."
        )
    for key, tensor in found.items():
        if tensor.shape != wanted[key].shape:
            raise UserError(
                f"target.model: {key} in {where} has the shape {list(tensor.shape)}; expected "
                f"{list(wanted[key].shape)} from config.json. Check the sizes there."
            )
    if TIED in found and not torch.equal(found[TIED], found["wte.weight"]):
        raise UserError(
            f"target.model: {TIED} in {where} differs from wte.weight; expected equal or none, since a {ARCHITECTURE} "
            "ties them. Take another model."
        )
    return {**found, TIED: found["wte.weight"]}
