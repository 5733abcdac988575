"""One dictionary in a pass of the model: what it read, what it fired, what it writes, and its own terms of the loss.

Dictionaries train in the space of train/normalise.py, the model lives in raw activations: what is read goes into that
space and what is written comes out of it, both with gradient. Codes are kept by source, for a cross-layer transcoder's
later destinations, and AuxK, penalties, L0 and dead counts come from these codes and no others.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from thresher.cache.contracts import side_by_side
from thresher.train.dictionary.coder import Pass
from thresher.train.dictionary.encoder import Fired
from thresher.train.fit import Fit
from thresher.train.losses import Losses, Whole, reconstruction, regularisation, residuals
from thresher.train.normalise import Frame, token_frame
from thresher.train.stages import stage
from thresher.train.views import Inputs


class Member:
    """A dictionary during one pass over N patched positions."""

    def __init__(self, fit: Fit) -> None:
        self.fit = fit
        self.xs: list[Tensor] = []
        """[N, D] by source, in training space, as far as they were read."""
        self.frames: list[Frame] = []
        """By source, where rows are normalised by themselves: an SAE writes in the frame of what it read."""
        self.fired: list[Fired] = []
        """By source, as far as they were read."""
        self.y_NSE: Tensor | None = None
        self.ys: list[Tensor] = []
        """[N, E] by destination, clean, in training space; from `terms` on."""

    def raw(self, rows: Mapping[str, Tensor]) -> list[Tensor]:
        """Clean rows of all sources in training space."""
        return [self._read(s, side_by_side(rows, sites)) for s, sites in enumerate(self.fit.coder.inputs)]

    def encode(self, source: int, x_ND: Tensor) -> None:
        """Take raw activations of the next source in forward order, and write what follows from them."""
        assert source == len(self.fired), "sources come in forward order"
        self.xs.append(self._read(source, x_ND))
        self.fired.append(self.fit.coder.fire(source, self.xs[-1]))
        with stage("decode"):
            if self.y_NSE is None:
                self.y_NSE = self.fit.coder.begin(x_ND.shape[0])
            self.y_NSE = self.fit.coder.skip(self.y_NSE, source, self.xs[-1])
            self.y_NSE = self.fit.coder.add(self.y_NSE, source, self.fired[-1], self.xs[-1])

    def encode_all(self, rows: Mapping[str, Tensor]) -> None:
        """Take the clean rows of all sources at once."""
        self.xs = self.raw(rows)
        out = self.fit.coder(self.xs)
        self.fired, self.y_NSE = list(out.fired), out.y

    def decode(self, destination: int) -> Tensor:
        """[N, E] raw activations of a destination, once all of its sources were read."""
        assert self.y_NSE is not None
        space, y_NE = self.fit.writes[destination], self.y_NSE[:, destination]
        out_NE = space.undo(y_NE) if space.raw_mean is None else self.frames[destination].leave(y_NE)
        # Later sources of a CLT add to y in place: a pass whose gradients need what was written keeps it by itself.
        return out_NE.clone() if out_NE is y_NE else out_NE

    def terms(self, rows: Mapping[str, Tensor], weight: float, whole: Whole | None) -> Losses:
        """The dictionary's own terms, in training space: β times its reconstruction loss, AuxK and penalties.

        `rows`: clean raw activations, of which the destinations are the targets of reconstruction and AuxK. `weight`:
        β; at 0 the FVU is reported and nothing else. `whole`: these positions are a part of a larger step.
        """
        fit, coder = self.fit, self.fit.coder
        assert self.y_NSE is not None
        self.ys = [self._target(j, rows[site].to(coder.b_dec.dtype)) for j, site in enumerate(coder.writes)]
        variances = [space.total_variance for space in fit.writes]
        done = Pass(tuple(self.fired), self.y_NSE)
        with stage("loss"):
            lefts = residuals(coder, done, self.ys)
            main = reconstruction(coder, done, self.ys, lefts, variances, whole)
            rest = regularisation(coder, done, self.xs, lefts, variances, fit.ramp, whole)
            total = rest.total + weight * main.total if weight > 0 else rest.total
        return Losses(total, main.fvu, rest.aux.detach(), rest.penalty.detach())

    def inputs(self) -> Inputs:
        """What it was trained on in this pass, without gradient."""
        return Inputs([x_ND.detach() for x_ND in self.xs], self.ys)

    def _read(self, source: int, x_ND: Tensor) -> Tensor:
        space, x_ND = self.fit.reads[source], x_ND.to(self.fit.coder.b_dec.dtype)
        if space.raw_mean is not None:
            self.frames.append(token_frame(x_ND))
        return space.apply(x_ND)

    def _target(self, destination: int, y_NE: Tensor) -> Tensor:
        """[N, E] in training space; where every row has its own, in that of what was read."""
        space = self.fit.writes[destination]
        return space.apply(y_NE) if space.raw_mean is None else self.frames[destination].enter(y_NE).detach()


def detached(terms: Losses) -> Losses:
    """Without the graph of its total."""
    return terms._replace(total=terms.total.detach())


def sites_of(fits: Sequence[Fit]) -> list[str]:
    """Every site that some dictionary reads or writes, each once."""
    return list(dict.fromkeys(site for fit in fits for site in (*fit.plan.spec.reads, *fit.plan.spec.writes)))
