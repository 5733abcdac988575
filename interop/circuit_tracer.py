"""circuit-tracer: transcoders of all layers, or one cross-layer transcoder, in a directory with a `config.yaml`.

All weights are float32 with one row per latent, and act on raw activations:

    transcoders   layer_{i}.safetensors   W_enc [M, d], W_dec [M, d], b_enc, b_dec, activation_function.threshold [M],
                                          W_skip [d, d]; no other tensor
    CLT           W_enc_{i}.safetensors   W_enc_{i} [M, d], b_enc_{i}, b_dec_{i}, threshold_{i} [M]
                  W_dec_{i}.safetensors   W_dec_{i} [M, L − i, d]: slot j of source i writes layer i + j

    a_s = pre ⊙ 1[pre > θ]   (no ReLU: a negative θ would let negative codes through; without thresholds ReLU)
    transcoder   y   = a W_dec + b_dec + x W_skipᵀ
    CLT          y_t = Σ_{s ≤ t} a_s W_dec_s[:, t − s] + b_dec_t

`threshold_0` says for all layers of a CLT whether there are thresholds, so they are written for all or for none.
`config.yaml` names the model, the kind and the two hooks inside a block; of further keys the tool takes no notice, so
our provenance stands there, under `thresher`. Latents stay the first dimension of W_dec, whose rows the tool reads by
slices from the file.

What a user of the tool has to know: an absolute path is a directory, a relative one is taken for a name on the hub;
`load_clt` makes bfloat16 of the weights unless told otherwise, and its decoding up to 0.5.0 drops trailing positions
that fire nothing; attribution leaves out position 0. The June-2025 layout has W_dec [d, M], which is told by its shape.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from thresher.interop.canonical import Canonical, Source
from thresher.interop.circuit_tracer_files import CLT, CONFIG, SET, THRESHOLD, read
from thresher.interop.formats import Exported, Format
from thresher.interop.hooks import hook_name, tap_of
from thresher.train.files import publish_tensors

READS = ("mlp.hook_in", "hook_resid_mid", "ln2.hook_normalized")
"""Hooks that its replacement models can read from."""
WRITES = ("hook_mlp_out", "mlp.hook_out")


def refuse(dictionaries: Sequence[Canonical]) -> str | None:
    """Why circuit-tracer has no form for them together."""
    kinds = {each.kind for each in dictionaries}
    if "sae" in kinds:
        return (
            "circuit-tracer puts its dictionaries in the place of MLPs, so it has transcoders and cross-layer "
            "transcoders, and no SAEs. Use --to saelens."
        )
    if "clt" in kinds and len(dictionaries) > 1:
        return "a directory of circuit-tracer holds one cross-layer transcoder. Export each of them by itself."
    first = dictionaries[0]
    for each in dictionaries:
        if each.firing in ("topk", "groupmax"):
            return f"circuit-tracer has no {each.firing}. Add --thresholds for a calibrated threshold."
        if each.kind == "clt" and each.W_skip is not None:
            return (
                "a skip connection of a cross-layer transcoder is ignored by circuit-tracer 0.5.0 and applied "
                "transposed by newer ones. Train it without skip, or train transcoders, whose skip it reads."
            )
        if each.d_in != each.d_out:
            return (
                f"circuit-tracer wants one width of what is read and written; {each.name} reads {each.d_in} and "
                f"writes {each.d_out}. Use --to saelens."
            )
        if each.n_latents != first.n_latents:
            return (
                f"circuit-tracer wants the same number of latents in every layer; {first.name} has "
                f"{first.n_latents}, {each.name} {each.n_latents}."
            )
    return _layers_reason(dictionaries) or _hooks_reason(dictionaries)


def _layers_reason(dictionaries: Sequence[Canonical]) -> str | None:
    """Why their layers are not 0 to L − 1, each once."""
    layers = [layer for each in dictionaries for layer in each.layers]
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        return f"layers {_listed(twice)} occur more than once. Export the runs of one set: one per layer."
    missing = sorted(set(range(max(layers) + 1)) - set(layers))
    if missing or min(layers) < 0:
        return (
            f"circuit-tracer replaces the MLPs of all layers from 0 on; layers {_listed(missing)} are missing beside "
            f"{_listed(sorted(layers))}. Train them too (dictionary.layers), and give all runs of the set."
        )
    return None


def _hooks_reason(dictionaries: Sequence[Canonical]) -> str | None:
    """Why no pair of hooks says where they act."""
    for side, known, sites in (
        ("read", READS, [site for each in dictionaries for site in each.reads]),
        ("write", WRITES, [site for each in dictionaries for site in each.writes]),
    ):
        hooks = sorted({_inside(site) for site in sites})
        if len(hooks) > 1:
            return f"they {side} at different hooks ({', '.join(hooks)}), and config.yaml has one for all layers."
        if hooks[0] not in known:
            return (
                f"they {side} at {hooks[0]}, where its replacement models have no dictionary; expected one of "
                f"{', '.join(known)}. Train at mlp_in and mlp_out, or use --to saelens."
            )
    return None


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _inside(site: str) -> str:
    """The hook's name inside its block: `mlp.hook_in` of `L05.mlp_in`."""
    return tap_of(hook_name(site))


def config(items: Sequence[Exported]) -> dict[str, Any]:
    """config.yaml, of dictionaries by layer."""
    first = items[0].dictionary
    return {
        "model_name": items[0].facts["target"]["model"],
        "model_kind": CLT if first.kind == "clt" else SET,
        "feature_input_hook": _inside(first.reads[0]),
        "feature_output_hook": _inside(first.writes[0]),
        "thresher": json.loads(json.dumps([dict(item.facts) for item in items])),  # plain values, none of them shared
    }


def layer_tensors(dictionary: Canonical, skip: bool) -> dict[str, Tensor]:
    """The tensors of one layer's transcoder, float32; with `skip` a W_skip, of zeros where it has none."""
    [part], [b_dec] = dictionary.sources, dictionary.b_dec
    out = {"W_enc": part.W_enc, "W_dec": part.W_dec[:, 0], "b_enc": part.b_enc, "b_dec": b_dec}
    if dictionary.firing == "threshold":
        out[THRESHOLD] = _threshold(part)
    if skip:
        [W_skip] = dictionary.W_skip or (torch.zeros(dictionary.d_out, dictionary.d_in, dtype=torch.float64),)
        out["W_skip"] = W_skip
    return {name: tensor.to(torch.float32) for name, tensor in out.items()}


def cross_tensors(dictionary: Canonical, layer: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the two files of one layer of a CLT, float32.

    Destinations that a source does not reach (a decoder with a window) are zeros.
    """
    part, count = dictionary.sources[layer], len(dictionary.sources) - layer
    encoder = {f"W_enc_{layer}": part.W_enc, f"b_enc_{layer}": part.b_enc, f"b_dec_{layer}": dictionary.b_dec[layer]}
    if dictionary.firing == "threshold":
        encoder[f"threshold_{layer}"] = _threshold(part)
    W_dec = part.W_dec.new_zeros(dictionary.n_latents, count, dictionary.d_out)
    W_dec[:, : part.W_dec.shape[1]] = part.W_dec
    every = {name: tensor.to(torch.float32) for name, tensor in encoder.items()}
    return every, {f"W_dec_{layer}": W_dec.to(torch.float32)}


def _threshold(part: Source) -> Tensor:
    assert part.threshold is not None, "it fires by one"
    return part.threshold.clamp_min(0.0)


def write(folder: Path, items: Sequence[Exported]) -> None:
    """The transcoders of all layers, or one CLT."""
    ordered = sorted(items, key=lambda item: item.dictionary.layers[0])
    first = ordered[0].dictionary
    if first.kind == "clt":
        for layer in range(len(first.sources)):
            for stem, tensors in zip(("W_enc", "W_dec"), cross_tensors(first, layer), strict=True):
                publish_tensors(folder / f"{stem}_{layer}.safetensors", tensors)
    else:
        skip = any(item.dictionary.W_skip is not None for item in items)  # layer 0 says for all whether there is one
        for layer, item in enumerate(ordered):
            publish_tensors(folder / f"layer_{layer}.safetensors", layer_tensors(item.dictionary, skip))
    text = yaml.safe_dump(config(ordered), sort_keys=False, allow_unicode=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")


FORMAT = Format(
    "circuit-tracer",
    "circuit-tracer: transcoders of all layers, or a cross-layer transcoder",
    whole=True,
    refuse=refuse,
    write=write,
    read=read,
)
