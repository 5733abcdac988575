"""OpenMOSS (Language-Model-SAEs, llamascopium): `config.json` and `sae_weights.safetensors`. Only read.

    sae   W_E [d, M], b_E [M], W_D [M, d], b_D [d], activation_function.log_jumprelu_threshold [M]
    clt   W_E [L, d, M], b_E [L, M], W_D.{t} [t + 1, M, d] by target, b_D.{t} [d], … threshold [L, M]

and one scalar `dataset_average_activation_norm.{hook}` per hook. With s = √d / norm of a hook where norm_activation is
`dataset-wise`, s = 1 where it is `inference`:

    pre  = (s_in x) W_E + b_E
    gate = pre ⊙ n with sparsity_include_decoder_norm, n_f = ‖W_D,f‖ over all targets, else pre
    z    = pre where gate > exp(log θ), or where gate is among the k largest of its source
    y_t  = (Σ z W_D + b_D) / s_out

Scalars that were never set are memory as it happened to be, so they must be finite and above 0. The tool's own folding
leaves SAE thresholds in the unit of before, and changes the norms that gate a CLT: a file that went through it has a
reading that takes it back. A gate by count is per token here; whatever counts over a batch or over layers is refused.

Older layouts keep `encoder.weight` [M, d] and `decoder.weight` [d, M]. Llama Scope's has `hyperparams.json`, weights in
`checkpoints/`, and one `jump_relu_threshold` for all latents that compares with pre / s_in, so in raw units; that of
the R1-distill dictionaries `config.json` and `log_jumprelu_threshold` per latent.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.interop import folds
from thresher.interop.canonical import Canonical, Source, firing_of
from thresher.interop.formats import Foreign, Format, Reading
from thresher.interop.openmoss_files import NORM, Files, Found, factor, found


class _Meaning(NamedTuple):
    """What is not in the tensors."""

    label: str
    s_in: tuple[float, ...]
    """By source."""
    s_out: tuple[float, ...]
    """By destination."""
    by_norm: bool
    """Whether the gate is pre times the decoder norm."""
    raw: bool
    """Whether the threshold compares with pre / s_in."""
    subtracts: bool
    """Whether b_D comes off the scaled input."""


def read(path: Path) -> list[Foreign]:
    """The dictionary of a directory.

    Raises UserError for kinds that are neither sae nor clt, gated linear encoders, norms per token or batch, selection
    over a batch or over layers, scalars that were never set, and tensors that do not fit.
    """
    there = found(path)
    files, raw = there.files, there.config
    return [
        Foreign(
            tuple(_reading(each, meaning) for each, meaning in _readings(there)),
            firing=files.act,
            k=None if files.k is None else float(files.k),
            facts={
                "tool": "OpenMOSS",
                "version": None,
                "architecture": f"{raw.get('sae_type', 'sae')}, {files.act}",
                "model": raw.get("model_name"),
                "hook_name": files.hooks[0][0],
            },
        )
    ]


def _readings(there: Found) -> list[tuple[Files, _Meaning]]:
    """What the files say, and what they might mean."""
    weights, raw, files, norms, scalar = there
    d = files.parts[0].W_enc.shape[1]
    factors = [
        {hook: factor(norms, hook, side, d) for hook in those}
        for side, those in zip(("in", "out"), files.hooks, strict=True)
    ]
    scaled = raw.get("norm_activation", "dataset-wise") == "dataset-wise"
    unset = [hook for side in factors for hook, s in side.items() if s is None]
    if scaled and unset:
        raise UserError(
            f"{weights}: {NORM} of {', '.join(dict.fromkeys(unset))} is missing, or not finite and above 0: it was "
            "never set, and norm_activation is dataset-wise. Save the dictionary after its training, or with its norms."
        )
    ones = (1.0,) * len(files.parts)
    known = [tuple(side[hook] or 1.0 for hook in those) for side, those in zip(factors, files.hooks, strict=True)]
    by_norm = bool(raw.get("sparsity_include_decoder_norm", not scalar))
    subtracts = bool(raw.get("apply_decoder_bias_to_pre_encoder", False))
    s_in, s_out = known if scaled else (ones, ones)
    first = _Meaning("as its config says", s_in, s_out, by_norm, raw=scalar, subtracts=subtracts)
    out = [(files, first)]
    if scaled:
        out.append((files, first._replace(label="activations not scaled", s_in=ones, s_out=ones)))
    if scalar and scaled:
        out.append((files, first._replace(label="threshold for scaled activations", raw=False)))
    if files.act != "relu" and any(bool(((_row_norms(part) - 1).abs() > 1e-4).any()) for part in files.parts):
        label = "decoder norms not in the gate" if by_norm else "decoder norms in the gate"
        out.append((files, first._replace(label=label, by_norm=not by_norm)))
    if not scaled and files.act != "relu" and not unset:
        before = first._replace(label="its own folding taken back", s_in=known[0], s_out=known[1])
        out.append((_unfolded(files, *known), before))
    return out


def _unfolded(files: Files, s_in: Sequence[float], s_out: Sequence[float]) -> Files:
    """What the tool's own folding was given.

    It divides b_E and a CLT's θ by s_in, b_D by s_out, and W_D by s_out / s_in.
    """

    def back(part: Source, s: int) -> Source:
        targets = torch.tensor(s_out[s:] if files.kind == "clt" else s_out, dtype=torch.float64)
        theta = part.threshold
        if theta is not None and files.kind == "clt":
            theta = theta * s_in[s]
        return Source(part.W_enc, part.b_enc * s_in[s], theta, part.W_dec * (targets / s_in[s])[:, None])

    parts = tuple(back(part, s) for s, part in enumerate(files.parts))
    return files._replace(parts=parts, b_dec=tuple(b * s for b, s in zip(files.b_dec, s_out, strict=True)))


def _row_norms(part: Source) -> Tensor:
    """[F] n, over all targets."""
    return part.W_dec.flatten(1).norm(dim=1)


def _reading(files: Files, meaning: _Meaning) -> Reading:
    sigma = [torch.tensor(1 / s, dtype=torch.float64) for s in meaning.s_in]
    tau = [torch.tensor(1 / s, dtype=torch.float64) for s in meaning.s_out]
    zeros = [torch.zeros((), dtype=torch.float64)] * len(sigma)
    parts = tuple(_gated(files, meaning, part, s) for s, part in enumerate(files.parts))
    thresholds = [part.threshold for part in parts if part.threshold is not None]
    dictionary = Canonical(
        name="",
        kind=files.kind,
        reads=files.hooks[0],
        writes=files.hooks[1],
        layers=tuple(_layer(hook, s) for s, hook in enumerate(files.hooks[0])),
        firing=firing_of(thresholds) if thresholds else "topk",
        k=files.k,
        sources=parts,
        b_dec=files.b_dec,
    )
    if meaning.subtracts:
        dictionary = folds.subtracted(dictionary, files.b_dec)
    dictionary = folds.standardised_output(folds.standardised_input(dictionary, zeros, sigma), zeros, tau)
    return Reading(meaning.label, dictionary, lambda xs: _forward(files, meaning, xs))


def _layer(hook: str, index: int) -> int:
    block = re.match(r"blocks\.(\d+)\.", hook)
    return int(block[1]) if block else index


def _gated(files: Files, meaning: _Meaning, part: Source, s: int) -> Source:
    """A source whose gate is its pre-activation; where it counts, the norm goes into the encoder."""
    n_F = _row_norms(part)
    if files.act == "topk":
        return folds.scaled_codes(part, n_F) if meaning.by_norm else part
    if part.threshold is None:
        return part._replace(threshold=torch.zeros_like(part.b_enc))
    theta = part.threshold * (meaning.s_in[s] if meaning.raw else 1.0)
    if not meaning.by_norm:
        return part._replace(threshold=theta)
    silent = n_F == 0  # its gate is 0 and never above θ
    return part._replace(
        W_enc=torch.where(silent[:, None], 0.0, part.W_enc),
        b_enc=torch.where(silent, 0.0, part.b_enc),
        threshold=theta / torch.where(silent, 1.0, n_F),
    )


def _forward(files: Files, meaning: _Meaning, xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tool's own equations on the tensors as they are stored, between its normalise and its denormalise.

    Codes that are counted by pre times norm come as that product, as in our form of them.
    """
    z, shown = [], []
    for s, part in enumerate(files.parts):
        x_ND = xs[s].double() * meaning.s_in[s]
        pre_NF = (x_ND - files.b_dec[s] if meaning.subtracts else x_ND) @ part.W_enc.T + part.b_enc
        ranked = meaning.by_norm and files.act != "relu"  # whose gate opens at 0, whatever pre is multiplied with
        n_F = _row_norms(part) if ranked else torch.ones_like(part.b_enc)
        gate_NF = pre_NF * n_F
        if files.k is not None:
            best = gate_NF.relu().topk(files.k, dim=1)
            shown.append(torch.zeros_like(gate_NF).scatter(1, best.indices, best.values))
            z.append(shown[s] / torch.where(n_F > 0, n_F, 1.0))
            continue
        theta = torch.zeros_like(part.b_enc) if part.threshold is None else part.threshold
        z.append(pre_NF * ((gate_NF / meaning.s_in[s] if meaning.raw else gate_NF) > theta))
        shown.append(z[s])
    out = []
    for t, b_D in enumerate(files.b_dec):
        y_NE = b_D.expand(z[0].shape[0], -1)
        for s in range(t + 1):
            y_NE = y_NE + z[s] @ files.parts[s].W_dec[:, t - s]
        out.append(y_NE / meaning.s_out[t])
    return shown, out


FORMAT = Format("openmoss", "OpenMOSS: config.json and sae_weights.safetensors, Llama Scope", read=read)
