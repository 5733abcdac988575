"""dictionary_learning: `ae.pt` and `config.json`, read by `load_dictionary`. SAEs only.

`ae.pt` is a state dict that torch saved, tensors only. By the `dict_class` of config.json, with p = b_dec:

    AutoEncoder               z = ReLU(W (x − p) + b), rows brought to norm 1 as it is loaded: codes times ‖w‖
    AutoEncoderNew            z = ReLU(W x + b)
    GatedAutoEncoder          z = ReLU(e^r ⊙ W(x − p) + b_mag) · 1[W(x − p) + b_gate > 0]
    AutoEncoderTopK           the k largest of ReLU(W (x − p) + b)
    BatchTopKSAE              z = a · 1[a > threshold], a = ReLU(W (x − p) + b), one threshold; so does
    MatryoshkaBatchTopKSAE    in inference
    JumpReluAutoEncoder       z = ReLU(pre) · 1[pre > threshold], pre = W x + b, a threshold per latent

The last two store encoders [d, M] and decoders [M, d], the others hold `nn.Linear`: [M, d] and [d, M]. What nobody
stores: whether JumpReluAutoEncoder subtracts p (by default not), and the factor that activations were divided by in
training. The library multiplies the biases by it before it saves, so that files act on raw activations; whether it did
is tried on real ones. A threshold of −1 was never calibrated, and lets every positive value through.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.interop import folds
from thresher.interop.canonical import Canonical
from thresher.interop.dictionary_learning_files import B_DEC, CONFIG, KEEPS_INPUT, PLAIN, UNCALIBRATED, WEIGHTS, Files
from thresher.interop.formats import Exported, Foreign, Format
from thresher.interop.hooks import hook_name, tap_of
from thresher.interop.tensors import Stored, read_json, save_pickled

_FIRING = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
}
_TRAINER = {
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
}
"""`trainer_class` of what we write: the trainer that makes such a class."""
_SUBMODULE = re.compile(r"([A-Za-z_]+)_layer_(\d+)")


def refuse(dictionaries: Sequence[Canonical]) -> str | None:
    """Why dictionary_learning has no form for them."""
    for each in dictionaries:
        if each.kind == "clt":
            return "dictionary_learning has SAEs only. Use --to circuit-tracer."
        if each.kind == "transcoder":
            route = "sparsify" if each.firing in ("topk", "groupmax") else "saelens or --to circuit-tracer"
            return f"dictionary_learning has SAEs only. Use --to {route}."
        if each.firing == "groupmax":
            return "dictionary_learning has no groupmax. Use --to sparsify, or --thresholds for a calibrated threshold."
    return None


def dict_class(item: Exported) -> str:
    """The class that computes what the dictionary does."""
    dictionary, facts = item
    firing, k = facts["dictionary"]["firing"], facts["dictionary"]["k"]
    if dictionary.firing == "topk":
        return "AutoEncoderTopK"
    if str(firing).removeprefix("imported ") == "gated":
        return "GatedAutoEncoder"
    if dictionary.firing == "relu":
        return "AutoEncoderNew"
    theta = dictionary.sources[0].threshold
    assert theta is not None, "it fires by one"
    one = bool((theta.float() == theta[0].float()).all())
    return "BatchTopKSAE" if one and k is not None else "JumpReluAutoEncoder"


def tensors(item: Exported) -> dict[str, Tensor]:
    """The state dict of that class."""
    kind = dict_class(item)
    dictionary = item.dictionary if kind in KEEPS_INPUT else folds.for_subtracting_reader(item.dictionary)
    [part], [b_dec] = dictionary.sources, dictionary.b_dec
    W_dec_FE = part.W_dec[:, 0]
    if kind in PLAIN:
        assert part.threshold is not None, "as the class was chosen"
        out = {
            "W_enc": part.W_enc.T,
            "b_enc": part.b_enc,
            "W_dec": W_dec_FE,
            "b_dec": b_dec,
            "threshold": part.threshold,
        }
        return {name: tensor.to(torch.float32) for name, tensor in out.items()}
    out = {"encoder.weight": part.W_enc, "decoder.weight": W_dec_FE.T, B_DEC[kind]: b_dec}
    if kind == "GatedAutoEncoder":
        assert part.threshold is not None, "as the class was chosen"
        out |= {
            "r_mag": torch.zeros_like(part.b_enc),
            "gate_bias": part.b_enc - part.threshold,
            "mag_bias": part.b_enc,
        }
    else:
        out["encoder.bias"] = part.b_enc
    found = {name: tensor.to(torch.float32) for name, tensor in out.items()}
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        theta = UNCALIBRATED if part.threshold is None else float(part.threshold[0])
        found |= {"k": torch.tensor(_k(item), dtype=torch.int32), "threshold": torch.tensor(theta)}
    return found


def config(item: Exported) -> dict[str, Any]:
    """config.json; our provenance under `thresher`."""
    dictionary, facts = item
    kind = dict_class(item)
    return {
        "trainer": {
            "dict_class": kind,
            "trainer_class": _TRAINER[kind],
            "activation_dim": dictionary.d_in,
            "dict_size": dictionary.n_latents,
            **({"k": _k(item)} if kind in ("AutoEncoderTopK", "BatchTopKSAE") else {}),
            "layer": dictionary.layers[0],
            "lm_name": facts["target"]["model"],
            "submodule_name": _submodule(dictionary.reads[0], dictionary.layers[0]),
            "normalize_activations": False,
        },
        "buffer": {"ctx_len": facts["data"]["context"]},
        "thresher": dict(facts),
    }


def write(folder: Path, items: Sequence[Exported]) -> None:
    """One SAE."""
    [item] = items
    save_pickled(folder / WEIGHTS, tensors(item))
    (folder / CONFIG).write_text(json.dumps(config(item), indent=2) + "\n")


def _k(item: Exported) -> int:
    """Active latents; of a threshold, whole for a class that no longer counts."""
    k = item.dictionary.k if item.dictionary.k is not None else item.facts["dictionary"]["k"]
    return max(1, round(k))


def _submodule(site: str, layer: int) -> str:
    """`resid_post_layer_8`, which is how the library calls what its examples train on."""
    tap = tap_of(site)
    return f"{tap}_layer_{layer}" if tap.isidentifier() and not tap.startswith("hook_") else hook_name(site)


def _hook(submodule: str) -> str:
    """The hook name of a submodule's; the name itself where it is of no known pattern."""
    found = _SUBMODULE.fullmatch(submodule)
    if found is None:
        return submodule
    site = f"L{int(found[2]):02d}.{found[1]}"
    hook = hook_name(site)
    return hook if hook != site else f"blocks.{found[2]}.hook_{found[1]}"


def read(path: Path) -> list[Foreign]:
    """The SAE of a directory `trainer_i`. Raises UserError for classes that it does not know."""
    folder = path.parent if path.is_file() else path
    raw = read_json(folder / CONFIG, "a directory of dictionary_learning")
    trainer = raw.get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or kind not in B_DEC:
        raise UserError(
            f"{folder / CONFIG}: trainer.dict_class is {kind!r}; expected one of {', '.join(B_DEC)}. Only "
            "dictionaries that dictionary_learning itself saved are read."
        )
    files = Files(str(kind), trainer, Stored.pickled(path if path.is_file() else folder / WEIGHTS))
    if kind == "AutoEncoderTopK" and files.k is None:
        raise UserError(f"{folder / CONFIG}: trainer.k is missing; expected the active latents per token.")
    submodule, layer = str(trainer.get("submodule_name") or ""), trainer.get("layer")
    normalised = next((t["normalize_activations"] for t in (trainer, raw) if "normalize_activations" in t), None)
    return [
        Foreign(
            files.readings(_hook(submodule), int(layer) if layer is not None else 0),
            firing="uncalibrated batchtopk" if files.uncalibrated else _FIRING[str(kind)],
            k=None if files.k is None else float(files.k),
            facts={
                "tool": "dictionary_learning",
                "version": None,
                "architecture": kind,
                "trainer": trainer.get("trainer_class"),
                "model": trainer.get("lm_name"),
                "hook_name": submodule,
                "layer": layer,
            },
            scale_unknown=normalised not in (False, "none"),
        )
    ]


FORMAT = Format(
    "dictionary-learning", "dictionary_learning: ae.pt and config.json", refuse=refuse, write=write, read=read
)
