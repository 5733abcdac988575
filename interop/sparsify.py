"""sparsify: `cfg.json` and `sae.safetensors`, read by `SparseCoder.load_from_disk`.

Encoder and decoder are stored [M, d], everything in one dtype, which the first tensor sets for all. With p = b_dec

    z = the k largest of ReLU(W (x − p) + b), or (groupmax) the largest of each of k equal groups of neighbours
    y = z W_dec + p + x W_skipᵀ (raw x)

A transcoder (`transcode`) does not subtract p. It reads the input and writes the output of one module, so d is the
width of both. An SAE with a skip connection is to us a transcoder from its site to itself. There is no ReLU and no
threshold. A directory is named after the module (`layers.10`, `layers.10.mlp`),
and `SparseCoder.load_many` reads a directory of them; so a set is written like that, and one alone into the place
itself.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.interop import folds
from thresher.interop.canonical import Canonical, Firing, Source
from thresher.interop.formats import Exported, Foreign, Format, Reading
from thresher.interop.hooks import Port, hook_name, hook_of, layer_of, port_of
from thresher.interop.tensors import Stored, read_json
from thresher.train.files import publish_tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_ACTIVATIONS: tuple[Firing, ...] = ("topk", "groupmax")
_KNOWN = {
    *("activation", "d_in", "k", "num_latents", "expansion_factor", "skip_connection", "transcode"),
    *("normalize_decoder", "multi_topk", "thresher"),
}
"""Keys of cfg.json that have a meaning here; the last three change training alone, or nothing."""


def refuse(dictionaries: Sequence[Canonical]) -> str | None:
    """Why sparsify has no form for them."""
    for each in dictionaries:
        if each.kind == "clt":
            return "sparsify has no cross-layer transcoder. Use --to circuit-tracer."
        if each.firing not in _ACTIVATIONS:
            return "sparsify has neither ReLU nor thresholds, only topk and groupmax. Use --to saelens."
        if each.d_in != each.d_out:
            return (
                f"sparsify writes what is as wide as what it reads, this writes {each.d_out} from {each.d_in}. Use "
                "--to saelens --thresholds."
            )
        if not _reconstructs(each) and _module(each) is None:
            return (
                "a transcoder of sparsify reads the input and writes the output of one module, this reads "
                f"{hook_name(each.reads[0])} and writes {hook_name(each.writes[0])}. Use --to saelens --thresholds."
            )
    if len(dictionaries) > 1:
        names = [_folder(each) for each in dictionaries]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            return f"two of them would be {twice}, the module that both belong to. Export them one by one."
    return None


def tensors(dictionary: Canonical) -> dict[str, Tensor]:
    """The tensors of the weights file, float32."""
    if _reconstructs(dictionary):
        dictionary = folds.for_subtracting_reader(dictionary)
    [part], [b_dec] = dictionary.sources, dictionary.b_dec
    out = {"encoder.weight": part.W_enc, "encoder.bias": part.b_enc, "W_dec": part.W_dec[:, 0], "b_dec": b_dec}
    if dictionary.W_skip is not None:
        out["W_skip"] = dictionary.W_skip[0]
    return {name: tensor.to(torch.float32) for name, tensor in out.items()}


def config(item: Exported) -> dict[str, Any]:
    """cfg.json; our provenance under `thresher`, which the reader drops."""
    dictionary, facts = item
    norms_F = dictionary.sources[0].W_dec.norm(dim=(1, 2))
    return {
        "activation": dictionary.firing,
        "expansion_factor": max(1, round(dictionary.n_latents / dictionary.d_in)),
        "normalize_decoder": bool(torch.allclose(norms_F, torch.ones_like(norms_F), atol=1e-5)),
        "num_latents": dictionary.n_latents,
        "k": dictionary.k,
        "multi_topk": False,
        "skip_connection": dictionary.W_skip is not None,
        "transcode": not _reconstructs(dictionary),
        "d_in": dictionary.d_in,
        "thresher": dict(facts),
    }


def write(folder: Path, items: Sequence[Exported]) -> None:
    """One dictionary into the folder, several into one each, named after their modules."""
    for item in items:
        place = folder if len(items) == 1 else folder / _folder(item.dictionary)
        place.mkdir(exist_ok=True)
        publish_tensors(place / WEIGHTS, tensors(item.dictionary))
        (place / CONFIG).write_text(json.dumps(config(item), indent=2) + "\n")


def _reconstructs(dictionary: Canonical) -> bool:
    """Whether it is an SAE, with a skip connection or without."""
    return dictionary.reads == dictionary.writes


def _module(transcoder: Canonical) -> str | None:
    """The module whose input a transcoder reads and whose output it writes; None: there is none."""
    reads, writes = port_of(transcoder.reads[0]), port_of(transcoder.writes[0])
    whole = reads is not None and writes is not None and (reads.side, writes.side) == ("input", "output")
    return (
        reads.module if whole and reads is not None and writes is not None and reads.module == writes.module else None
    )


def _folder(dictionary: Canonical) -> str:
    """The module that a directory of it is named after; a hook's name where an SAE's site is no module's output."""
    port = port_of(dictionary.writes[0])
    return port.module if port is not None and port.side == "output" else hook_name(dictionary.writes[0])


class _Files:
    """One dictionary as it is stored."""

    def __init__(self, raw: Mapping[str, Any], stored: Stored) -> None:
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored.tensors.values()})
        if len(dtypes) > 1:
            raise UserError(
                f"{stored.path} holds tensors of {' and '.join(dtypes)}; expected one dtype: sparsify would round all "
                "of them to the first one's. Save it in one dtype."
            )
        d = int(raw["d_in"])
        m = int(raw.get("num_latents") or 0) or d * int(raw.get("expansion_factor", 32))
        self.firing: Firing = "groupmax" if raw.get("activation") == "groupmax" else "topk"
        self.k = int(raw.get("k", 32))
        self.transcode = bool(raw.get("transcode", False))
        self.W_enc, self.b_enc = stored.take("encoder.weight", m, d), stored.take("encoder.bias", m)
        self.W_dec, self.b_dec = stored.take("W_dec", m, d), stored.take("b_dec", d)
        self.W_skip = stored.take("W_skip", d, d) if raw.get("skip_connection", False) else None
        stored.done()
        if self.k > m or (self.firing == "groupmax" and m % self.k):
            wanted = f"a divisor of the {m} latents" if self.firing == "groupmax" else f"at most {m}, all latents"
            raise UserError(f"{stored.path}: k is {self.k} in {CONFIG}; expected {wanted}.")

    def reading(self, reads: str, writes: str) -> Reading:
        """With b_dec folded in."""
        dictionary = Canonical(
            name="",
            kind="transcoder" if self.transcode or self.W_skip is not None else "sae",
            reads=(reads,),
            writes=(writes,),
            layers=(layer_of(reads),),
            firing=self.firing,
            k=self.k,
            sources=(Source(self.W_enc, self.b_enc, None, self.W_dec[:, None]),),
            b_dec=(self.b_dec,),
            W_skip=None if self.W_skip is None else (self.W_skip,),
        )
        if not self.transcode:
            dictionary = folds.subtracted(dictionary, [self.b_dec])
        return Reading("as its config says", dictionary, lambda xs: self._forward(xs[0].double()))

    def _forward(self, x_ND: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """sparsify's own equations, on the tensors as they are stored."""
        a_NF = torch.relu((x_ND if self.transcode else x_ND - self.b_dec) @ self.W_enc.T + self.b_enc)
        if self.firing == "topk":
            values, latents = a_NF.topk(self.k, dim=1)
        else:
            width = a_NF.shape[1] // self.k
            values, inside = a_NF.unflatten(1, (self.k, width)).max(2)
            latents = inside + torch.arange(self.k) * width
        z_NF = torch.zeros_like(a_NF).scatter(1, latents, values)
        y_NE = z_NF @ self.W_dec + self.b_dec
        return [z_NF], [y_NE if self.W_skip is None else y_NE + x_ND @ self.W_skip.T]


def read(path: Path) -> list[Foreign]:
    """The dictionary of a directory, or those of the directories in it.

    Raises UserError for an activation or a setting it does not know and for tensors that do not fit.
    """
    if (path / CONFIG).is_file() or not path.is_dir():
        return [_read(path)]
    inside = sorted(folder for folder in path.iterdir() if (folder / CONFIG).is_file())
    found = [_read(folder) for folder in inside] or [_read(path)]
    return sorted(found, key=lambda each: each.readings[0].dictionary.layers)


def _read(folder: Path) -> Foreign:
    raw = read_json(folder / CONFIG, "a directory of sparsify")
    activation = raw.get("activation", "topk")
    if activation not in _ACTIVATIONS or "d_in" not in raw:
        raise UserError(
            f"{folder / CONFIG}: activation is {activation!r} and d_in {raw.get('d_in')!r}; expected "
            f"{' or '.join(_ACTIVATIONS)} and the width read. It is no directory of sparsify, or of a newer version."
        )
    _check_known(folder, raw)
    files = _Files(raw, Stored.safetensors(folder / WEIGHTS))
    reads, writes = _sites(folder, raw, files.transcode)
    return Foreign(
        (files.reading(reads, writes),),
        firing=files.firing,
        k=float(files.k),
        facts={
            "tool": "sparsify",
            "version": None,
            "architecture": files.firing + (" transcoder" if files.transcode else ""),
            "model": (raw.get("thresher") or {}).get("target", {}).get("model"),
            "hook_name": reads,
        },
    )


def _check_known(folder: Path, raw: Mapping[str, Any]) -> None:
    """Raise UserError for a setting that another version or a fork may compute by.

    Versions before 1.0 had `signed`, by which the k largest magnitudes fire and keep their sign. What is off (false,
    null, 0) is what it was before there was such a key.
    """
    on = {name: value for name, value in raw.items() if name not in _KNOWN and value}
    if on.get("signed"):
        raise UserError(
            f"{folder / CONFIG}: signed is true: the k largest magnitudes fire and codes may be negative, for which "
            "there is no form here. It cannot be imported."
        )
    if on:
        listed = ", ".join(f"{name}: {json.dumps(value)}" for name, value in on.items())
        raise UserError(
            f"{folder / CONFIG} has settings that neither sparsify 1.3.0 nor 1.3.3 knows ({listed}); expected "
            f"{', '.join(sorted(_KNOWN - {'thresher'}))}. If they change nothing that it computes, remove them there."
        )


def _sites(folder: Path, raw: Mapping[str, Any], transcode: bool) -> tuple[str, str]:
    """Sites read and written: ours by their names, others by the module that the directory is named after."""
    ours = (raw.get("thresher") or {}).get("dictionary")
    if ours is not None:
        return str(ours["reads"][0]), str(ours["writes"][0])
    name = folder.resolve().name
    writes = hook_of(Port(name, "output"))
    return (hook_of(Port(name, "input")) if transcode else writes), writes


FORMAT = Format(
    "sparsify",
    "sparsify: cfg.json and sae.safetensors, a set by module",
    whole=True,
    refuse=refuse,
    write=write,
    read=read,
)
