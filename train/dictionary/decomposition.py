"""Parameter decomposition of an MLP: components of its two matrices, and gates that say which of them a token needs.

    ŷ = D(act(F(x)))      F(x) = (m ⊙ (x V_0)) U_0 + b_0      D(h) = (m' ⊙ (h V_1)) U_1 + b_dec      m, m' 0 or 1

V [D, C], U [C, E] of each matrix; biases are the target's own and not trained. Both matrices are sources that read the
MLP's input: source 0 has the components of the first, source 1 those of the second. A code is 1 where γ > t:

    γ_s = W_enc.s gelu(W_gate x + b_gate) + b_enc.s       the hidden layer is shared by the two matrices

What is served has no Δ = W − Σ_c u_c v_cᵀ; the target's matrices are needed in training alone (`take`), whose losses
and masks are in train/decompose.py. An active component brings its rows of U and V into play, D + E weights. Gates
count among the parameters of a dictionary, but not as active ones: they are no part of what stands for the MLP.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.cache.contracts import Codes, MLPMatrices
from thresher.cache.errors import UserError
from thresher.train.config import TrainConfig
from thresher.train.decompose import Mask, masked, squares
from thresher.train.dictionary import drawing
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.components import FIELDS, check_components, check_training, check_values
from thresher.train.dictionary.encoder import Encoder
from thresher.train.dictionary.spec import DictionaryConfig, DictionarySpec
from thresher.train.dictionary.topologies import register
from thresher.train.kernels.choice import Kernels

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class Gate(Encoder):
    """W_enc [C, gate_width], b_enc [C] of one matrix, and the count of tokens since each component was active."""

    def __init__(self, spec: DictionarySpec, components: int, deployed: bool) -> None:
        own = copy.copy(spec)  # sizes of one matrix, which are no dictionary's and would not pass as one
        object.__setattr__(own, "n_latents", components)
        object.__setattr__(own, "d_in", spec.gate_width)
        super().__init__(own, deployed)

    def gamma(self, hidden_NG: Tensor) -> Tensor:
        """γ [N, C] from the hidden layer of the gate network."""
        return torch.addmm(self.b_enc, hidden_NG, self.W_enc.T)


@register("decomposition")
class Decomposition(Coder):
    """One MLP, read at its input and written at its output."""

    by_rows = False
    firing = "gate"
    admits = frozenset(FIELDS)
    decomposes = True

    def __init__(self, spec: DictionarySpec, name: str = "", deployed: bool = False) -> None:
        super().__init__(spec, name, deployed)
        counts = spec.components or ()
        self.encoders = nn.ModuleList(Gate(spec, count, deployed) for count in counts)
        self.W_gate = nn.Parameter(torch.zeros(spec.gate_width, spec.d_in))
        self.b_gate = nn.Parameter(torch.zeros(spec.gate_width))
        self.neurons = spec.mlp_width or 4 * spec.d_in
        self.shapes = ((spec.d_in, self.neurons), (self.neurons, spec.d_out))
        self.V = nn.ParameterList(torch.zeros(d, c) for (d, _), c in zip(self.shapes, counts, strict=True))
        self.U = nn.ParameterList(torch.zeros(c, e) for (_, e), c in zip(self.shapes, counts, strict=True))
        self.register_buffer("b_first", torch.zeros(self.neurons))
        self.b_first: Tensor
        self.b_dec.requires_grad_(False)
        self.act = ACTIVATIONS[spec.mlp_activation]
        for matrix, (d, e) in enumerate(self.shapes if not deployed else ()):
            self.register_buffer(f"W_{matrix}", torch.zeros(e, d), persistent=False)
        self.use(Kernels())

    @classmethod
    def inputs_of(cls, reads: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Both matrices' gates read the MLP's input."""
        return tuple((site,) for site in reads for _ in range(2))

    @classmethod
    def check(cls, config: DictionaryConfig) -> None:
        """Raise UserError for what a decomposition does not take."""
        check_components(config)

    @classmethod
    def check_spec(cls, spec: DictionarySpec) -> None:
        """The same of what is resolved; sites go by their stored names here."""
        check_values(spec)
        for field, tap, sites in (("reads", "mlp_in", spec.reads), ("writes", "mlp_out", spec.writes)):
            if any(not site.endswith(f".{tap}") for site in sites):
                raise UserError(
                    f"dictionary.{field} resolves to {', '.join(sites)} for kind = 'decomposition', which stands for "
                    f"the MLP as a whole. Expected {tap}: remove it, and harvest mlp_in and mlp_out under these names."
                )

    @classmethod
    def check_training(cls, train: TrainConfig) -> None:
        """Raise UserError for a [train] table under which it cannot be trained."""
        check_training(train)

    @classmethod
    def sizes(cls, config: DictionaryConfig, width: int) -> dict[str, object]:
        """Components of both matrices together; activations are raw, and there is no AuxK."""
        return {"n_latents": sum(config.components or ()), "normalise": "none", "aux": 0.0}

    @classmethod
    def work(cls, spec: DictionarySpec) -> int:
        """Multiply-adds of the first matrix's components, per token."""
        return spec.n_latents * max(spec.d_in, spec.mlp_width or 4 * spec.d_in)

    def sources(self, destination: int) -> range:
        """Both matrices."""
        return range(2)

    def explained(self, source: int) -> range:
        """Nothing: there is no AuxK."""
        return range(0)

    @property
    def n_parameters(self) -> int:
        """Trained numbers: components and gates."""
        return sum(parameter.numel() for parameter in self.parameters()) - self.b_dec.numel()

    @property
    def component_parameters(self) -> list[nn.Parameter]:
        """V and U, whose gradient is clipped."""
        return [*self.V, *self.U]

    @torch.no_grad()
    def write_norms(self) -> Tensor:
        """[2, 1] Σ_c ‖u_c v_cᵀ‖² by matrix."""
        both = zip(self.V, self.U, strict=True)
        return torch.stack([(V.double().square().sum(0) @ U.double().square().sum(1)).cpu() for V, U in both])[:, None]

    def latent_costs(self, source: int) -> Tensor:
        """[C] float64: row of U and of V."""
        cost = float(sum(self.shapes[source]))
        return torch.full((self.U[source].shape[0],), cost, dtype=torch.float64)

    def encode(self, source: int, x_ND: Tensor) -> Codes:
        """1 for each component of a matrix whose gate is above t."""
        x_ND = x_ND.to(self.b_dec.dtype)
        with torch.no_grad():
            active_NC = self.active(self.gate(source).gamma(self.hidden(x_ND)))
        offsets = torch.cat([active_NC.new_zeros(1, dtype=torch.int64), active_NC.sum(1).cumsum(0)])
        latents = active_NC.nonzero()[:, 1]
        values = torch.ones_like(latents, dtype=self.b_dec.dtype)
        return Codes(values, latents, offsets, active_NC.shape[1], x=x_ND)

    @torch.no_grad()
    def decode(self, destination: int, codes: Sequence[Codes]) -> Tensor:
        """[N, E] what the active components make of the MLP's input; no Δ."""
        x_ND = codes[0].x
        assert x_ND is not None, "codes of a decomposition carry its input"
        return self.chosen(x_ND, [part.dense() for part in codes])

    def gate(self, source: int) -> Gate:
        """A matrix's gates."""
        module = self.encoders[source]
        assert isinstance(module, Gate)
        return module

    def hidden(self, x_ND: Tensor) -> Tensor:
        """[N, gate_width] the layer of the gate network that both matrices share."""
        return F.gelu(torch.addmm(self.b_gate, x_ND, self.W_gate.T))

    def gammas(self, x_ND: Tensor) -> list[Tensor]:
        """γ [N, C] by matrix, with gradient."""
        hidden_NG = self.hidden(x_ND)
        return [self.gate(source).gamma(hidden_NG) for source in range(2)]

    def active(self, gamma_NC: Tensor) -> Tensor:
        """[N, C] bool."""
        return gamma_NC > self.spec.gate_threshold

    def chosen(self, x_ND: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """[N, E] the MLP of masked components, without Δ; masks [N, C] by matrix."""
        h_NH = self.act((masks[0] * (x_ND @ self.V[0])) @ self.U[0] + self.b_first)
        return (masks[1] * (h_NH @ self.V[1])) @ self.U[1] + self.b_dec[0]

    # What training needs of the target.

    def take(self, given: MLPMatrices) -> None:
        """Hold the target's own matrices. Raises UserError where they are others than the recipe says."""
        neurons, name = given.first.shape[0], self.label or "The decomposition"
        if neurons != self.neurons:
            raise UserError(
                f"{name}: dictionary.mlp_width is {self.neurons}, but the target's MLP has {neurons} neurons. Set "
                f"mlp_width = {neurons}."
            )
        if given.activation != self.spec.mlp_activation:
            raise UserError(
                f"{name}: dictionary.mlp_activation is {self.spec.mlp_activation!r}, but the target's MLP has "
                f"{given.activation!r}. Set mlp_activation = {given.activation!r}."
            )
        with torch.no_grad():
            for matrix, W_ED in enumerate((given.first, given.second)):
                self.matrix(matrix).copy_(W_ED)
            self.b_first.copy_(given.first_bias)
            self.b_dec[0].copy_(given.second_bias)

    def matrix(self, source: int) -> Tensor:
        """[E, D] the target's own."""
        found: Tensor = self.get_buffer(f"W_{source}")
        return found

    def masked(self, x_ND: Tensor, masks: Sequence[Mask]) -> Tensor:
        """[N, E] the MLP with both matrices masked."""
        h_NH = self.act(masked(x_ND, self.matrix(0), self.V[0], self.U[0], masks[0]) + self.b_first)
        return masked(h_NH, self.matrix(1), self.V[1], self.U[1], masks[1]) + self.b_dec[0]

    def left(self) -> Tensor:
        """Σ‖Δ‖² of both matrices, with gradient."""
        parts = [squares(self.matrix(s), self.V[s], self.U[s]) for s in range(2)]
        return parts[0] + parts[1]

    @property
    def entries(self) -> int:
        """Of both matrices."""
        return sum(d * e for d, e in self.shapes)

    # How weights begin and are stored.

    @torch.no_grad()
    def begin_weights(self, rng: torch.Generator) -> None:
        """V ~ N(0, 1/D), U ~ N(0, 1/C); the gate network uniform in ±1/√fan-in, its biases 0. On the CPU."""
        for V_DC, U_CE in zip(self.V, self.U, strict=True):
            V_DC.copy_(torch.randn(V_DC.shape, generator=rng) * V_DC.shape[0] ** -0.5)
            U_CE.copy_(torch.randn(U_CE.shape, generator=rng) * U_CE.shape[0] ** -0.5)
        self.W_gate.copy_(drawing.uniform(self.W_gate.shape, self.W_gate.shape[1] ** -0.5, rng))
        for source in range(2):
            W_enc = self.gate(source).W_enc
            W_enc.copy_(drawing.uniform(W_enc.shape, W_enc.shape[1] ** -0.5, rng))

    def decoder_tensors(self) -> dict[str, Tensor]:
        """`V.s`, `U.s` by matrix, the gate network's first layer and the first bias."""
        named = {f"V.{i}": weight.data for i, weight in enumerate(self.V)}
        named |= {f"U.{i}": weight.data for i, weight in enumerate(self.U)}
        return named | {"W_gate": self.W_gate.data, "b_gate": self.b_gate.data, "b_first": self.b_first}
