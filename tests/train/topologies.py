"""Every further topology as a recipe's table, and its objective written densely from the equations alone.

    skip transcoder   ŷ = b + z W_dec + W_skip x
    skip CLT          ŷ_j = b_j + Σ_{i ≤ j} z_i W_dec_i[:, j − i] + W_skip_j x_j
    crosscoder        a = Σ_s W_enc^s x_s + b_enc,  x̂_s = z W_dec[:, s] + b_s
    MoLT              ŷ = b + Σ_t g_t U_t V_t x

    loss = mean over destinations of ⟨‖y − ŷ‖²⟩ / V  +  α AuxK  +  λ · mean over sources of the penalty

No product is sparse, every transform of a MoLT is a full matrix, and nothing of thresher.train computes anything here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.train.dense import _jump

TOPOLOGIES: dict[str, dict[str, Any]] = {
    "skip transcoder": {"kind": "transcoder", "skip": True, "layers": (1,)},
    "skip clt": {"kind": "clt", "skip": True, "decoder": "unit"},
    "clt of unit targets": {"kind": "clt", "decoder": "unit_per_target"},
    "crosscoder": {"kind": "crosscoder"},
    "crosscoder, norms summed": {"kind": "crosscoder", "norm": "sum"},
    "molt": {"kind": "molt", "n_latents": None, "transforms": 4, "ranks": (8, 4, 2), "layers": (1,)},
}
FIRING: dict[str, dict[str, Any]] = {
    "relu l1": {"firing": "relu", "sparsity": 0.03},
    "topk": {"firing": "topk", "k": 3},
    "batchtopk": {"firing": "batchtopk", "k": 2.5},
    "jumprelu tanh": {"firing": "jumprelu", "penalty": "tanh", "sparsity": 0.05, "tanh_scale": 2.0},
}


def leaves(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a saved state's parameters that gather gradients."""
    return {name: value.clone().requires_grad_() for name, value in state.items() if value.is_floating_point()}


def objective(
    p: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    variances: Sequence[float],
    dead: Sequence[Tensor],
    aux_k: int,
) -> Tensor:
    """The whole objective; `p` as a state dict names its tensors, `dead` [F] bool by source."""
    kind, many = settings["kind"], len(ys)
    codes = [_codes(p, settings, i, x) for i, x in enumerate(xs)]
    total = torch.zeros((), dtype=torch.float64)
    residuals = []
    for j, y in enumerate(ys):
        guess = p["b_dec"][j] + sum(_written(p, kind, i, j, z, xs[i]) for i, z in enumerate(codes))
        if settings.get("skip"):
            guess = guess + xs[j] @ p["W_skip"][j].T
        residuals.append((y - guess).detach())
        total = total + (y - guess).square().sum(1).mean() / variances[j] / many
    terms = []
    for i, x in enumerate(xs):
        own = range(many) if kind == "crosscoder" else [i]
        e = torch.cat([residuals[j] for j in own], 1)
        n = int(dead[i].sum())
        a = torch.where(dead[i], x @ p[f"encoders.{i}.W_enc"].T + p[f"encoders.{i}.b_enc"], -torch.inf)
        best = a.topk(min(aux_k, n), dim=1)
        z = torch.zeros_like(a).scatter(1, best.indices, best.values.clamp_min(0))
        found = torch.cat([_written(p, kind, i, j, z, x) for j in own], 1)
        terms.append(min(n / aux_k, 1.0) * (found - e).square().sum() / (e - e.mean(0)).square().sum())
    total = total + torch.stack(terms).mean() / 32
    if "sparsity" in settings:
        for i, z in enumerate(codes):
            weighted = z * _norms(p, kind, i, settings)
            cost = weighted if settings["firing"] == "relu" else torch.tanh(settings["tanh_scale"] * weighted)
            total = total + settings["sparsity"] * cost.sum(1).mean() / len(codes)
    return total


def _codes(p: Mapping[str, Tensor], settings: Mapping[str, Any], i: int, x_ND: Tensor) -> Tensor:
    a = x_ND @ p[f"encoders.{i}.W_enc"].T + p[f"encoders.{i}.b_enc"]
    if settings["firing"] == "relu":
        return a.clamp_min(0)
    if settings["firing"] == "topk":
        return a.clamp_min(0) * torch.zeros_like(a).scatter(1, a.topk(settings["k"], dim=1).indices, 1.0)
    if settings["firing"] == "batchtopk":
        cut = a.flatten().sort(descending=True).values[int(len(a) * settings["k"]) - 1]
        return a.clamp_min(0) * (a >= cut)
    return _jump(a, p[f"encoders.{i}.rule.log_theta"].exp(), p[f"encoders.{i}.rule.window"].item())[0]


def _maps(p: Mapping[str, Tensor]) -> Tensor:
    """[F, E, D] of a MoLT: U_t V_t in full."""
    blocks = range(sum(name.startswith("V.") for name in p))
    return torch.cat([torch.einsum("cre,crd->ced", p[f"U.{g}"], p[f"V.{g}"]) for g in blocks])


def _written(p: Mapping[str, Tensor], kind: str, i: int, j: int, z_NF: Tensor, x_ND: Tensor) -> Tensor | float:
    """What source i's codes write to destination j."""
    if kind == "molt":
        return torch.einsum("nf,fed,nd->ne", z_NF, _maps(p), x_ND)
    if kind == "clt" and i > j:
        return 0.0
    return z_NF @ p[f"W_dec.{i}"][:, j - i if kind == "clt" else j]


def _norms(p: Mapping[str, Tensor], kind: str, i: int, settings: Mapping[str, Any]) -> Tensor:
    if kind == "molt":
        return _maps(p).square().sum((1, 2)).sqrt()
    if settings.get("norm") == "sum":
        return p[f"W_dec.{i}"].square().sum(2).sqrt().sum(1)
    if settings["firing"] == "relu" and settings.get("decoder") == "unit":
        return torch.ones(len(p[f"W_dec.{i}"]))  # its rows have norm 1, and no gradient is spent on that
    return p[f"W_dec.{i}"].square().sum((1, 2)).sqrt()
