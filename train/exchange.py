"""Data parallel training: what ranks that share the rows of a batch tell one another in one step.

A rank's rows are to the batch what a part is to it in train/parts.py: its loss is its share of the whole batch's, so
gradients add up. One sum per step carries all of them, with the terms of the loss, what thresholds and dead counters
follow, and the flags of train/agreement.py; after it all ranks have the same numbers, and each updates its own copy of
the dictionary in the same way. Gradients are written where they are summed, one buffer for all parameters.

What couples the tokens of a batch comes before, where the objective has it (`Wants`): the candidates for BatchTopK's
cut (train/candidates.py), and then what depends on the cut, sums for the mean L0 and the variance of the residual.

Exchanges come in the same order on all ranks, whatever happens to one of them. A rank that has no rows of a batch, or
no memory for its own, takes part with nothing (`blank`), in the second case with a flag that leaves the update out.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.train.agreement import FLAGS, MEMORY, Agreement
from thresher.train.candidates import Form, cut_over, forms_of, nothing
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.encoder import Chosen, Tally
from thresher.train.dictionary.rules.base import Seen
from thresher.train.losses import Losses
from thresher.train.mesh import Group
from thresher.train.updates.rule import Parameters

_ALIGNED = 16
"""Numbers that parameters begin at multiples of in the buffer: a cache line of float32."""


class Share(NamedTuple):
    """Some rows of a batch, the others of which other ranks have."""

    places: Tensor
    """[n] int64, ascending: where they stand in the batch."""
    whole: int
    """N, of the batch."""
    most: int
    """Rows that no rank has more of."""


class Wants(NamedTuple):
    """What a step has to know of its batch before its gradients; the same on all ranks."""

    cut: int | None = None
    """Entries that a pool whose tokens compete may keep; None: they do not."""
    l0: bool = False
    """The mean L0 of the target_l0 penalty."""
    residual: bool = False
    """The variance of the residual, which AuxK is divided by."""


class Moments(NamedTuple):
    """Of the residuals e of some rows."""

    rows: int
    """How many."""
    mean: Tensor
    """[S, E] ē."""
    squares: Tensor
    """[S] Σ‖e − ē‖²."""

    def and_of(self, other: "Moments") -> "Moments":
        """Of the rows of both: the pairwise merging of Chan, Golub and LeVeque 1983."""
        if not self.rows or not other.rows:
            return self if not other.rows else other
        total, away_SE = self.rows + other.rows, other.mean - self.mean
        apart = away_SE.square().sum(1) * (self.rows * other.rows / total)
        return Moments(total, self.mean + away_SE * (other.rows / total), self.squares + (other.squares + apart))


class Told(NamedTuple):
    """What a step's backward passes come to beside the gradients: of one rank's rows, or of all."""

    tallies: list[Tally]
    """By source."""
    terms: Losses
    overflowed: Tensor | None
    """Bool scalar: whether some selection lacked room; None: none can."""


class Exchange:
    """One dictionary's exchanges with the ranks that share its batches."""

    def __init__(self, coder: Coder, parameters: Parameters, group: Group, agreement: Agreement) -> None:
        self.coder, self.parameters, self.group, self.agreement = coder, parameters, group, agreement
        self.norm = torch.zeros(())
        """The gradient norm of the last step, which has to be the same on all ranks."""
        self.apart: Tensor | None = None
        """Bool scalar: whether it ever was another."""
        self.flags: Tensor | None = None
        """What ranks of the same latents have told, for those of the others (train/meeting.py)."""
        self._flat: Tensor | None = None
        self._views: list[Tensor] = []
        self._due: list[str] = []
        self._wants, self._listens = Wants(), False
        self._share = Share(torch.empty(0, dtype=torch.int64), 0, 0)

    def begin(self, wants: Wants, share: Share, listens: bool) -> None:
        """A step that wants these; `listens`: an annealed penalty measures in it."""
        self._wants, self._share, self._listens = wants, share, listens
        due = {"cut": wants.cut is not None, "sums": wants.l0 or wants.residual, "gradients": True}
        self._due = [name for name, wanted in due.items() if wanted]
        if self._flat is None:
            self._lend()

    @property
    def over(self) -> bool:
        """Whether nothing is left to exchange of the step."""
        return not self._due

    def release(self) -> None:
        """Give the buffer's memory back, until the next step."""
        self._flat, self._views = None, []

    def blank(self, short: bool) -> Told:
        """Take part in all that is left of a step with nothing; `short`: since this rank lacked memory."""
        device, pools = self.coder.b_dec.device, self._pools()
        if "cut" in self._due:
            empty = [self._places(), *(nothing(form, device) for form in pools)]
            self._due.remove("cut")
            self._cutters.gather(torch.cat(empty))
        if "sums" in self._due:
            self._gathered("sums", self._packed_sums(None, None))
        return self.gradients(None, short)

    # Before the gradients.

    def cut(self, found: Sequence[Sequence[Chosen]], budget: int) -> list[list[Chosen]]:
        """What the whole batch keeps of every pool's candidates, by source and part; one collective."""
        self._due.remove("cut")
        return cut_over(self._cutters, found, self._pools(), self._places(), budget)

    def _pools(self) -> list[Form]:
        """The form of every pool."""
        return forms_of(self.coder, self._share.most, self._wants.cut or 0)

    @property
    def _cutters(self) -> Group:
        """Who has entries of a pool: all, where latents are shared too."""
        return self.group if self.coder.holding is None else self.agreement.everyone

    def _places(self) -> Tensor:
        """[most] int32 places of this rank's rows; behind them rows that are none."""
        places, most = self._share.places, self._share.most
        return torch.nn.functional.pad(places, (0, most - places.shape[0]), value=self._share.whole).to(torch.int32)

    def sums(self, gates: Tensor | None, moments: Moments | None) -> tuple[Tensor, Tensor]:
        """[sources] Σ gates and [S] Σ‖e − ē‖² of the whole batch, from those of this rank's rows; one collective."""
        told_RB = self._gathered("sums", self._packed_sums(gates, moments))
        sources, (S, E) = len(self.coder.inputs), self.coder.b_dec.shape
        gates_RS, rows_R1, mean_RM, squares_RS = told_RB.split([sources, 1, S * E, S], dim=1)
        mean_M = (rows_R1 * mean_RM).sum(0) / self._share.whole
        away_RS = (mean_RM - mean_M).square().view(-1, S, E).sum(2)  # nothing is asked: all ranks at once
        return gates_RS.sum(0), (squares_RS + rows_R1 * away_RS).sum(0)

    def _packed_sums(self, gates: Tensor | None, moments: Moments | None) -> Tensor:
        b_dec = self.coder.b_dec.detach()
        gates = b_dec.new_zeros(len(self.coder.inputs)) if gates is None else gates
        if moments is None:
            moments = Moments(0, torch.zeros_like(b_dec), b_dec.new_zeros(b_dec.shape[0]))
        return torch.cat([gates, b_dec.new_full((1,), moments.rows), moments.mean.view(-1), moments.squares])

    def _gathered(self, name: str, packed: Tensor) -> Tensor:
        told = self.group.gather(packed)
        self._due.remove(name)
        return told

    # The gradients.

    def gradients(self, told: Told | None, short: bool = False) -> Told:
        """Give every parameter its gradient of the whole batch, and what goes with it; one collective.

        `told`: of this rank's rows; None: it has nothing, `short`: since it lacked memory.
        """
        parameters, sinks = self.parameters.all, self.parameters.sinks
        if told is None:
            sinks.clear()
        sinks.settle(whole=True)
        grads = [None if told is None else parameter.grad for parameter in parameters]
        for grad, view in zip(grads, self._views, strict=True):
            if grad is None:
                view.zero_()
            elif grad.data_ptr() != view.data_ptr():
                view.copy_(grad)
        assert self._flat is not None
        numbers = self._flat[-sum(self._sizes.values()) :]
        self._say(dict(zip(self._sizes, numbers.split(list(self._sizes.values())), strict=True)), told, grads, short)
        self.group.add_up([self._flat])
        self._due.remove("gradients")
        heard = dict(zip(self._sizes, numbers.clone().split(list(self._sizes.values())), strict=True))
        for parameter, view, has in zip(parameters, self._views, self._there(heard, grads), strict=True):
            parameter.grad = view if has else None
            if (sink := sinks.find(parameter)) is not None:
                sink.replaced()
        return self._take(heard)

    def assembled(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """[N, width] whole batches, of which the tensors [n, width] are this rank's rows; one collective."""
        rows = torch.cat(list(tensors), 1)
        whole = rows.new_zeros(self._share.whole, rows.shape[1]).index_copy_(0, self._share.places, rows)
        self.group.add_up([whole])
        return [part.contiguous() for part in whole.split([tensor.shape[1] for tensor in tensors], 1)]

    def check(self) -> None:
        """Raise UserError when the ranks' copies of the dictionary have drifted apart; reads back."""
        if self.apart is not None and bool(self.apart):
            raise UserError(
                f"The ranks that share dictionary {self.coder.label!r} come to different gradient norms: their copies "
                "have drifted apart. They have to be like machines with the same versions of everything. Go on with "
                "--resume on such."
            )

    @property
    def _partial(self) -> bool:
        """Whether ranks have parts of a pre-bias's gradient that are to be added up over latents later."""
        return self.coder.holding is not None and self.coder.spec.pre_bias

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """How many numbers of each kind are told beside gradients, in order."""
        sources, ranks = len(self.coder.inputs), self.group.size
        sizes = {"flags": FLAGS, "there": len(self.parameters.all), "terms": 3, "fvu": self.coder.b_dec.shape[0]}
        sizes |= {"biases": self.coder.b_dec.numel() if self._partial else 0}
        sizes |= {"overflowed": 1, "heard": 2, "norms": ranks, "smallest": sources * ranks}
        return sizes | {"active": sources, "woken": sources, "counts": sources * self.coder.n_latents}

    def _say(self, out: dict[str, Tensor], told: Told | None, grads: Sequence[Tensor | None], short: bool) -> None:
        """Write what this rank adds; where the least or all values are wanted, each rank has a place of its own."""
        sources, own = len(self.coder.inputs), self.group.index
        for part in out.values():
            part.zero_()
        for number, part in zip(self.agreement.say(short), out["flags"], strict=True):
            part.fill_(number)  # and no tensor made of it, which a device would be waited for
        out["norms"][own] = self.norm
        smallest, counts = out["smallest"].view(sources, -1), out["counts"].view(sources, -1)
        smallest[:, own] = torch.inf
        if told is None:
            return
        for has, part in zip(grads, out["there"], strict=True):
            part.fill_(float(has is not None))
        out["terms"].copy_(torch.stack([told.terms.total, told.terms.aux, told.terms.penalty]))
        out["fvu"].copy_(told.terms.fvu)
        if self._partial:
            out["biases"].copy_(self.coder.partial_gradient().view(-1))
        if told.overflowed is not None:
            out["overflowed"].copy_(told.overflowed)
        if self._listens and self.coder.anneal is not None and self.coder.anneal.heard is not None:
            out["heard"].copy_(self.coder.anneal.heard)
        for source, tally in enumerate(told.tallies):
            counts[source] = tally.counts
            if tally.seen is not None:
                smallest[source, own], out["active"][source] = tally.seen.smallest, tally.seen.active
                if tally.seen.woken is not None:
                    out["woken"][source] = tally.seen.woken

    def _there(self, heard: dict[str, Tensor], grads: Sequence[Tensor | None]) -> list[bool]:
        """Whether some rank has a gradient for each parameter; a device is not asked, since all have the same."""
        if heard["there"].device.type == "cpu":
            return [number > 0 for number in heard["there"].tolist()]
        none = all(grad is None for grad in grads)
        return [none or grad is not None for grad in grads]

    def _take(self, heard: dict[str, Tensor]) -> Told:
        """What all ranks have told."""
        sources, anneal = len(self.coder.inputs), self.coder.anneal
        self.flags = heard["flags"]
        if self.coder.holding is None:
            self.agreement.hear(heard["flags"])
        apart = (heard["norms"] != heard["norms"][0]).any()
        self.apart = apart if self.apart is None else self.apart | apart
        if self._listens and anneal is not None:
            anneal.heard = heard["heard"]
        if self._partial:
            self.coder.partial = [heard["biases"].view_as(self.coder.b_dec)]
        counts = heard["counts"].view(sources, -1)
        smallest = heard["smallest"].view(sources, -1).amin(1).double()
        tallies = []
        for source in range(sources):
            encoder, tokens = self.coder.encoder(source), self._share.whole
            seen = None
            if encoder.rule.follows:
                woken = heard["woken"][source].long() if encoder.wakes(tokens) else None
                seen = Seen(smallest[source], heard["active"][source].long(), tokens, woken)
            tallies.append(Tally(counts[source], tokens, seen))
        total, aux, penalty = heard["terms"].unbind()
        total = torch.where(heard["flags"][MEMORY] > 0, torch.inf, total)  # then there is no update
        return Told(tallies, Losses(total, heard["fvu"], aux, penalty), heard["overflowed"][0] > 0)

    def _lend(self) -> None:
        """Make the buffer, and let gradients that have a place of their own be written there."""
        ends = [0]
        for parameter in self.parameters.all:
            ends.append(ends[-1] + -(-parameter.numel() // _ALIGNED) * _ALIGNED)
        first = self.parameters.all[0]
        self._flat = first.detach().new_zeros(ends[-1] + sum(self._sizes.values()))
        self._views = [
            self._flat[start:][: parameter.numel()].view(parameter.shape)
            for start, parameter in zip(ends, self.parameters.all, strict=False)
        ]
        for parameter, view in zip(self.parameters.all, self._views, strict=True):
            if (sink := self.parameters.sinks.find(parameter)) is not None:
                sink.lend(view)
