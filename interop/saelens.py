"""SAELens: `cfg.json` and `sae_weights.safetensors`, read by `SAE.load_from_disk`.

Encoders are stored [d, M], decoders [M, o]. What we write never asks the reader for anything: no b_dec is subtracted,
nothing normalised. `cfg.json` carries our provenance under `metadata.thresher`. Without `metadata.sae_lens_version` a
reader would apply the rules of before version 6 and lose hook and model names, so it is always written.

Codes by `architecture`, with pre = x W_enc + b_enc: standard and transcoder ReLU(pre); jumprelu* ReLU(pre)·1[pre > θ];
gated as in folds.from_gate; topk the k largest of ReLU(pre), ranked by pre · ‖w_f‖ with
`rescale_acts_by_decoder_norm`, which then also divides what it writes. skip_* add x W_skipᵀ.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.interop import folds
from thresher.interop.canonical import Canonical, Source, firing_of
from thresher.interop.formats import Exported, Foreign, Format, Reading
from thresher.interop.hooks import hook_name
from thresher.interop.tensors import Stored, read_json
from thresher.train.files import publish_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.18.0"
"""The SAELens whose rules the files follow."""
_FIRST = {"jumprelu_skip_transcoder": "6.54.12"}
"""By architecture that VERSION cannot load: the first SAELens that is known to. The rules are the same."""
_ARCHITECTURES = (
    "standard", "jumprelu", "gated", "topk", "transcoder", "jumprelu_transcoder", "skip_transcoder",
    "jumprelu_skip_transcoder",
)  # fmt: skip


def refuse(dictionaries: Sequence[Canonical]) -> str | None:
    """Why SAELens has no form for them."""
    for each in dictionaries:
        if each.kind == "clt":
            return (
                "SAELens reads a cross-layer transcoder only layer by layer and without its thresholds. Use --to "
                "circuit-tracer."
            )
        if each.firing == "groupmax":
            return "SAELens has no groupmax. Use --to sparsify, or --thresholds for a calibrated threshold."
        if each.kind == "transcoder" and each.firing == "topk":
            return "SAELens has no TopK transcoder. Add --thresholds for a calibrated threshold, or use --to sparsify."
    return None


def architecture(dictionary: Canonical) -> str:
    """SAELens's name for what it is."""
    if dictionary.kind == "sae":
        return {"relu": "standard", "threshold": "jumprelu", "topk": "topk"}[dictionary.firing]
    skip = "skip_" if dictionary.W_skip is not None else ""
    return f"{'jumprelu_' if dictionary.firing == 'threshold' else ''}{skip}transcoder"


def tensors(dictionary: Canonical) -> dict[str, Tensor]:
    """The tensors of the weights file, float32."""
    [part], [b_dec] = dictionary.sources, dictionary.b_dec
    out = {"W_enc": part.W_enc.T, "b_enc": part.b_enc, "W_dec": part.W_dec[:, 0], "b_dec": b_dec}
    if dictionary.firing == "threshold":
        assert part.threshold is not None, "it fires by one"
        out["threshold"] = part.threshold
    if dictionary.W_skip is not None:
        out["W_skip"] = dictionary.W_skip[0]
    return {name: tensor.to(torch.float32) for name, tensor in out.items()}


def config(item: Exported) -> dict[str, Any]:
    """cfg.json."""
    dictionary, facts = item
    data, kind = facts["data"], architecture(dictionary)
    return {
        "architecture": kind,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_latents,
        **({"d_out": dictionary.d_out} if dictionary.kind == "transcoder" else {}),
        **({"k": dictionary.k, "rescale_acts_by_decoder_norm": False} if dictionary.firing == "topk" else {}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _FIRST.get(kind, VERSION),
            "sae_lens_training_version": None,
            "model_name": facts["target"]["model"],
            "hook_name": hook_name(dictionary.reads[0]),
            **({"hook_name_out": hook_name(dictionary.writes[0])} if dictionary.kind == "transcoder" else {}),
            "hook_head_index": None,
            "context_size": data["context"],
            "prepend_bos": data["bos"],
            "dataset_path": data["source"],
            "thresher": dict(facts),
        },
    }


def write(folder: Path, items: Sequence[Exported]) -> None:
    """One dictionary."""
    [item] = items
    publish_tensors(folder / WEIGHTS, tensors(item.dictionary))
    (folder / CONFIG).write_text(json.dumps(config(item), indent=2) + "\n")


class _Files:
    """One dictionary as it is stored."""

    def __init__(self, architecture: str, raw: Mapping[str, Any], stored: Stored, hooks: tuple[str, str]) -> None:
        self.architecture, self.hooks = architecture, hooks
        wanted = ("d_in", "d_sae", *(("k",) if architecture == "topk" else ()))
        missing = [name for name in wanted if raw.get(name) is None]
        if missing:
            raise UserError(
                f"{stored.path.parent / CONFIG} says nothing of {' and '.join(missing)}, which a {architecture} "
                "dictionary needs. Restore the file, or add what is missing."
            )
        d, m = int(raw["d_in"]), int(raw["d_sae"])
        o = int(raw.get("d_out") or d) if architecture.endswith("transcoder") else d
        self.k = int(raw["k"]) if architecture == "topk" else None
        self.rescaled = bool(raw.get("rescale_acts_by_decoder_norm", False)) and architecture == "topk"
        self.W_enc, self.W_dec = stored.take("W_enc", d, m).T, stored.take("W_dec", m, o)
        self.b_dec = stored.take("b_dec", o)
        self.gate = None
        if architecture == "gated":
            self.gate = (stored.take("b_gate", m), stored.take("r_mag", m), stored.take("b_mag", m))
            self.b_enc = torch.zeros(m, dtype=torch.float64)
        else:
            self.b_enc = stored.take("b_enc", m)
        jumps = architecture.startswith("jumprelu")
        self.threshold = stored.take("threshold", m) if jumps else torch.zeros(m, dtype=torch.float64)
        self.W_skip = stored.take("W_skip", o, d) if "skip_" in architecture else None
        _check_unscaled(stored, m)
        stored.done()

    def reading(self, label: str, subtracts: bool) -> Reading:
        """With b_dec taken off the input or not."""
        W_enc, b_enc, threshold = self.W_enc, self.b_enc, self.threshold.clamp_min(0.0)
        if self.gate is not None:
            b_gate, r_mag, b_mag = self.gate
            W_enc, b_enc, threshold = folds.from_gate(self.W_enc, b_gate, r_mag, b_mag)
        counted = self.k is not None
        part = Source(W_enc, b_enc, None if counted else threshold, self.W_dec[:, None])
        if subtracts:  # of a gated one too: gate and magnitude move together, so θ stays
            part = part._replace(b_enc=part.b_enc - part.W_enc @ self.b_dec)
        if self.rescaled:
            part = folds.scaled_codes(part, self.W_dec.norm(dim=1))
        dictionary = Canonical(
            name="",
            kind="transcoder" if self.architecture.endswith("transcoder") else "sae",
            reads=(self.hooks[0],),
            writes=(self.hooks[1],),
            layers=(0,),
            firing="topk" if counted else firing_of([threshold]),
            k=self.k,
            sources=(part,),
            b_dec=(self.b_dec,),
            W_skip=None if self.W_skip is None else (self.W_skip,),
        )
        return Reading(label, dictionary, lambda xs: self.forward(xs[0].double(), subtracts))

    def forward(self, x_ND: Tensor, subtracts: bool) -> tuple[list[Tensor], list[Tensor]]:
        """SAELens's own equations, on the tensors as they are stored."""
        a_NF = (x_ND - self.b_dec if subtracts else x_ND) @ self.W_enc.T
        norms_F = self.W_dec.norm(dim=1) if self.rescaled else torch.ones_like(self.threshold)
        if self.gate is not None:
            b_gate, r_mag, b_mag = self.gate
            z_NF = torch.relu(a_NF * r_mag.exp() + b_mag) * (a_NF + b_gate > 0)
        elif self.k is not None:
            pre_NF = (a_NF + self.b_enc) * norms_F
            best = pre_NF.topk(self.k, dim=1)
            z_NF = torch.zeros_like(pre_NF).scatter(1, best.indices, best.values.relu())
        else:
            pre_NF = a_NF + self.b_enc
            z_NF = torch.relu(pre_NF) * (pre_NF > self.threshold)
        y_NE = z_NF / torch.where(norms_F > 0, norms_F, 1.0) @ self.W_dec + self.b_dec
        return [z_NF], [y_NE if self.W_skip is None else y_NE + x_ND @ self.W_skip.T]


def _check_unscaled(stored: Stored, m: int) -> None:
    """Releases before version 6 wrote a `scaling_factor` of ones; one that was fine-tuned is refused."""
    if "scaling_factor" in stored and not bool((stored.take("scaling_factor", m) == 1).all()):
        raise UserError(
            f"{stored.path}: scaling_factor is not 1 everywhere: codes were rescaled after training, which versions "
            "from 6 on do not apply. It cannot be imported."
        )


def read(path: Path) -> list[Foreign]:
    """The dictionary of a directory, under what its cfg.json says.

    Raises UserError for a normalisation that is no linear map or whose factor is not in the files, for architectures
    that are no inference form, and for tensors that do not fit.
    """
    raw = _as_of_6(read_json(path / CONFIG, "a SAELens directory"))
    stored = Stored.safetensors(path / WEIGHTS)
    kind = str(raw.get("architecture", "standard"))
    if kind not in _ARCHITECTURES:
        raise UserError(
            f"{path / CONFIG}: architecture is {kind!r}; expected one of {', '.join(_ARCHITECTURES)}. Training-only "
            "architectures (batchtopk, matryoshka_batchtopk) are saved by SAELens in their inference form."
        )
    if raw.get("normalize_activations", "none") not in ("none", None, "expected_average_only_in"):
        raise UserError(
            f"{path / CONFIG}: normalize_activations is {raw['normalize_activations']!r}, which rescales every token "
            "by itself and folds into no weights. It cannot be imported."
        )
    metadata = raw.get("metadata") or {}
    names = [name for name in (metadata.get("hook_name") or raw.get("hook_name"),) if name]
    out = metadata.get("hook_name_out") or raw.get("hook_name_out")
    transcoder = kind.endswith("transcoder")
    hooks = (str(names[0]) if names else "", str(out or "") if transcoder else str(names[0]) if names else "")
    subtracts = bool(raw.get("apply_b_dec_to_input", not transcoder))
    as_stored = _Files(kind, raw, stored, hooks)
    readings = [as_stored.reading("as its config says", subtracts)]
    if not transcoder:
        other = "b_dec not subtracted" if subtracts else "b_dec subtracted from the input"
        readings.append(as_stored.reading(other, not subtracts))
    return [
        Foreign(
            tuple(readings),
            firing=kind.removesuffix("_transcoder").removesuffix("skip").strip("_") or "relu",
            k=None if raw.get("k") is None else float(raw["k"]),
            facts={
                "tool": "SAELens",
                "version": metadata.get("sae_lens_version"),
                "architecture": kind,
                "model": metadata.get("model_name") or raw.get("model_name"),
                "hook_name": hooks[0],
            },
            scale_unknown=raw.get("normalize_activations") == "expected_average_only_in",
        )
    ]


def _as_of_6(raw: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json in the terms of version 6 and later. Releases before it had hook and model at the top level, TopK as an
    activation function of a standard SAE, and normalisation as yes or no."""
    out = dict(raw)
    if out.get("activation_fn_str", out.get("activation_fn")) == "topk":
        out |= {"architecture": "topk", **(out.get("activation_fn_kwargs") or {})}
    if isinstance(out.get("normalize_activations"), bool):
        out["normalize_activations"] = "expected_average_only_in" if out["normalize_activations"] else "none"
    if "hook_point" in out:
        out.setdefault("hook_name", out["hook_point"])
    return out


FORMAT = Format("saelens", "SAELens: cfg.json and sae_weights.safetensors", refuse=refuse, write=write, read=read)
