"""One dictionary in training: a step, its running numbers, its state."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.cache.contracts import side_by_side
from thresher.cache.interrupts import StopFlag
from thresher.cache.source import Source
from thresher.train.agreement import Agreement, short_of_memory
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.encoder import Fired, Tally, whole_of
from thresher.train.dictionary.fold import deploy
from thresher.train.dictionary.holding import holding_of
from thresher.train.dictionary.initial import initialise
from thresher.train.dictionary.pools import shared
from thresher.train.dictionary.topologies import build
from thresher.train.dictionary.unfold import unfold
from thresher.train.exchange import Exchange, Share, Told
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.padded import Padded
from thresher.train.kernels.workspace import Workspace
from thresher.train.losses import Losses, losses, own_sums
from thresher.train.meeting import Meeting
from thresher.train.mesh import Mesh
from thresher.train.normalise import Affine, joined, modes
from thresher.train.optim import Optimiser, base_rate, rate_factor
from thresher.train.parts import split, survey, wanted
from thresher.train.penalties import weighed
from thresher.train.plan import RunPlan
from thresher.train.resample import resample
from thresher.train.rows import Rows
from thresher.train.stages import stage
from thresher.train.state import Checkpoint
from thresher.train.streamed import RowsOf, Writers
from thresher.train.views import Inputs, Views, space_of
from thresher.train.window import Window

_SAMPLE_ROWS = 1024


class Gradients(NamedTuple):
    """What a step's backward passes leave beside the gradients themselves."""

    tallies: list[list[Tally]]
    """By source and part."""
    terms: list[Losses]
    """By part, without their graphs."""
    overflowed: Tensor | None
    """Bool scalar: whether some selection lacked room (kernels/padded.py). None: none can."""

    def told(self) -> Told:
        """All parts together."""
        sums = [torch.stack([getattr(part, name) for part in self.terms]).sum(0) for name in Losses._fields]
        return Told([whole_of(parts) for parts in self.tallies], Losses(*sums), self.overflowed)


class Fit:
    """A dictionary with its optimiser, its schedule and its position in the stream of rows."""

    def __init__(
        self,
        plan: RunPlan,
        reader: Source,
        device: torch.device,
        workspace: Workspace | None = None,
        total: int | None = None,
        mesh: Mesh | None = None,
        stop: StopFlag | None = None,
    ) -> None:
        """Build with zero weights; `start` or `load` must follow. `workspace` may be shared with others.

        `total`: optimiser steps; None: what the plan asks for, of cached rows. `mesh`: the ranks that share it; None:
        this one alone. `stop`: set where this rank is asked to stop, which the others then learn of in their steps.
        """
        spec = plan.spec
        self.plan = plan
        self.mesh = mesh or Mesh()
        self.agreement = Agreement(self.mesh.everyone, stop)
        self.modes = modes(spec.normalise)
        holding = holding_of(spec, self.mesh.latents)
        self.coder = build(spec, plan.name, holding=holding).to(device)
        self.spaces = {site: space_of(self.modes[0], reader, site) for site in spec.reads}
        self.reads = [joined([self.spaces[site] for site in sites]) for sites in self.coder.inputs]
        self.writes = [space_of(self.modes[1], reader, site) for site in spec.writes]
        low = plan.train.dtype == "bfloat16" or (plan.train.dtype == "auto" and device.type == "cuda")
        for source in range(len(self.coder.inputs)):
            self.coder.encoder(source).matmul_dtype = torch.bfloat16 if low else None
            self.coder.encoder(source).workspace = workspace or Workspace()
        self.coder.use(Kernels(plan.train.kernels))
        self.optimiser = self.make_optimiser()
        self.exchange: Exchange | None = None
        if not self.mesh.data.alone:
            self.exchange = Exchange(self.coder, self.optimiser.parameters, self.mesh.data, self.agreement)
        self.total = plan.train.total_steps(reader.rows("train")) if total is None else total
        if self.coder.anneal is not None:
            self.coder.anneal.steps(self.total)  # or it is too short, which is said before the first step
        spec.check_steps(self.total)
        self.done = 0
        self.position = 0
        self._window = Window(len(self.coder.inputs), len(spec.writes), device)
        self._rate = 0.0

    def make_optimiser(self) -> Optimiser:
        """The update of the dictionary that was just built."""
        return Optimiser(self.coder, self.plan.train)

    def start(self, reader: Source, parent: Coder | None = None) -> None:
        """Draw the initial weights, with a sample of training rows for what depends on data; or take a `parent`'s."""
        rows, spec = reader.sample("train", _SAMPLE_ROWS), self.plan.spec

        def sample(site: str, space: Affine) -> Tensor:
            return space.apply(reader.gather("train", site, rows).to(torch.float32))

        read = {site: sample(site, space) for site, space in self.spaces.items()}
        samples = [side_by_side(read, sites) for sites in self.coder.inputs]
        wanted = spec.init_b_dec in ("sample_mean", "median")
        targets = [sample(*pair) for pair in zip(spec.writes, self.writes, strict=True)] if wanted else []
        device = self.coder.b_dec.device
        fresh = build(spec, self.plan.name, holding=self.coder.holding)
        initialise(fresh, self.plan.seed, self.reads, self.writes, samples, targets)
        if parent is not None:
            unfold(parent, fresh, self.reads, self.writes, samples)
        self.coder.load_state_dict(fresh.state_dict())
        self.coder.to(device)
        self.coder.recount()

    def inputs(self, views: Views) -> Inputs:
        """This dictionary's view of a batch."""
        spec, (read, written) = self.plan.spec, self.modes
        made = {site: views.get(site, read, space) for site, space in self.spaces.items()}
        return Inputs(
            [side_by_side(made, sites) for sites in self.coder.inputs],
            [views.get(site, written, space) for site, space in zip(spec.writes, self.writes, strict=True)],
        )

    def step(self, inputs: Inputs, consumed: int, share: Share | None = None) -> Tensor:
        """One optimiser step on a batch that took `consumed` rows of the stream; `share`: of which these are some rows.

        Returns the gradient norm; if it is not finite, no weight was changed, and on a CPU nothing at all. 0 when the
        update was left out because a selection lacked room (kernels/padded.py).
        """
        with stage("task"):
            return self._step(inputs, consumed, share)

    def _step(self, inputs: Inputs, consumed: int, share: Share | None) -> Tensor:
        self.coder.at(self.done)
        rows = self._micro_rows
        parts = [Inputs(*part) for part in zip(split(inputs.xs, rows), split(inputs.ys, rows), strict=True)]
        if self.exchange is None:
            found = self._gradients(parts)
        else:
            assert share is not None, "who shares a dictionary's batches says which rows are its own"
            found = self._gradients_of_all(parts, share, self.exchange)
        finite = torch.stack([part.total for part in found.terms]).sum().isfinite()
        return self.conclude(found, finite, parts, consumed)

    @property
    def _micro_rows(self) -> int | None:
        return self.plan.train.micro_rows

    @property
    def ramp(self) -> float:
        """What penalties are multiplied by in the coming step."""
        warmup = self.plan.spec.penalty_warmup
        length = self.total if warmup == "run" else warmup
        return min(1.0, (self.done + 1) / length) if length else 1.0

    def conclude(
        self,
        found: Gradients,
        finite: Tensor,
        parts: Sequence[Inputs],
        consumed: int,
        ratios: Mapping[str, tuple[Tensor, float]] | None = None,
    ) -> Tensor:
        """Update from the gradients that are there, and count the step; returns as `step` does.

        `finite`: bool scalar, whether there may be an update. `parts`: what was trained on. `ratios`: further numbers
        to report, numerator and denominator by name.
        """
        overflowed = found.overflowed
        rate = base_rate(self.plan.train, self.plan.spec) * rate_factor(self.plan.train, self.done, self.total)
        with stage("update"):
            meeting = self._meeting(found)
            norm = self.optimiser.step(rate, finite if overflowed is None else finite & ~overflowed, meeting)
        if self.exchange is not None:
            self.exchange.norm = norm
        if meeting is not None:
            overflowed = meeting.overflowed
            self.agreement.hear(meeting.flags)
        if overflowed is not None:  # left out for lack of room, which later selections have: no failure
            norm = torch.where(overflowed, 0.0, norm)
            self._window.other[3] += overflowed
        if norm.device.type == "cpu" and not bool(norm.isfinite()):
            return norm
        active = self._advanced(found, overflowed, meeting)
        self._window.add(found.terms, torch.stack(active), norm, sum(tally.tokens for tally in found.tallies[0]))
        for name, pair in (ratios or {}).items():
            self._window.add_ratio(name, *pair)
        if self.coder.anneal is not None:
            self.coder.anneal.advance(self.done, self.total, overflowed)
        self._rate = rate
        self.done += 1
        self.position += consumed
        self._resample(parts)
        return norm

    def _meeting(self, found: Gradients) -> Meeting | None:
        """Where ranks that share the latents are to meet; None: one rank has all."""
        holding = self.coder.holding
        if holding is None:
            return None
        flags = self.agreement.say() if self.exchange is None or self.exchange.flags is None else self.exchange.flags
        return Meeting(self.coder, holding, found.tallies, found.overflowed, flags)

    def _advanced(self, found: Gradients, left_out: Tensor | None, meeting: Meeting | None) -> list[Tensor]:
        """Move thresholds and counters on; by source the number of entries that fired."""
        encoders = [self.coder.encoder(source) for source in range(len(found.tallies))]
        if meeting is None:
            return [
                encoder.advance(tallies, left_out) for encoder, tallies in zip(encoders, found.tallies, strict=True)
            ]
        for encoder, tallies, seen in zip(encoders, found.tallies, meeting.seen, strict=True):
            encoder.advance(tallies, left_out, seen)
        self.coder.dead = meeting.dead.long().tolist()
        return meeting.active

    def _gradients_of_all(self, parts: Sequence[Inputs], share: Share, exchange: Exchange) -> Gradients:
        """Gradients of one batch, of which other ranks have the other rows."""
        anneal = self.coder.anneal
        listens = anneal is not None and anneal.listens(self.done, self.total)
        exchange.begin(wanted(self.coder, share.whole, self.ramp > 0), share, listens)
        try:
            own = self._gradients(parts, share) if share.places.shape[0] else None
            told = exchange.blank(short=False) if own is None else exchange.gradients(own.told())
        except (RuntimeError, MemoryError) as error:
            if not short_of_memory(error) or exchange.over or self.coder.holding is not None:
                raise
            told = exchange.blank(short=True)
        by_source = [[tally] for tally in told.tallies]
        by_source = shared(by_source) if self.plan.spec.pool == "joint" else by_source
        return Gradients(by_source, [told.terms], told.overflowed)

    def _gradients(self, parts: Sequence[Inputs], share: Share | None = None) -> Gradients:
        """Gradients of one batch, in parts; `share`: of such as are here."""
        ramp, (xs, ys) = self.ramp, ([part.xs for part in parts], [part.ys for part in parts])
        tokens = sum(part_xs[0].shape[0] for part_xs in xs) if share is None else share.whole
        known = None
        if len(xs) > 1 or share is not None:
            known = survey(self.coder, xs, ys, wanted(self.coder, tokens, ramp > 0), tokens, self.exchange)
        variances = [space.total_variance for space in self.writes]
        tallies, terms, short = [], [], []
        for index, (part_xs, part_ys) in enumerate(zip(xs, ys, strict=True)):
            done = None if known is None else known.done
            out = self.coder(part_xs, known and known.chosen[index], own_sums) if done is None else done
            with stage("loss"):
                found = losses(self.coder, out, part_xs, part_ys, variances, ramp, known and known.whole)
            with stage("backward"):
                found.total.backward()
            self.hear(out.fired, tokens)
            tallies.append([self.coder.encoder(source).tally(part) for source, part in enumerate(out.fired)])
            terms.append(found._replace(total=found.total.detach()))  # else the part's graph stays
            short += lacking_room(out.fired)
        by_source = [list(column) for column in zip(*tallies, strict=True)]
        by_source = shared(by_source) if self.plan.spec.pool == "joint" and share is None else by_source
        return Gradients(by_source, terms, torch.stack(short).any() if short else None)

    def _resample(self, parts: Sequence[Inputs]) -> None:
        """Let silent latents start anew, where it is time; not after the last step, which nothing follows."""
        every = self.plan.spec.resample
        if every and self.done % every == 0 and self.done < self.total:
            if self.exchange is not None:
                parts = self._whole_batch(parts, self.exchange)
            silent_tokens = every // 2 * self.plan.train.batch_rows
            resample(self.coder, self.optimiser, parts, silent_tokens, self.plan.seed, self.done)

    def _whole_batch(self, parts: Sequence[Inputs], exchange: Exchange) -> list[Inputs]:
        """The batch of which the parts are this rank's rows, in parts as one process has them."""
        own = [torch.cat(rows) for rows in zip(*((*part.xs, *part.ys) for part in parts), strict=True)]
        sites = exchange.assembled(own)
        return [Inputs(part[: len(parts[0].xs)], part[len(parts[0].xs) :]) for part in split(sites, self._micro_rows)]

    def hear(self, fired: Sequence[Fired], tokens: int) -> None:
        """Let an annealed penalty measure a part of a step's batch of `tokens`, where it is to."""
        anneal = self.coder.anneal
        if anneal is not None and anneal.listens(self.done, self.total):
            with torch.no_grad():
                anneal.hear([weighed(self.coder, i, part) for i, part in enumerate(fired)], tokens)

    def forget_gradients(self) -> None:
        """Give back what a step that failed has left."""
        self.optimiser.release()
        if self.exchange is not None:
            self.exchange.release()

    def release(self) -> None:
        """Give back the memory of weights and moments; nothing can follow."""
        self.forget_gradients()
        self.optimiser.forget()
        for tensor in (*self.coder.parameters(), *self.coder.buffers()):
            tensor.data = tensor.data.new_empty(0)

    def metrics(self) -> dict[str, Any]:
        """Means since the last call, and the present state; one transfer from the device."""
        if self.exchange is not None:
            self.exchange.check()
        spec, sources = self.plan.spec, len(self.coder.inputs)
        dead = self.dead_share()
        theta = self._mean_thresholds(dead)
        state = {"step": self.done, "rows": self.position}
        out = state | self._window.numbers(spec, dead, torch.stack(theta)) | {"lr": self._rate}
        self._window = Window(sources, len(spec.writes), self.coder.b_dec.device)
        return out

    def dead_share(self) -> Tensor:
        """[sources] float64: share of latents that are dead."""
        encoders = [self.coder.encoder(source) for source in range(len(self.coder.inputs))]
        holding = self.coder.holding
        if holding is not None:
            counts = [self.coder.dead_of(source) / holding.width for source in range(len(encoders))]
            return torch.tensor(counts, dtype=torch.float64, device=self.coder.b_dec.device)
        return torch.stack([e.dead(self.plan.spec.dead_after).double().mean() for e in encoders])

    def _mean_thresholds(self, like: Tensor) -> list[Tensor]:
        """By source, 0 for a rule without; where ranks share latents a collective."""
        rules = [self.coder.encoder(source).rule for source in range(len(self.coder.inputs))]
        found, holding = [rule.thresholds() for rule in rules], self.coder.holding
        if holding is None:
            return [like.new_zeros(()) if t is None else t.double().mean().to(like) for t in found]
        sums = torch.stack([like.new_zeros(()) if t is None else t.double().sum().to(like) for t in found])
        holding.group.add_up([sums])
        return list((sums / holding.width).unbind())

    def deployed(self) -> Coder:
        """The dictionary on raw activations with frozen rules."""
        with self.optimiser.averaged():
            coder = deploy(self.coder, self.reads, self.writes)
        for source in range(len(coder.inputs)):
            coder.encoder(source).workspace = self.coder.encoder(source).workspace
        return coder

    def checkpoint(self) -> Checkpoint:
        """The state between two steps."""
        with self.optimiser.averaged():
            tensors = {f"model.{name}": tensor for name, tensor in self.coder.state_dict().items()}
            tensors |= {f"optimiser.{name}": tensor for name, tensor in self.optimiser.moments().items()}
        whole = None if self._rows is None else self._rows.settle(tensors)
        return Checkpoint(self.done, self.position, tensors, whole or {})

    @functools.cached_property
    def _rows(self) -> Rows | None:
        """Which rows of a checkpoint's tensors are this rank's; None: it has all."""
        return None if self.coder.holding is None else Rows(self.coder, self.coder.holding, self.optimiser.parameters)

    @property
    def rows_of(self) -> RowsOf | None:
        """The same by name and number of dimensions, for whoever reads a checkpoint."""
        return None if self._rows is None else self._rows.of

    @property
    def writers(self) -> Writers | None:
        """Who writes its files together; None: one rank does."""
        holding, mesh = self.coder.holding, self.mesh
        return None if holding is None else Writers(holding, mesh.everyone, mesh.data.index == 0)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimiser": {}}
        for name, tensor in checkpoint.tensors.items():
            part, key = name.split(".", 1)
            parts[part][key] = tensor
        self.coder.load_state_dict(parts["model"])
        self.optimiser.load_moments(parts["optimiser"])
        self.coder.recount()
        self.done, self.position = checkpoint.step, checkpoint.position


def lacking_room(fired: Sequence[Fired]) -> list[Tensor]:
    """Bool scalars: of every selection that has a fixed capacity, whether it was too small."""
    selections = [part.selection for part in fired if isinstance(part.selection, Padded)]
    return [s.overflowed for s in selections if s.overflowed is not None]


def sites_of(fits: Sequence[Fit]) -> list[str]:
    """Every site that some dictionary reads or writes, each once."""
    return list(dict.fromkeys(site for fit in fits for site in (*fit.plan.spec.reads, *fit.plan.spec.writes)))
