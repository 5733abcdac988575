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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.interop import folds
from thresher.interop.canonical import Canonical, Kind, Source, firing_of
from thresher.interop.formats import Exported, Foreign, Format, Reading
from thresher.interop.npz_files import FACTS, WEIGHTS, Layer, Said, load, said_by

_SUFFIXES = (".npz", ".safetensors")


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


def read(path: Path) -> list[Foreign]:
    """The dictionaries of a file, or of all files below a directory; files with W_dec by layer make one of them all.

    Raises UserError where two belong to one layer, and for tensors that do not fit.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .npz and no .safetensors. Give the directory that params.npz is in.")
    found = [(file, said_by(file), load(file)) for file in files]
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


def _canonical(kind: Kind, layers: Sequence[int], sites: Sequence[tuple[str, str]], each: Sequence[Layer]) -> Canonical:
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


def _codes(one: Layer, x_ND: Tensor) -> Tensor:
    pre_NF = x_ND @ one.W_enc.T + one.b_enc
    return torch.relu(pre_NF) * (pre_NF > one.threshold)


def _single(said: Said, one: Layer) -> Foreign:
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


def _of_embedding(one: Layer, stored: Canonical, scaled: bool) -> Reading:
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


def _crosslayer(path: Path, said: Sequence[Said], each: Sequence[Layer]) -> Foreign:
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
