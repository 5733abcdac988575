"""Gemma Scope's files as they are stored, and what their paths and the JSON beside them say.

npz.py has the layouts and what they mean.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.interop.tensors import Stored, read_json

WEIGHTS, FACTS = "params.npz", "thresher.json"
_LAYER = re.compile(r"layer_(\d+)")
_L0 = re.compile(r"average_l0_(\d+)")
_KINDS = ("transcoder", "clt", "embedding")
_OUTPUTS = {"resid_post": "hook_resid_post", "attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
"""Hook within the block that an SAE reads, by the part of the path that says so; hook_z is read flattened."""
_SCOPES = {"-res": "hook_resid_post", "-att": "attn.hook_z", "-mlp": "hook_mlp_out"}
"""The same by the end of the repository's name."""
_POINTS = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""Hook within the block of a config.json's `model.layers.N.…`."""


class Said(NamedTuple):
    """What a path and what lies beside a file say of it."""

    layer: int | None
    what: str
    """`sae`, or one of `transcoder`, `clt`, `embedding`."""
    hook: str
    """Hook within the block that an SAE reads."""
    facts: Mapping[str, Any]

    def sites(self, layer: int) -> tuple[str, str]:
        """Names of the sites read and written."""
        named = self.facts.get("sites")
        if named is not None:
            return str(named[0]), str(named[1])
        if self.what == "embedding":
            return "hook_embed", "hook_embed"
        if self.what == "sae":
            return f"blocks.{layer}.{self.hook}", f"blocks.{layer}.{self.hook}"
        reads = "mlp.hook_in" if self.facts["version"] == 2 else "ln2.hook_normalized"
        return f"blocks.{layer}.{reads}", f"blocks.{layer}.hook_mlp_out"


class Layer(NamedTuple):
    """One file's tensors, as they are stored."""

    W_enc: Tensor
    """[F, D]."""
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    """[F, E], or [F, L, E] of a cross-layer transcoder."""
    b_dec: Tensor
    affine: Tensor | None
    """[D, E]."""


def said_by(file: Path) -> Said:
    """What the path of a file and the JSON beside it say."""
    parts = file.resolve().parts
    path = "/".join(parts[-7:])
    version = 2 if file.suffix == ".safetensors" else 1
    layer, l0 = _LAYER.findall(path), _L0.findall(path)
    facts: dict[str, Any] = {
        "tool": "Gemma Scope",
        "version": version,
        "architecture": "jumprelu",
        "model": None,
        "average_l0": int(l0[-1]) if l0 else None,
    }
    what = next((kind for kind in _KINDS if kind in path), "sae")
    named = [hook for name, hook in _OUTPUTS.items() if name in path]
    scoped = [hook for end, hook in _SCOPES.items() if any(end in part and "scope" in part for part in parts[-7:])]
    hook = (named or scoped or ["hook_resid_post"])[0]
    if (file.parent / FACTS).is_file():
        ours = read_json(file.parent / FACTS, "a directory with provenance")
        sites = (ours["dictionary"]["reads"][0], ours["dictionary"]["writes"][0])
        facts |= {"tool": "thresher", "version": ours["thresher_version"], "sites": sites}
        facts["model"] = ours["target"]["model"]
        what = "sae" if sites[0] == sites[1] else "transcoder"
    elif (file.parent / "config.json").is_file():
        config = read_json(file.parent / "config.json", "a directory of Gemma Scope 2")
        points = [config.get("hf_hook_point_in"), config.get("hf_hook_point_out") or config.get("hf_hook_point_in")]
        facts["model"] = config.get("model_name")
        if all(points):
            facts["sites"] = tuple(_hook_of_point(str(point)) for point in points)
    return Said(int(layer[-1]) if layer else None, what, hook, facts)


def _hook_of_point(point: str) -> str:
    """The hook name of `model.layers.12.output`; the point itself where it is none that we know."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", point)
    return f"blocks.{found[1]}.{_POINTS[found[2]]}" if found and found[2] in _POINTS else point


def load(file: Path) -> Layer:
    """The tensors of a .npz or .safetensors. Raises UserError where they do not fit or codes are rescaled."""
    stored = Stored.npz(file) if file.suffix == ".npz" else Stored.safetensors(file)
    stored.tensors = {name.lower(): tensor for name, tensor in stored.tensors.items()}
    scale = stored.take("scaling_factor", None) if "scaling_factor" in stored else torch.ones(1)
    if not bool((scale == 1).all()):
        raise UserError(
            f"{file}: scaling_factor is not 1 everywhere: codes were rescaled after training, and nothing says where "
            "and how. It cannot be imported."
        )
    W_enc = stored.take("w_enc", None, None).T
    m, d = W_enc.shape
    crossing = "w_dec" in stored and stored.tensors["w_dec"].ndim == 3
    W_dec = stored.take("w_dec", m, None, None) if crossing else stored.take("w_dec", m, None)
    o = W_dec.shape[-1]
    loaded = Layer(
        W_enc,
        stored.take("b_enc", m),
        stored.take("threshold", m),
        W_dec,
        stored.take("b_dec", o),
        stored.take("affine_skip_connection", d, o) if "affine_skip_connection" in stored else None,
    )
    stored.done()
    return loaded
