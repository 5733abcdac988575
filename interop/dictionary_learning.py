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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.interop import folds
from thresher.interop.canonical import Canonical, Source, firing_of
from thresher.interop.formats import Exported, Foreign, Format, Reading
from thresher.interop.hooks import hook_name, tap_of
from thresher.interop.tensors import Stored, read_json, save_pickled

CONFIG, WEIGHTS = "config.json", "ae.pt"
UNCALIBRATED = -1.0
"""What `threshold` is until it is calibrated."""
_B_DEC = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
    "AutoEncoderTopK": "b_dec",
    "BatchTopKSAE": "b_dec",
    "MatryoshkaBatchTopKSAE": "b_dec",
    "JumpReluAutoEncoder": "b_dec",
}
"""Name of the decoder's bias by class."""
_PLAIN = ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")
"""Classes with W_enc [d, M] and W_dec [M, d]; the others hold nn.Linear."""
_KEEPS_INPUT = ("AutoEncoderNew", "JumpReluAutoEncoder")
"""Classes that do not subtract b_dec."""
_ONE_THRESHOLD = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")
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
    dictionary = item.dictionary if kind in _KEEPS_INPUT else folds.for_subtracting_reader(item.dictionary)
    [part], [b_dec] = dictionary.sources, dictionary.b_dec
    W_dec_FE = part.W_dec[:, 0]
    if kind in _PLAIN:
        assert part.threshold is not None, "as the class was chosen"
        out = {
            "W_enc": part.W_enc.T,
            "b_enc": part.b_enc,
            "W_dec": W_dec_FE,
            "b_dec": b_dec,
            "threshold": part.threshold,
        }
        return {name: tensor.to(torch.float32) for name, tensor in out.items()}
    out = {"encoder.weight": part.W_enc, "decoder.weight": W_dec_FE.T, _B_DEC[kind]: b_dec}
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


class _Files:
    """One SAE as it is stored."""

    def __init__(self, kind: str, trainer: Mapping[str, Any], stored: Stored) -> None:
        self.kind = kind
        m, d = trainer.get("dict_size"), trainer.get("activation_dim")
        if kind in _PLAIN:
            self.W_enc = stored.take("W_enc", d, m).T
            m, d = self.W_enc.shape
            self.W_dec = stored.take("W_dec", m, d)
        else:
            self.W_enc = stored.take("encoder.weight", m, d)
            m, d = self.W_enc.shape
            self.W_dec = stored.take("decoder.weight", d, m).T
        self.b_dec = stored.take(_B_DEC[kind], d)
        self.gate: tuple[Tensor, Tensor, Tensor] | None = None
        if kind == "GatedAutoEncoder":
            self.gate = (stored.take("gate_bias", m), stored.take("r_mag", m), stored.take("mag_bias", m))
        self.b_enc = (
            torch.zeros(m).double() if self.gate else stored.take("b_enc" if kind in _PLAIN else "encoder.bias", m)
        )
        self.k = _stored_k(trainer, stored)
        self.threshold = torch.zeros(m, dtype=torch.float64)
        if kind == "JumpReluAutoEncoder":
            self.threshold = stored.take("threshold", m)
        elif kind in _ONE_THRESHOLD or "threshold" in stored:
            self.threshold = stored.take("threshold").expand(m)
        if kind == "MatryoshkaBatchTopKSAE":
            stored.take("group_sizes", None)
        stored.done()
        norms_F = self.W_dec.norm(dim=1)
        self.rescales = kind == "AutoEncoder" and not torch.allclose(norms_F, torch.ones_like(norms_F))

    @property
    def uncalibrated(self) -> bool:
        """Whether its one threshold is still what it was made with."""
        return self.kind in _ONE_THRESHOLD and bool(self.threshold[0] < 0)

    def readings(self, hook: str, layer: int) -> tuple[Reading, ...]:
        """What the class does, then what it leaves open."""
        subtracts, counts = self.kind not in _KEEPS_INPUT, self.kind == "AutoEncoderTopK"
        said = "as its class says"
        if self.uncalibrated:
            said = "dense ReLU, the threshold was never calibrated"
        choices = [(said, subtracts, counts)]
        if self.kind == "JumpReluAutoEncoder":
            choices.append(("b_dec subtracted from the input", True, False))
        if counts and bool(self.threshold[0] >= 0):
            choices.append(("by its threshold", True, False))
        if self.uncalibrated and self.k is not None:
            choices.append(("the k largest of each token", True, True))
        return tuple(self._reading(hook, layer, *choice) for choice in choices)

    def _reading(self, hook: str, layer: int, label: str, subtracts: bool, counts: bool) -> Reading:
        W_enc, b_enc, threshold = self.W_enc, self.b_enc, self.threshold.clamp_min(0.0)
        if self.gate is not None:
            b_gate, r_mag, b_mag = self.gate
            W_enc, b_enc, threshold = folds.from_gate(self.W_enc, b_gate, r_mag, b_mag)
        dictionary = Canonical(
            name="",
            kind="sae",
            reads=(hook,),
            writes=(hook,),
            layers=(layer,),
            firing="topk" if counts else firing_of([threshold]),
            k=self.k if counts else None,
            sources=(Source(W_enc, b_enc, None if counts else threshold, self.W_dec[:, None]),),
            b_dec=(self.b_dec,),
        )
        if subtracts:  # of a gated one too: gate and magnitude move together, so θ stays
            dictionary = folds.subtracted(dictionary, [self.b_dec])
        if self.rescales:
            dictionary = folds.unit_rows(dictionary)
        return Reading(label, dictionary, lambda xs: self._forward(xs[0].double(), subtracts, counts))

    def _forward(self, x_ND: Tensor, subtracts: bool, counts: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The classes' own equations, on the tensors as they are stored."""
        a_NF = (x_ND - self.b_dec if subtracts else x_ND) @ self.W_enc.T
        if self.gate is not None:
            b_gate, r_mag, b_mag = self.gate
            z_NF = torch.relu(r_mag.exp() * a_NF + b_mag) * (a_NF + b_gate > 0)
        elif counts:
            assert self.k is not None, "whoever counts knows how many"
            best = torch.relu(a_NF + self.b_enc).topk(self.k, dim=1)
            z_NF = torch.zeros_like(a_NF).scatter(1, best.indices, best.values)
        else:
            z_NF = torch.relu(a_NF + self.b_enc) * (a_NF + self.b_enc > self.threshold)
        y_NE = z_NF @ self.W_dec + self.b_dec
        return [z_NF * self.W_dec.norm(dim=1) if self.rescales else z_NF], [y_NE]


def _stored_k(trainer: Mapping[str, Any], stored: Stored) -> int | None:
    """k of both files. Raises UserError where they do not agree: the library would not load that either."""
    said = trainer.get("k")
    found = int(stored.take("k")) if "k" in stored else None
    if said is not None and found is not None and int(said) != found:
        raise UserError(
            f"{stored.path}: k is {found}, but {CONFIG} beside it says {said}; expected the same. The two files are "
            "not of one run."
        )
    return found if found is not None else None if said is None else int(said)


def read(path: Path) -> list[Foreign]:
    """The SAE of a directory `trainer_i`. Raises UserError for classes that it does not know."""
    folder = path.parent if path.is_file() else path
    raw = read_json(folder / CONFIG, "a directory of dictionary_learning")
    trainer = raw.get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or kind not in _B_DEC:
        raise UserError(
            f"{folder / CONFIG}: trainer.dict_class is {kind!r}; expected one of {', '.join(_B_DEC)}. Only "
            "dictionaries that dictionary_learning itself saved are read."
        )
    files = _Files(str(kind), trainer, Stored.pickled(path if path.is_file() else folder / WEIGHTS))
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
