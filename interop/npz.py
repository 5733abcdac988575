"""Plain arrays in canonical form: `params.npz` of Gemma Scope, and the safetensors of Gemma Scope 2.

    W_enc [d, M]   b_enc [M]   W_dec [M, o]   b_dec [o]   threshold [M]
    affine_skip_connection [d, o], applied x @ A

JumpReLU on raw activations: nothing to fold. Names are taken in any case (`w_enc`). A cross-layer transcoder is a file
per layer with W_dec [M, L, o], slot t writing layer t; slots before the file's own layer mean nothing.

The files name no sites. What a path says (`layer_12`, `embedding`, `transcoder`, `attn_out`, `average_l0_71`) or a
config.json beside it (`hf_hook_point_in`) is a guess that --reads and --writes replace. Embedding SAEs were trained on
rows that the model multiplies by √d before it uses them: W_enc/√d and W_dec·√d, and b_dec as it is, as SAELens reads
them, or times √d too.

We write `params.npz` and, since arrays hold no text, `thresher.json` with our provenance beside it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.interop import folds
from thresher.interop.canonical import Canonical, Kind, Source, firing_of
from thresher.interop.formats import Exported, Foreign, Format, Reading
from thresher.interop.tensors import Stored, read_json

WEIGHTS, FACTS = "params.npz", "thresher.json"
_SUFFIXES = (".npz", ".safetensors")
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


def refuse(dictionaries: Sequence[Canonical]) -> str | None:
    """Why Gemma Scope's file has no form for them."""
    for each in dictionaries:
        if each.kind == "clt":
            return "params.npz holds one layer. Use --to circuit-tracer."
        if each.firing in ("topk", "groupmax"):
            return "params.npz holds thresholds alone. Add --thresholds for calibrated ones."
        if each.W_skip is not None:
            return "params.npz has no skip connection. Use --to saelens or --to circuit-tracer."
        if each.d_in != each.d_out:
            return "readers of params.npz take one width for what is read and written. Use --to saelens."
    return None


def arrays(dictionary: Canonical) -> dict[str, np.ndarray]:
    """The arrays of params.npz, float32."""
    [part], [b_dec] = dictionary.sources, dictionary.b_dec
    assert part.threshold is not None, "others were refused"
    out = {
        "W_enc": part.W_enc.T,
        "W_dec": part.W_dec[:, 0],
        "b_enc": part.b_enc,
        "b_dec": b_dec,
        "threshold": part.threshold,
    }
    return {name: tensor.to(torch.float32).contiguous().numpy() for name, tensor in out.items()}


def write(folder: Path, items: Sequence[Exported]) -> None:
    """One dictionary."""
    [item] = items
    np.savez(folder / WEIGHTS, **arrays(item.dictionary))  # type: ignore[arg-type]  # its other keyword is a bool
    (folder / FACTS).write_text(json.dumps(dict(item.facts), indent=2) + "\n")


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


class _Layer(NamedTuple):
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


def read(path: Path) -> list[Foreign]:
    """The dictionaries of a file, or of all files below a directory; files with W_dec by layer make one of them all.

    Raises UserError where two belong to one layer, and for tensors that do not fit.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .npz and no .safetensors. Give the directory that params.npz is in.")
    found = [(file, said_by(file), _load(file)) for file in files]
    layers = [said.layer for _, said, _ in found]
    twice = next((layer for layer in layers if len(layers) > 1 and (layer is None or layers.count(layer) > 1)), -1)
    if twice != -1:
        files_of = [str(file) for file, said, _ in found if said.layer == twice]
        what = "of no layer that its path would say (layer_N)" if twice is None else f"of layer {twice}"
        raise UserError(f"{path} holds dictionaries {what}: {', '.join(files_of[:4])}. Give one of them.")
    found.sort(key=lambda each: each[1].layer or 0)
    by_layer = [loaded.W_dec.ndim == 3 for _, _, loaded in found]
    if any(by_layer):
        if not all(by_layer):
            raise UserError(f"{path} holds both files with W_dec by layer and without. Give the directory of one kind.")
        kinds = [said._replace(what="clt", facts=_unnamed(said)) for _, said, _ in found]
        return [_crosslayer(path, kinds, [loaded for _, _, loaded in found])]
    return [_single(said, loaded) for _, said, loaded in found]


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


def _load(file: Path) -> _Layer:
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
    loaded = _Layer(
        W_enc,
        stored.take("b_enc", m),
        stored.take("threshold", m),
        W_dec,
        stored.take("b_dec", o),
        stored.take("affine_skip_connection", d, o) if "affine_skip_connection" in stored else None,
    )
    stored.done()
    return loaded


def _canonical(
    kind: Kind, layers: Sequence[int], sites: Sequence[tuple[str, str]], each: Sequence[_Layer]
) -> Canonical:
    sources = []
    for index, one in enumerate(each):
        W_dec = one.W_dec[:, index:] if kind == "clt" else one.W_dec[:, None]
        sources.append(Source(one.W_enc, one.b_enc, one.threshold.clamp_min(0.0), W_dec))
    skips = [one.affine.T for one in each if one.affine is not None]
    return Canonical(
        name="",
        kind=kind,
        reads=tuple(reads for reads, _ in sites),
        writes=tuple(writes for _, writes in sites),
        layers=tuple(layers),
        firing=firing_of([part.threshold for part in sources if part.threshold is not None]),
        k=None,
        sources=tuple(sources),
        b_dec=tuple(one.b_dec for one in each),
        W_skip=tuple(skips) or None,
    )


def _codes(one: _Layer, x_ND: Tensor) -> Tensor:
    pre_NF = x_ND @ one.W_enc.T + one.b_enc
    return torch.relu(pre_NF) * (pre_NF > one.threshold)


def _single(said: Said, one: _Layer) -> Foreign:
    """A dictionary of one file. What reads and writes the same width may be a transcoder whose path does not say so."""
    layer = said.layer or 0
    sites = said.sites(layer)
    differs = said.what == "transcoder" or one.affine is not None or one.W_enc.shape[1] != one.W_dec.shape[1]
    if differs and sites[0] == sites[1]:
        sites = said._replace(what="transcoder").sites(layer)
    stored = _canonical("transcoder" if differs else "sae", [layer], [sites], [one])

    def forward(xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        x_ND = xs[0].double()
        z_NF = _codes(one, x_ND)
        y_NE = z_NF @ one.W_dec + one.b_dec
        return [z_NF], [y_NE if one.affine is None else y_NE + x_ND @ one.affine]

    readings = [Reading("as it is stored", stored, forward)]
    if not differs:
        embedding = [_of_embedding(one, stored, scaled) for scaled in (False, True)]
        readings = [*embedding, *readings] if said.what == "embedding" else [*readings, *embedding]
    guessed = "sites" not in said.facts
    return Foreign(tuple(readings), firing="jumprelu", k=None, facts=_unnamed(said), sites_guessed=guessed)


def _unnamed(said: Said) -> dict[str, Any]:
    """The facts without the sites: a config.json beside all layers names those of one."""
    return {name: value for name, value in said.facts.items() if name != "sites"}


def _of_embedding(one: _Layer, stored: Canonical, scaled: bool) -> Reading:
    """Of an SAE trained on embeddings that the model multiplies by √d before anyone sees them."""
    root = torch.tensor(float(one.W_enc.shape[1])).double().sqrt()
    zero = torch.zeros((), dtype=torch.float64)
    folded = folds.standardised_output(folds.standardised_input(stored, [zero], [root]), [zero], [root])
    if not scaled:
        folded = folded._replace(b_dec=stored.b_dec)

    def forward(xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        z_NF = _codes(one, xs[0].double() / root)
        return [z_NF], [z_NF @ one.W_dec * root + one.b_dec * (root if scaled else 1.0)]

    return Reading("embedding, b_dec times √d too" if scaled else "embedding, weights times √d", folded, forward)


def _crosslayer(path: Path, said: Sequence[Said], each: Sequence[_Layer]) -> Foreign:
    """The cross-layer transcoder of all files of a directory."""
    count = len(each)
    shapes = {(tuple(one.W_enc.shape), tuple(one.W_dec.shape), one.affine is None) for one in each}
    if [one.layer for one in said] != list(range(count)) or len(shapes) > 1 or each[0].W_dec.shape[1] != count:
        raise UserError(
            f"{path}: {count} files, of layers {', '.join(str(one.layer) for one in said)}, with W_dec for "
            f"{each[0].W_dec.shape[1]} layers; expected one file of equal shapes for every layer from 0. Download "
            "all of them."
        )
    dictionary = _canonical("clt", range(count), [one.sites(layer) for layer, one in enumerate(said)], each)

    def forward(xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        z = [_codes(one, x.double()) for one, x in zip(each, xs, strict=True)]
        ys = []
        for target, one in enumerate(each):
            y_NE = sum((z[s] @ each[s].W_dec[:, target] for s in range(target + 1)), one.b_dec)
            ys.append(y_NE if one.affine is None else y_NE + xs[target].double() @ one.affine)
        return z, ys

    only = Reading("as it is stored", dictionary, forward)
    return Foreign((only,), firing="jumprelu", k=None, facts=said[0].facts)


FORMAT = Format(
    "npz",
    "Gemma Scope: params.npz, and to read the safetensors of Gemma Scope 2",
    refuse=refuse,
    write=write,
    read=read,
)
