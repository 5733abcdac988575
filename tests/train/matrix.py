"""The whole objective of any topology, rule and loss, densely, from the equations of docs/methods.md alone.

    a_i = W_enc_i x_i + b_enc_i                              (a pre-bias takes b_dec off x first)
    ŷ_j = b_j (+ W_skip_j x_j) + Σ_i w_{i→j}(z_i)            w: z W_dec, or of a MoLT Σ_t z_t U_t V_t x in full

    loss = mean over j of Σ_m w_m ⟨‖y_j − ŷ_j^(m)‖²⟩ / unit + μ · the same of the second code
           + α AuxK + mean over i of (λ · penalty + λ_P · pre-activation loss) + the gates' own reconstruction

Settings are those of a recipe's table, with the defaults of `DEFAULTS`; tensors are named as a state dict names them.
Nothing of thresher.train computes anything here: plain autograd, dense products, `torch.sort`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEFAULTS: dict[str, Any] = {
    "loss": "fvu", "skip": False, "norm": "joined", "pre_bias": False, "pool": "layer", "rank_by": "activation",
    "penalty": None, "sparsity": 0.0, "penalty_norm": "l2", "tanh_scale": 1.0, "preact": 0.0, "preact_on": "dead",
    "preact_form": "threshold", "multi_topk": 0.0, "prefixes": None, "prefix_weights": None, "aux": 1 / 32,
    "aux_divisor": "residual", "aux_scale": True, "aux_scope": "own", "p_offset": 1e-3, "k": None,
}  # fmt: skip
PENALTY = {"relu": "l1", "gated": "l1", "jumprelu": "l0"}
"""In force when none is named."""


class Codes(NamedTuple):
    """One source's."""

    a: Tensor
    z: Tensor
    gate: Tensor
    """What L0 counts, with gradient to thresholds."""
    penalised: Tensor
    """What an L1 penalty sums."""
    wide: Tensor
    """Multi-TopK's."""


class Dense:
    """The objective of one batch; `p`: tensors by name, `dead` [F] bool by source, `V` by destination."""

    def __init__(
        self, p: Mapping[str, Tensor], settings: Mapping[str, Any], V: Sequence[float], dead: Sequence[Tensor]
    ):
        self.p, self.s, self.V, self.dead = p, {**DEFAULTS, **settings}, V, dead
        self.kind, self.aux_k = self.s["kind"], self.s["aux_k"]

    def __call__(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
        self.xs, self.ys = xs, ys
        codes = self.codes()
        left = [y - self.guess(j, [c.z for c in codes]) for j, y in enumerate(ys)]
        return self.reconstruction(codes) + self.rest(codes, left)

    def units(self) -> list[float]:
        """Of the squared error, by destination."""
        named = {"fvu": self.V, "mse": [y.shape[1] for y in self.ys], "sum": [1.0] * len(self.ys)}
        return list(named[self.s["loss"]])

    def reconstruction(self, codes: Sequence[Codes]) -> Tensor:
        """Of all prefixes and codes."""
        s, F = self.s, codes[0].a.shape[1]
        ends = [F] if s["prefixes"] is None else [round(end * F) for end in s["prefixes"]]
        weights = s["prefix_weights"] or [1 / len(ends)] * len(ends)
        total = torch.zeros((), dtype=torch.float64)
        for j, (y, unit) in enumerate(zip(self.ys, self.units(), strict=True)):
            for end, weight in zip(ends, weights, strict=True):
                total = total + weight * squares(y - self.guess(j, [c.z[:, :end] for c in codes])) / unit / len(self.ys)
            if s["multi_topk"]:
                wide = squares(y - self.guess(j, [c.wide for c in codes]))
                total = total + s["multi_topk"] * wide / unit / len(self.ys)
        return total

    def rest(self, codes: Sequence[Codes], left: Sequence[Tensor]) -> Tensor:
        """What is minimised whichever the reconstruction; `left`: y − ŷ, which AuxK explains without teaching xs."""
        s, units = self.s, self.units()
        total, left = torch.zeros((), dtype=torch.float64), [e.detach() for e in left]
        for j, (y, unit) in enumerate(zip(self.ys, units, strict=True)):
            if s["firing"] == "gated":
                gates = [c.a.clamp_min(0) for c in codes]
                total = total + squares(y - self.guess(j, gates, frozen=True)) / unit / len(self.ys)
        for i, c in enumerate(codes):
            total = total + (self.penalty(i, c) + self.preact(i, c)) / len(codes)
        self.xs = [x.detach() for x in self.xs]
        return total + s["aux"] * (self.joint if s["aux_scope"] == "all" else self.own)(left, units)

    def codes(self) -> list[Codes]:
        """By source."""
        every = []
        for i, x in enumerate(self.xs):
            x = x - self.p["b_dec"][i] if self.s["pre_bias"] else x
            every.append(x @ self.p[f"encoders.{i}.W_enc"].T + self.p[f"encoders.{i}.b_enc"])
        scores = [a * self.norms(i) if self.s["rank_by"] == "norm" else a for i, a in enumerate(every)]
        return [self.fire(i, a, [score.detach() for score in scores]) for i, a in enumerate(every)]

    def fire(self, i: int, a: Tensor, scores: Sequence[Tensor]) -> Codes:
        """A source's codes; `scores`: what latents compete by, of all sources."""
        p, k, rule, own = self.p, self.s["k"], self.s["firing"], scores[i]
        z = gate = a.clamp_min(0)
        wide = z * (own >= cut(own, min(4 * int(k or 1), a.shape[1])))
        if rule == "topk":
            z = gate * (own >= cut(own, int(k)))
        elif rule == "groupmax":
            grouped = own.unflatten(1, (int(k), -1))
            z = gate * (grouped == grouped.amax(2, keepdim=True)).flatten(1)
        elif rule == "batchtopk":
            pool = torch.cat(list(scores)) if self.s["pool"] == "joint" else own
            z = gate * (own >= cut(pool.flatten(), int(k * len(pool))))
        elif rule == "global":
            z = a * (a > p[f"encoders.{i}.rule.threshold"])
        elif rule == "gated":
            slope = p[f"encoders.{i}.rule.r"].exp()
            pi = a - p[f"encoders.{i}.b_enc"]
            return Codes(a, (a > 0) * (slope * pi + p[f"encoders.{i}.rule.b_mag"]).clamp_min(0), gate, gate, wide)
        elif rule == "jumprelu":
            theta, width = self.theta(i), p[f"encoders.{i}.rule.window"]
            pull = ((a - theta).abs() < width / 2).detach() * (theta - theta.detach()) / width  # 0 in value
            z, gate = a * (a > theta) - theta.detach() * pull, (a > theta).double() - pull
        return Codes(a, z, gate, z, wide)

    def theta(self, i: int) -> Tensor:
        return self.p[f"encoders.{i}.rule.log_theta"].exp()

    def maps(self) -> Tensor:
        """[F, E, D] U_t V_t of a MoLT, in full."""
        ranks = [name[2:] for name in self.p if name.startswith("V.")]
        return torch.cat([torch.einsum("cre,crd->ced", self.p[f"U.{g}"], self.p[f"V.{g}"]) for g in ranks])

    def rows(self, i: int) -> Tensor:
        """[F, T, M] what latents write with, by destination."""
        return self.maps().flatten(1)[:, None] if self.kind == "molt" else self.p[f"W_dec.{i}"]

    def norms(self, i: int, how: str = "l2") -> Tensor:
        """[F] n_f."""
        rows = self.rows(i)
        if how == "none":
            return torch.ones(len(rows), dtype=torch.float64)
        if how == "l1":
            return rows.abs().sum((1, 2))
        if self.s["norm"] == "sum":
            return rows.square().sum(2).sqrt().sum(1)
        return rows.square().sum((1, 2)).sqrt()

    def writes(self, i: int, j: int) -> int | None:
        """Which of a source's destinations j is; None: none of them."""
        if self.kind == "clt":
            return j - i if j >= i else None
        return j

    def written(self, i: int, j: int, z_Nf: Tensor, frozen: bool = False) -> Tensor | float:
        """What source i's first latents write to j."""
        place, f = self.writes(i, j), z_Nf.shape[1]
        if place is None:
            return 0.0
        if self.kind == "molt":
            maps = self.maps()[:f]
            return torch.einsum("nf,fed,nd->ne", z_Nf, maps.detach() if frozen else maps, self.xs[i])
        rows = self.p[f"W_dec.{i}"][:f, place]
        return z_Nf @ (rows.detach() if frozen else rows)

    def guess(self, j: int, codes: Sequence[Tensor], frozen: bool = False) -> Tensor:
        """ŷ_j; `frozen`: nothing but the codes gets gradient."""
        out = self.p["b_dec"][j].expand_as(self.ys[j])
        if self.s["skip"]:
            out = out + self.xs[j] @ self.p["W_skip"][j].T
        out = out.detach() if frozen else out
        return out + sum(self.written(i, j, z, frozen) for i, z in enumerate(codes))

    def penalty(self, i: int, c: Codes) -> Tensor | float:
        """λ times the mean over tokens."""
        s = self.s
        name, u = s["penalty"] or PENALTY.get(s["firing"]), c.penalised * self.norms(i, s["penalty_norm"])
        if name is None:
            return 0.0
        if name == "target_l0":
            return s["sparsity"] * (c.gate.sum(1).mean() / s["k"] - 1) ** 2
        if name == "lp":
            exponent, delta = self.p["anneal.p"], s["p_offset"]
            u = self.p["anneal.factor"] * ((u + delta) ** exponent - delta**exponent)
        term = {"l1": u, "lp": u, "l0": c.gate, "tanh": torch.tanh(s["tanh_scale"] * u)}[name]
        return s["sparsity"] * term.sum(1).mean()

    def preact(self, i: int, c: Codes) -> Tensor | float:
        """λ_P times the mean over tokens."""
        s = self.s
        if not s["preact"]:
            return 0.0
        below = (-c.a).clamp_min(0)
        if s["preact_form"] == "threshold":
            below = self.norms(i, s["penalty_norm"]) * (self.theta(i) - c.a).clamp_min(0)
        on = self.dead[i].double() if s["preact_on"] == "dead" else 1.0
        return s["preact"] * (on * below).sum(1).mean()

    def woken(self, i: int) -> Tensor:
        """[N, F] z' of AuxK."""
        dead, x = self.dead[i], self.xs[i]
        x = x - self.p["b_dec"][i].detach() if self.s["pre_bias"] else x
        a = (x @ self.p[f"encoders.{i}.W_enc"].T + self.p[f"encoders.{i}.b_enc"]).where(dead, -1.0)
        if self.s["firing"] == "global":
            return a * (a > self.p[f"encoders.{i}.rule.aux_threshold"])
        return a.clamp_min(0) * (a >= cut(a.detach(), min(self.aux_k, int(dead.sum()))))

    def divisor(self, j: int, e: Tensor, units: Sequence[float]) -> Tensor | float:
        """Of ⟨‖ê − e‖²⟩."""
        how = self.s["aux_divisor"]
        return squares(e - e.mean(0)) if how == "residual" else self.V[j] if how == "target" else units[j]

    def own(self, left: Sequence[Tensor], units: Sequence[float]) -> Tensor:
        """AuxK on each source's own residual; a crosscoder's is that of all sites as one."""
        terms = []
        for i, dead in enumerate(self.dead):
            span = range(len(left)) if self.kind == "crosscoder" else [i]
            z = self.woken(i)
            error = sum(squares(self.written(i, j, z) - left[j]) for j in span)
            divisor = sum(self.divisor(j, left[j], units) for j in span)
            scale = min(int(dead.sum()) / self.aux_k, 1.0) if self.s["aux_scale"] else 1.0
            terms.append(scale * error / divisor)
        return torch.stack(terms).mean()

    def joint(self, left: Sequence[Tensor], units: Sequence[float]) -> Tensor:
        """AuxK of all layers' dead latents on all residuals."""
        z = [self.woken(i) for i in range(len(self.dead))]
        errors = [
            squares(sum(self.written(i, j, z_NF) for i, z_NF in enumerate(z)) - e) / self.divisor(j, e, units)
            for j, e in enumerate(left)
        ]
        scale = min(sum(int(d.sum()) for d in self.dead) / (self.aux_k * len(z)), 1.0) if self.s["aux_scale"] else 1.0
        return scale * torch.stack(errors).mean()


def squares(e_NE: Tensor) -> Tensor:
    """⟨‖e‖²⟩."""
    return e_NE.square().sum(1).mean()


def cut(scores: Tensor, rank: int) -> Tensor:
    """The value of a rank in every row, or in all of a vector."""
    return scores.sort(-1, descending=True).values[..., rank - 1 : rank]
