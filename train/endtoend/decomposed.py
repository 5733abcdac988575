"""Decompositions in training: all MLPs of a group together, masked at random in one pass of the model.

A step takes clean rows and logits, gets gates from the clean inputs, and runs the model once with every MLP of the
group replaced by its masked form on the stream as it then is (train/decompose.py):

    loss = faithfulness coefficient · Σ‖Δ‖² / entries of all  +  λ · Σ over layers minimality  +  subset · KL

Patched and scored positions are those of all training through the model. Random numbers are a function of seed and
step, and the warm-up on faithfulness belongs to the initial weights, so a checkpoint holds weights and moments alone;
the target's matrices come from the target.

Left out: adversarial masks; parts of a batch (minimality takes means over all of it).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thresher.cache.contracts import Target, side_by_side
from thresher.cache.patching import stream_edits
from thresher.cache.source import Source
from thresher.train.component_optim import ComponentOptimiser, warm_up
from thresher.train.decompose import draw, exponent, lower_leaky, mask, minimality
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.decomposition import Decomposition
from thresher.train.dictionary.encoder import Tally
from thresher.train.dictionary.initial import generator
from thresher.train.dictionary.topologies import build
from thresher.train.endtoend.clean import clean
from thresher.train.endtoend.contexts import Part
from thresher.train.endtoend.group import Group
from thresher.train.endtoend.members import sites_of
from thresher.train.endtoend.scores import Scored, Scores, scores
from thresher.train.fit import Fit, Gradients
from thresher.train.kernels.workspace import Workspace
from thresher.train.losses import Losses
from thresher.train.optim import Optimiser
from thresher.train.plan import RunPlan
from thresher.train.stages import stage
from thresher.train.views import Inputs


class DecompositionFit(Fit):
    """A decomposition with its optimiser, its schedule and its place in the text."""

    def __init__(
        self,
        plan: RunPlan,
        reader: Source,
        device: torch.device,
        workspace: Workspace | None,
        total: int | None,
        target: Target,
    ) -> None:
        """As `Fit`; raises UserError for a target whose MLP is another than the recipe says."""
        super().__init__(plan, reader, device, workspace, total)
        self.module.take(target.mlp_matrices(plan.spec.layers[0]))

    @property
    def module(self) -> Decomposition:
        """The dictionary."""
        assert isinstance(self.coder, Decomposition)
        return self.coder

    def make_optimiser(self) -> Optimiser:
        """That of components and gates."""
        return ComponentOptimiser(self.module, self.plan.train)

    def start(self, reader: Source, parent: Coder | None = None) -> None:
        """Draw components and gates, and warm up."""
        module, spec = self.module, self.plan.spec
        fresh = build(spec, self.plan.name)
        assert isinstance(fresh, Decomposition)
        fresh.begin_weights(generator(self.plan.seed, spec.kind, *spec.reads))
        space = self.writes[0]
        with torch.no_grad():
            fresh.mean[0] = (space.mean * space.scale + space.shift).to(fresh.mean)
            for name in ("b_first", "b_dec"):
                getattr(fresh, name).copy_(getattr(module, name))
        module.load_state_dict(fresh.state_dict())
        warm_up(module, spec.faithfulness_warmup)

    def deployed(self) -> Coder:
        """The components and gates without the target's matrices."""
        out = build(self.plan.spec, self.plan.name, deployed=True).to(self.coder.b_dec.device)
        trained = self.coder.state_dict()
        out.load_state_dict({name: trained[name] for name in out.state_dict()})
        return out.requires_grad_(False)


class Decompositions(Group):
    """The decompositions of a group: one per layer, with two matrices each."""

    def _step(self) -> list[Tensor]:
        first = self.fits[0]
        with stage("transfer"):
            (part,) = self.text.step(first.position // self.text.length, self.contexts).parts
        with stage("target"):
            seen = clean(self.target, part, sites_of(self.fits), self.cached, True)
        xs = [self._rows(fit, seen.rows, read=True) for fit in self.fits]
        gammas = [module.gammas(x_ND) for module, x_ND in zip(self._modules, xs, strict=True)]
        with stage("target"):
            found = self._subset(part, gammas, seen.logits)
        entries = sum(module.entries for module in self._modules)
        terms, tallies, inputs, ratios = [], [], [], []
        with stage("loss"):
            for fit, own, x_ND in zip(self.fits, gammas, xs, strict=True):
                y_NE = self._rows(fit, seen.rows, read=False)
                left = _module(fit).left()
                terms.append(_terms(fit, own, left / entries, x_ND, y_NE))
                tallies.append([[_tally(_module(fit), gamma_NC)] for gamma_NC in own])
                inputs.append([Inputs([x_ND], [y_NE])])
                numbers = {name: (value, part.scored.shape[0]) for name, value in _scored(found).items()}
                ratios.append(numbers | {"faithfulness": (left.detach() / _module(fit).entries, 1)})
        weight = first.plan.spec.subset
        total = torch.stack([weight * found.loss, *(term.total.to(found.loss) for term in terms)]).sum()
        with stage("backward"):
            total.backward()
        finite = total.detach().isfinite()
        for fit in self.fits:
            finite = finite & fit.optimiser.finite()
        every = zip(self.fits, tallies, terms, inputs, ratios, strict=True)
        return [
            fit.conclude(Gradients(own, [term._replace(total=term.total.detach())], None), finite, i, self.consumed, r)
            for fit, own, term, i, r in every
        ]

    @property
    def _modules(self) -> list[Decomposition]:
        return [_module(fit) for fit in self.fits]

    def _rows(self, fit: Fit, rows: Mapping[str, Tensor], read: bool) -> Tensor:
        """[N, width] clean rows of the site that a decomposition reads, or of that it writes."""
        sites = fit.plan.spec.reads if read else fit.plan.spec.writes
        return side_by_side(rows, sites).to(fit.coder.b_dec.dtype)

    def _subset(self, part: Part, gammas: Sequence[Sequence[Tensor]], seen: Tensor | None) -> Scores:
        """One pass of the model with random masks from these gates."""
        config, every = self.fits[0].plan.train, [gamma for own in gammas for gamma in own]
        widths = [gamma_NC.shape[1] for gamma_NC in every]
        draws = draw(self.fits[0].plan.seed, self.fits[0].done, part.patched.shape[0], widths, every[0].detach())
        masks = [mask(lower_leaky(gamma_NC), draws, index) for index, gamma_NC in enumerate(every)]
        live: dict[int, Tensor] = {}

        def encode(i: int, source: int, x_ND: Tensor) -> None:
            live[i] = x_ND.to(self.fits[i].coder.b_dec.dtype)

        def decode(i: int, destination: int) -> Tensor:
            return self._modules[i].masked(live[i], masks[2 * i : 2 * i + 2])

        reads = [[fit.plan.spec.reads] for fit in self.fits]
        writes = [fit.plan.spec.writes for fit in self.fits]
        logits = self.target.logits(part.tokens, stream_edits(reads, writes, part.at, encode, decode))
        scored = Scored(part.scored, part.following, "kl", int(part.scored.shape[0]))
        return scores(logits, seen, scored, config.kernels == "plain")


def _module(fit: Fit) -> Decomposition:
    assert isinstance(fit, DecompositionFit)
    return fit.module


def _terms(fit: Fit, gammas: Sequence[Tensor], faithfulness: Tensor, x_ND: Tensor, y_NE: Tensor) -> Losses:
    """A decomposition's own terms; the FVU is that of what would be served."""
    spec, module = fit.plan.spec, _module(fit)
    p = exponent(spec.minimality_p, fit.done, fit.total)
    penalty = spec.sparsity * minimality(gammas, p, spec.minimality_beta)
    with torch.no_grad():
        made_NE = module.chosen(x_ND, [module.active(gamma_NC).to(x_ND.dtype) for gamma_NC in gammas])
        fvu = (y_NE - made_NE).square().sum(1).mean() / fit.writes[0].total_variance
    total = spec.faithfulness * faithfulness + penalty
    return Losses(total, fvu[None], torch.zeros_like(penalty), penalty.detach())


def _tally(module: Decomposition, gamma_NC: Tensor) -> Tally:
    return Tally(module.active(gamma_NC.detach()).sum(0).to(gamma_NC.dtype), gamma_NC.shape[0])


def _scored(found: Scores) -> dict[str, Tensor]:
    every: dict[str, Any] = {"kl": found.kl, "ce": found.ce, "ce_clean": found.ce_clean}
    return {name: value for name, value in every.items() if value is not None}
