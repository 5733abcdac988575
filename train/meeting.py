"""What ranks that share latents tell one another after a step's backward passes: one sum of a few numbers.

Gradients of a rank's own rows are complete where they are. What is not: the gradient of b_dec through a pre-bias, to
which every latent adds, the norm that clipping asks for, and what thresholds, counters and the log follow. All of it is
put side by side in float64, which holds every count exactly, and added up in one collective. A number that is to be
heard from each rank has a place for each, 0 on all others.

The sum of squares of the rows' gradients is part of it, and the update waits for it: so the optimiser calls `hold`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.encoder import Tally
from thresher.train.dictionary.holding import Holding
from thresher.train.dictionary.rules import Seen
from thresher.train.dictionary.rules.base import merged


class Meeting:
    """One step's."""

    def __init__(
        self,
        coder: Coder,
        holding: Holding,
        tallies: Sequence[Sequence[Tally]],
        overflowed: Tensor | None = None,
        flags: Sequence[float] | Tensor = (),
    ) -> None:
        """`tallies`: by source and part; `overflowed`: bool scalar, whether a selection here lacked room; `flags`: what
        else ranks tell one another (train/agreement.py)."""
        self.coder, self.holding, self.flags = coder, holding, torch.as_tensor(flags, dtype=torch.float64)
        """Their sums, once the meeting was held."""
        self.tallies, self._overflowed = tallies, overflowed
        self.overflowed: Tensor
        """Bool scalar, whether one on any rank did."""
        self.active: list[Tensor] = []
        """By source, entries that fired on all ranks."""
        self.seen: list[Seen | None] = []
        """By source, what its rule is to follow; None: it does not."""
        self.dead: Tensor
        """[R, sources] float64: latents that are dead after the step, by rank."""

    @torch.no_grad()
    def hold(self, square: Tensor | float) -> Tensor:
        """Σ over ranks of `square`, ‖g‖² of what each holds alone, a float64 scalar; infinite where room lacked.

        Completes the gradient of what all have.
        """
        coder, group, device = self.coder, self.holding.group, self.coder.b_dec.device
        many = len(self.tallies)
        biases_SD = coder.partial_gradient().double()
        own = torch.stack([self._of(source) for source in range(many)])
        heard = None if coder.anneal is None else coder.anneal.heard
        apart = torch.zeros(group.size, many, 2, dtype=torch.float64, device=device)
        apart[group.index] = own[:, :2]
        none, short = biases_SD.new_zeros(0), self._overflowed
        said = [
            torch.as_tensor(square, dtype=torch.float64, device=device).view(1),
            biases_SD.new_zeros(1) if short is None else short.view(1),
            biases_SD.view(-1) if coder.spec.pre_bias else none,
            own[:, 2:].reshape(-1),
            apart.view(-1),
            none if heard is None else heard,
            self.flags.to(device),
        ]
        flat = torch.cat([part.double() for part in said])
        group.add_up([flat])
        total, short, biases, counts, slots, listened, self.flags = flat.split([part.numel() for part in said])
        if coder.spec.pre_bias:
            whole = biases.view_as(biases_SD).to(coder.b_dec.dtype)
            coder.b_dec.grad = whole if coder.b_dec.grad is None else coder.b_dec.grad + whole
        if heard is not None:
            heard.copy_(listened)
        self._read(short, counts.view(many, 3), slots.view(group.size, many, 2))
        return torch.where(self.overflowed, torch.inf, total[0])

    def _read(self, short: Tensor, counts: Tensor, slots: Tensor) -> None:
        """Take what all ranks have said."""
        self.overflowed = short[0] > 0
        before = torch.tensor(self.coder.dead, dtype=torch.float64, device=slots.device)
        self.dead = torch.where(self.overflowed, before, slots[:, :, 1])
        self.active = list(counts[:, 0].unbind())
        for source, smallest in enumerate(slots[:, :, 0].amin(0)):
            encoder = self.coder.encoder(source)
            listens = encoder.aux_k and encoder.rule.aux_floor() is not None and self.coder.dead_of(source)
            _, active, woken = counts[source].to(torch.int64)
            tokens = _tokens(self.tallies[source])
            seen = Seen(smallest, active, tokens, woken if listens else None)
            self.seen.append(seen if encoder.rule.follows else None)

    def _of(self, source: int) -> Tensor:
        """[5] float64 of this rank: smallest score, dead latents after the step; entries that fire, scores above 0,
        entries woken."""
        encoder, tallies = self.coder.encoder(source), self.tallies[source]
        count_F = torch.stack([part.counts for part in tallies]).sum(0)
        silent_F = torch.where(count_F > 0, 0, encoder.tokens_since_fired + sum(part.tokens for part in tallies))
        told = [part.seen for part in tallies if part.seen is not None]
        nothing = count_F.new_zeros(())
        seen = merged(told) if told else Seen(nothing, nothing, 0)
        numbers = [
            seen.smallest,
            torch.count_nonzero(silent_F >= encoder.dead_after),
            count_F.sum(dtype=torch.float64),
            seen.active,
            nothing if seen.woken is None else seen.woken,
        ]
        return torch.stack([number.double() for number in numbers])


def _tokens(tallies: Sequence[Tally]) -> int:
    """N that a rule is told of."""
    return sum(part.seen.tokens for part in tallies if part.seen is not None)
