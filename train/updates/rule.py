"""What an update rule is given, and what it has to answer.

The frame (train/optim.py) projects decoder gradients, measures their norm and decides whether there is an update; a
rule moves the weights. It can do so in up to three ways: by library calls (`move`), which every rule has; by kernels
that touch each row once and do the frame's part with it (`by_rows`), where `own` names them; and by the formula spelled
out (`plain`), the specification.

What counts as a matrix is a parameter of two dimensions or more that is no bias: W_enc [F, D] and W_dec [F, T, E], but
not b_dec [S, E], a vector for each destination. Weight decay acts on matrices alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from thresher.train.config import TrainConfig
from thresher.train.dictionary.coder import Coder
from thresher.train.kernels import cpu
from thresher.train.kernels.choice import Implementation
from thresher.train.kernels.gradients import Facts
from thresher.train.meeting import Meeting


class Turn(NamedTuple):
    """A parameter whose gradient is complete."""

    parameter: nn.Parameter
    unit: bool
    """Whether its rows keep norm 1."""
    along: Tensor | None
    """[F] multiples of the weight's rows that its gradient still lacks."""
    square: float
    """‖gradient‖², with those."""


class Parameters:
    """All parameters of one dictionary, and what is known of their gradients."""

    def __init__(self, coder: Coder) -> None:
        self.all = list(coder.parameters())
        self.sinks = coder.gather()
        self.unit = list(coder.W_dec) if coder.spec.unit_norm or coder.spec.unit_per_target else []
        self.apart = coder.spec.unit_per_target
        named = list(coder.named_parameters())
        self.matrices = [p for name, p in named if p.dim() > 1 and not _is_bias(name)]
        self.holding = coder.holding
        self.replicated = [p for p in (coder.b_dec, coder.W_skip) if p is not None]
        self.meeting: Meeting | None = None
        """Of a step of ranks that share latents: adds up what each knows of the norm."""
        self._encoders = {(encoder := coder.encoder(source)).W_enc: encoder for source in range(len(coder.inputs))}

    def with_gradient(self) -> list[nn.Parameter]:
        """Those that have one."""
        return [parameter for parameter in self.all if parameter.grad is not None]

    def is_unit(self, parameter: nn.Parameter) -> bool:
        """Whether its rows keep norm 1."""
        return any(parameter is weight for weight in self.unit)

    def is_matrix(self, parameter: nn.Parameter) -> bool:
        """Whether weight decay and Muon mean it."""
        return any(parameter is weight for weight in self.matrices)

    def noted(self, parameter: nn.Parameter) -> tuple[Tensor | None, Facts | None, bool]:
        """Multiples of the weight that its gradient lacks, facts of what it has, and whether rows keep norm 1."""
        sink, unit = self.sinks.find(parameter), self.is_unit(parameter)
        if sink is not None and unit and self.apart:  # facts of rows over all destinations say nothing of their parts
            along = None if sink.along is None else sink.along.repeat_interleave(parameter.shape[1])
            return along, None, unit
        return (None, None, unit) if sink is None else (sink.along, sink.facts(), unit)

    def rows(self, parameter: nn.Parameter, tensor: Tensor | None) -> Tensor:
        """A parameter, or its gradient or state, by the rows that an update goes through: of a decoder whose rows keep
        norm 1 for every destination apart, those parts."""
        assert tensor is not None
        apart = self.apart and self.is_unit(parameter)
        return rows(tensor.flatten(0, 1) if apart else tensor)

    def turn(self, parameter: nn.Parameter) -> Turn:
        """What a parameter's update needs to know of its gradient's rows."""
        noted, facts, unit = self.noted(parameter)
        assert parameter.grad is not None
        if facts is None:
            facts = cpu.facts_of(self.rows(parameter, parameter), self.rows(parameter, parameter.grad))
        if not unit and noted is None:
            return Turn(parameter, unit, None, float(facts.squares.sum()))
        along = torch.zeros_like(facts.dots) if noted is None else noted.double()
        if unit:  # the part along the row: (g + along · w) · w
            along = along - (facts.dots + along * facts.weights)
        squares = facts.squares + 2 * along * facts.dots + along.square() * facts.weights
        return Turn(parameter, unit, along.to(parameter.dtype), float(squares.clamp_min(0.0).sum()))

    def turns(self) -> tuple[list[Turn], float]:
        """Of all parameters with a gradient, and ‖gradient‖² of the dictionary; of shared latents a collective."""
        if self.meeting is None:
            turns = [self.turn(parameter) for parameter in self.with_gradient()]
            return turns, sum(turn.square for turn in turns)
        turns = [self.turn(parameter) for parameter in self.with_gradient() if not self.is_replicated(parameter)]
        square = float(self.meeting.hold(sum(turn.square for turn in turns)))
        common = [self.turn(parameter) for parameter in self.with_gradient() if self.is_replicated(parameter)]
        return turns + common, square + sum(turn.square for turn in common)

    def norm(self) -> Tensor:
        """‖gradient‖ of the dictionary from the gradients as they are; of shared latents a collective."""
        if self.meeting is None:
            return torch.nn.utils.get_total_norm([p.grad for p in self.all if p.grad is not None])
        square = self.meeting.hold(self._square([p for p in self.all if not self.is_replicated(p)]))
        return (square + self._square(self.replicated)).sqrt().to(self.all[0].dtype)

    def _square(self, parameters: list[nn.Parameter]) -> Tensor:
        norms = [
            torch.linalg.vector_norm(p.grad, dtype=torch.float64).square() for p in parameters if p.grad is not None
        ]
        return torch.stack(norms).sum() if norms else self.all[0].new_zeros((), dtype=torch.float64)

    def is_replicated(self, parameter: nn.Parameter) -> bool:
        """Whether every rank that shares the latents has it."""
        return any(parameter is weight for weight in self.replicated)

    def copy(self, parameter: nn.Parameter) -> Tensor | None:
        """A weight's copy in a shorter format, which an update on a device has to write too."""
        encoder = self._encoders.get(parameter)
        return None if encoder is None or encoder.matmul_dtype is None else encoder.low_weight()

    def changed(self) -> None:
        """Weights were written, or exchanged, without their copies."""
        for encoder in self._encoders.values():
            encoder.changed()


class Steps(Protocol):
    """An optimiser of the ordinary kind."""

    def step(self) -> object:
        """Move all parameters by their gradients."""
        ...


class Rule:
    """One way to update; the state of a parameter is a dict of tensors, `step` among them."""

    own: tuple[Implementation, ...] = ()
    """Kernels that do a whole step of this rule (`by_rows`)."""
    kept: tuple[str, ...] = ()
    """What a checkpoint has of a parameter's state."""

    def __init__(self, parameters: Parameters, config: TrainConfig) -> None:
        self.parameters, self.config = parameters, config
        self.clip = config.resolved_clip
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    def begin(self) -> None:
        """Make the state of every parameter, as it is before the first step; a step makes what is not there."""
        raise NotImplementedError

    def by_rows(self, how: Implementation, rate: float, finite: Tensor) -> Tensor:
        """A whole step by kernels of `own`, as `Optimiser.step`."""
        raise NotImplementedError

    def move(self, rate: float, norm: Tensor) -> None:
        """Update from complete, projected gradients of a norm; nothing where it is infinite, and nothing read back."""
        raise NotImplementedError

    def plain(self, rate: float) -> Steps:
        """The formula spelled out, on the same state; without projection, clipping and new norms of weights."""
        raise NotImplementedError

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, weights are those to be evaluated and saved; for most rules they are anyway."""
        yield

    def restart(self, parameter: nn.Parameter, latents: Tensor) -> None:
        """Forget what was gathered of some rows [n] of a parameter, which were set anew from outside."""
        for key, tensor in self.state.get(parameter, {}).items():
            if key != "step":
                tensor.index_fill_(0, latents, 0.0)

    def moments(self) -> dict[str, Tensor]:
        """The state by parameter position, for a checkpoint; weights come from inside `averaged`."""
        return {
            f"{index}.{key}": self.state[parameter][key]
            for index, parameter in enumerate(self.parameters.all)
            for key in self.kept
            if key in self.state.get(parameter, {})
        }

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """Put back what `moments` gave; the weights are those saved with it."""
        for name, tensor in moments.items():
            index, key = name.split(".")
            parameter = self.parameters.all[int(index)]
            self.state.setdefault(parameter, {})[key] = tensor.to(parameter.device)

    def by_cpu_rows(self, finite: Tensor, update: Callable[[Turn, float], None]) -> Tensor:
        """On a CPU: the norm from all turns, then each turn's update with the factor that clips its gradient."""
        turns, square = self.parameters.turns()
        norm = self.parameters.all[0].new_tensor(square**0.5)
        if not bool(finite & norm.isfinite()):
            return torch.full_like(norm, torch.inf)
        scale = 1.0 if self.clip is None else 1 / max(1.0, float(norm) / self.clip)
        for turn in turns:
            update(turn, scale)
        return norm


def rows(tensor: Tensor) -> Tensor:
    """A matrix by rows; a vector is one row."""
    return tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach()[None]


def count(parameter: nn.Parameter) -> Tensor:
    """A count of steps, where torch keeps it: a float32 scalar, on the device unless that is a CPU."""
    return torch.zeros((), device=None if parameter.device.type == "cpu" else parameter.device)


def _is_bias(name: str) -> bool:
    return any(part.startswith("b_") for part in name.split("."))
