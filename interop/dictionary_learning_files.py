"""dictionary_learning's SAEs as they are stored, and what their classes make of them and leave open.

dictionary_learning.py has the classes and their equations.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.interop import folds
from thresher.interop.canonical import Canonical, Source, firing_of
from thresher.interop.formats import Reading
from thresher.interop.tensors import Stored

CONFIG, WEIGHTS = "config.json", "ae.pt"
UNCALIBRATED = -1.0
"""What `threshold` is until it is calibrated."""
B_DEC = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
    "AutoEncoderTopK": "b_dec",
    "BatchTopKSAE": "b_dec",
    "MatryoshkaBatchTopKSAE": "b_dec",
    "JumpReluAutoEncoder": "b_dec",
}
"""Name of the decoder's bias by class."""
PLAIN = ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")
"""Classes with W_enc [d, M] and W_dec [M, d]; the others hold nn.Linear."""
KEEPS_INPUT = ("AutoEncoderNew", "JumpReluAutoEncoder")
"""Classes that do not subtract b_dec."""
ONE_THRESHOLD = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")


class Files:
    """One SAE as it is stored."""

    def __init__(self, kind: str, trainer: Mapping[str, Any], stored: Stored) -> None:
        self.kind = kind
        m, d = trainer.get("dict_size"), trainer.get("activation_dim")
        if kind in PLAIN:
            self.W_enc = stored.take("W_enc", d, m).T
            m, d = self.W_enc.shape
            self.W_dec = stored.take("W_dec", m, d)
        else:
            self.W_enc = stored.take("encoder.weight", m, d)
            m, d = self.W_enc.shape
            self.W_dec = stored.take("decoder.weight", d, m).T
        self.b_dec = stored.take(B_DEC[kind], d)
        self.gate: tuple[Tensor, Tensor, Tensor] | None = None
        if kind == "GatedAutoEncoder":
            self.gate = (stored.take("gate_bias", m), stored.take("r_mag", m), stored.take("mag_bias", m))
        self.b_enc = (
            torch.zeros(m).double() if self.gate else stored.take("b_enc" if kind in PLAIN else "encoder.bias", m)
        )
        self.k = _stored_k(trainer, stored)
        self.threshold = torch.zeros(m, dtype=torch.float64)
        if kind == "JumpReluAutoEncoder":
            self.threshold = stored.take("threshold", m)
        elif kind in ONE_THRESHOLD or "threshold" in stored:
            self.threshold = stored.take("threshold").expand(m)
        if kind == "MatryoshkaBatchTopKSAE":
            stored.take("group_sizes", None)
        stored.done()
        norms_F = self.W_dec.norm(dim=1)
        self.rescales = kind == "AutoEncoder" and not torch.allclose(norms_F, torch.ones_like(norms_F))

    @property
    def uncalibrated(self) -> bool:
        """Whether its one threshold is still what it was made with."""
        return self.kind in ONE_THRESHOLD and bool(self.threshold[0] < 0)

    def readings(self, hook: str, layer: int) -> tuple[Reading, ...]:
        """What the class does, then what it leaves open."""
        subtracts, counts = self.kind not in KEEPS_INPUT, self.kind == "AutoEncoderTopK"
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
