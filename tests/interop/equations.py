"""What each foreign format means, in float64 NumPy: tensors as they are on disk and a row of activations in, code and
reconstruction out. Written from the descriptions of the formats, not from our readers or writers, and held to what the
libraries themselves computed by test_equations.py.

Rows: x [N, D]; of CLTs and layer sets [L, N, D]. Norms are Euclidean, comparisons with thresholds strict.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Tensors = Mapping[str, Array]
Config = Mapping[str, Any]


class Forward(NamedTuple):
    """What a dictionary makes of rows."""

    code: Array
    """[N, M], as its library returns it; [L, N, M] with layers."""
    output: Array
    """[N, E]; [L, N, E] with layers."""


def relu(a: Array) -> Array:
    return np.maximum(a, 0.0)


def above(a: Array, threshold: Array | float) -> Array:
    """JumpReLU."""
    return relu(a) * (a > threshold)


def topk(scores: Array, k: int) -> Array:
    """The k largest of each row, negative ones as 0."""
    last = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    out = np.zeros_like(scores)
    np.put_along_axis(out, last, relu(np.take_along_axis(scores, last, axis=1)), axis=1)
    return out


def groupmax(scores: Array, k: int) -> Array:
    """The largest of each of k equal groups of neighbours, negative ones as 0."""
    grouped = relu(scores).reshape(len(scores), k, -1)
    keep = np.arange(grouped.shape[2]) == grouped.argmax(axis=2)[:, :, None]
    return (grouped * keep).reshape(scores.shape)


def gated(projected: Array, b_gate: Array, b_mag: Array, r_mag: Array) -> Array:
    """A gate and a magnitude that share x W_enc up to e^r."""
    return relu(np.exp(r_mag) * projected + b_mag) * (projected + b_gate > 0)


def norms(rows: Array) -> Array:
    return np.linalg.norm(rows, axis=-1)


def saelens(t: Tensors, config: Config, x: Array) -> Forward:
    """SAELens. A TopK that rescales returns codes multiplied by the norm of their decoder row. Tensors are used in the
    config's dtype, so those of a bfloat16 file must have been rounded to it."""
    kind = config["architecture"]
    read = x - t["b_dec"] if config.get("apply_b_dec_to_input", True) else x
    projected = read @ t["W_enc"]
    scale: Array | float = 1.0
    if kind == "gated":
        code = gated(projected, t["b_gate"], t["b_mag"], t["r_mag"])
    elif kind == "topk":
        scale = norms(t["W_dec"]) if config.get("rescale_acts_by_decoder_norm") else 1.0
        code = topk((projected + t["b_enc"]) * scale, config["k"])
    else:
        code = above(projected + t["b_enc"], t.get("threshold", 0.0))
    output = (code / scale) @ t["W_dec"] + t["b_dec"]
    return Forward(code, output + x @ t["W_skip"].T if "W_skip" in t else output)


def circuit_tracer_layer(t: Tensors, x: Array) -> Forward:
    """One layer of a circuit-tracer set. No ReLU beside a threshold: below a negative one codes are negative."""
    pre = x @ t["W_enc"].T + t["b_enc"]
    threshold = t.get("activation_function.threshold")
    code = relu(pre) if threshold is None else pre * (pre > threshold)
    output = code @ t["W_dec"] + t["b_dec"]
    return Forward(code, output + x @ t["W_skip"].T if "W_skip" in t else output)


def circuit_tracer_clt(t: Tensors, x: Array) -> Forward:
    """A CLT of circuit-tracer: W_dec_s[:, j] writes to layer s + j."""
    layers = len(x)
    codes = []
    for s in range(layers):
        pre = x[s] @ t[f"W_enc_{s}"].T + t[f"b_enc_{s}"]
        codes.append(pre * (pre > t[f"threshold_{s}"]) if "threshold_0" in t else relu(pre))
    outputs = [
        sum(codes[s] @ t[f"W_dec_{s}"][:, target - s] for s in range(target + 1)) + t[f"b_dec_{target}"]
        for target in range(layers)
    ]
    return Forward(np.stack(codes), np.stack(outputs))


def dictionary_learning(t: Tensors, config: Config, x: Array) -> Forward:
    """dictionary_learning, by class. AutoEncoder gets unit decoder rows as it is loaded: its codes are multiplied by
    the norms, its output stays."""
    kind = config["trainer"]["dict_class"]
    if kind == "JumpReluAutoEncoder":
        code = above(x @ t["W_enc"] + t["b_enc"], t["threshold"])
        return Forward(code, code @ t["W_dec"] + t["b_dec"])
    if kind == "MatryoshkaBatchTopKSAE":
        code = above((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"], relu(t["threshold"]))
        return Forward(code, code @ t["W_dec"] + t["b_dec"])
    W_dec = t["decoder.weight"].T
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    b_dec = t[bias.get(kind, "b_dec")]
    projected = (x if kind == "AutoEncoderNew" else x - b_dec) @ t["encoder.weight"].T
    if kind == "GatedAutoEncoder":
        code = gated(projected, t["gate_bias"], t["mag_bias"], t["r_mag"])
        return Forward(code, code @ W_dec + b_dec)
    pre = projected + t["encoder.bias"]
    if kind == "AutoEncoderTopK":
        code = topk(relu(pre), int(t["k"]))
    elif kind == "BatchTopKSAE":
        code = above(pre, relu(t["threshold"]))
    else:
        code = relu(pre)
    output = code @ W_dec + b_dec
    return Forward(code * norms(W_dec) if kind == "AutoEncoder" else code, output)


def sparsify(t: Tensors, config: Config, x: Array) -> Forward:
    """sparsify. A transcoder does not subtract b_dec from what it reads."""
    read = x if config.get("transcode") else x - t["b_dec"]
    choose = groupmax if config["activation"] == "groupmax" else topk
    code = choose(relu(read @ t["encoder.weight"].T + t["encoder.bias"]), config["k"])
    output = code @ t["W_dec"] + t["b_dec"]
    return Forward(code, output + x @ t["W_skip"].T if "W_skip" in t else output)


def gemma_scope(t: Tensors, x: Array) -> Forward:
    """A Gemma Scope params.npz: canonical already."""
    code = above(x @ t["W_enc"] + t["b_enc"], t["threshold"])
    return Forward(code, code @ t["W_dec"] + t["b_dec"])


def gemma_scope_2(t: Tensors, x: Array) -> Forward:
    """A Gemma Scope 2 safetensors file; its skip connection is applied as x @ A."""
    code = above(x @ t["w_enc"] + t["b_enc"], t["threshold"])
    output = code @ t["w_dec"] + t["b_dec"]
    return Forward(code, output + x @ t["affine_skip_connection"] if "affine_skip_connection" in t else output)


def gemma_scope_2_clt(files: Sequence[Tensors], x: Array) -> Forward:
    """A CLT of Gemma Scope 2, a file per source: w_dec [M, L, d] counts all layers; slots before the source are not
    used."""
    codes = [above(rows @ t["w_enc"] + t["b_enc"], t["threshold"]) for t, rows in zip(files, x, strict=True)]
    outputs = [
        sum(codes[s] @ files[s]["w_dec"][:, target] for s in range(target + 1)) + files[target]["b_dec"]
        for target in range(len(files))
    ]
    return Forward(np.stack(codes), np.stack(outputs))


def openmoss(t: Tensors, config: Config, x: Array) -> Forward:
    """OpenMOSS SAEs and transcoders, in raw activations: s = √d / mean norm of a hook scales what is read, what is
    written is divided by it. With sparsity_include_decoder_norm scores are pre · ‖W_D‖; codes are not."""
    s_in = openmoss_scale(t, config, config["hook_point_in"])
    s_out = openmoss_scale(t, config, config["hook_point_out"])
    pre = s_in * x @ t["W_E"] + t["b_E"]
    n = norms(t["W_D"]) if config["sparsity_include_decoder_norm"] else 1.0
    code = _openmoss_code(pre, n, t, config)
    return Forward(code, (code @ t["W_D"] + t.get("b_D", 0.0)) / s_out)


def openmoss_clt(t: Tensors, config: Config, x: Array) -> Forward:
    """OpenMOSS CLTs: W_D.t [t + 1, M, d] are the decoders of all sources that write to layer t."""
    layers = len(x)
    s_in = [openmoss_scale(t, config, hook) for hook in config["hook_points_in"]]
    s_out = [openmoss_scale(t, config, hook) for hook in config["hook_points_out"]]
    codes = []
    for s in range(layers):
        pre = s_in[s] * x[s] @ t["W_E"][s] + t["b_E"][s]
        squares = sum((t[f"W_D.{target}"][s] ** 2).sum(-1) for target in range(s, layers))
        n = np.sqrt(squares) if config["sparsity_include_decoder_norm"] else 1.0
        own = {name: value[s] for name, value in t.items() if name.endswith("log_jumprelu_threshold")}
        codes.append(_openmoss_code(pre, n, own, config))
    outputs = [
        (sum(codes[s] @ t[f"W_D.{target}"][s] for s in range(target + 1)) + t[f"b_D.{target}"]) / s_out[target]
        for target in range(layers)
    ]
    return Forward(np.stack(codes), np.stack(outputs))


def openmoss_scale(t: Tensors, config: Config, hook: str) -> float:
    """s of a hook."""
    if config["norm_activation"] == "inference":
        return 1.0
    return float(np.sqrt(config["d_model"]) / t[f"dataset_average_activation_norm.{hook}"])


def _openmoss_code(pre: Array, n: Array | float, t: Tensors, config: Config) -> Array:
    if config["act_fn"] == "topk":
        return topk(pre * n, config["top_k"]) / n
    if config["act_fn"] == "jumprelu":
        return above(pre * n, np.exp(t["activation_function.log_jumprelu_threshold"])) / n
    return relu(pre)
