"""One source's encoder: pre-activations by one dense product, a selection from them, gradients only where selected.

`forward` (training) and `encode` (everything else) share the pre-activations and the rule, so no second encoder can
drift away from the first. The dense product runs without autograd, in bf16 where asked; selection and thresholds are
fp32, and gradients return through `gathered_linear`.

For a product in bf16 a copy of W_enc in that format stays beside it, made anew when W_enc has changed: once per
optimiser step, and by the update itself where that is a kernel of ours on CUDA. There the block of pre-activations is
bf16 too, since every pass over it costs a fifth of the product in float32; what is compared is float32 all the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from thresher.cache.contracts import Codes
from thresher.train.dictionary.objective import MULTI
from thresher.train.dictionary.rules import TopK, rule
from thresher.train.dictionary.rules.base import Seen, merged, seen
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.kernels import firing, padded
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.gradients import Sink
from thresher.train.kernels.narrow import narrowed
from thresher.train.kernels.padded import Forecast
from thresher.train.kernels.silent import Dead, Silent, SilentBlock, choose_silent, dead_first
from thresher.train.kernels.sparse import Selection, gathered_linear
from thresher.train.kernels.tiles import joined, joined_silent, served_rows, tile_rows
from thresher.train.kernels.workspace import Workspace
from thresher.train.stages import stage


class Wide(NamedTuple):
    """Multi-TopK's second code, from the same pre-activations as the main one."""

    selection: Selection
    """Entries of more latents per token."""
    z: Tensor
    """[A] codes, with gradient."""


class Fired(NamedTuple):
    """A training pass through one encoder."""

    selection: Selection | None
    """Entries looked at; None: all."""
    a: Tensor
    """[A] (or [N, F]) pre-activations there, with gradient to the encoder."""
    z: Tensor
    """[A] (or [N, F]) codes, with gradient."""
    gate: Tensor | None
    """[A] (or [N, F]) 1 where the latent fires, with gradient to a learned threshold; None without one."""
    tokens: int
    """N."""
    silent: Silent | SilentBlock | None = None
    """Codes of dead latents for AuxK; None: none is dead, or AuxK is off, or it goes the plain way."""
    wide: Wide | None = None
    """Multi-TopK's second code, which nothing but its own loss may look at; None: there is none."""
    norms: Tensor | None = None
    """[F] decoder norms that latents were ranked with; None: by a alone."""
    woken: Tensor | None = None
    """Entries of dead latents above the rule's floor for AuxK, where it has one."""


class Tally(NamedTuple):
    """What thresholds and counters have to know of a part of a step's batch."""

    counts: Tensor
    """[F] tokens on which each latent fired."""
    tokens: int
    """N of the part."""
    seen: Seen | None = None
    """What the rule is told, if it follows the training."""


def whole_of(parts: Sequence[Tally]) -> Tally:
    """The tally of all parts together."""
    told = [part.seen for part in parts if part.seen is not None]
    counts = parts[0].counts if len(parts) == 1 else torch.stack([part.counts for part in parts]).sum(0)
    return Tally(counts, sum(part.tokens for part in parts), merged(told) if told else None)


class Chosen(NamedTuple):
    """What an encoder looks at of a batch, found without gradient."""

    selection: Selection | None
    """Entries; None: all."""
    values: Tensor
    """[A] (or [N, F]) pre-activations there."""
    silent: Silent | SilentBlock | None = None
    """Codes of dead latents, where they were looked at."""
    woken: Tensor | None = None
    """As in `Fired`."""
    norms: Tensor | None = None
    """As in `Fired`."""
    main: Tensor | None = None
    """[A] bool: the entries of the main code, where Multi-TopK's second one was cut over several ranks."""

    def scores(self) -> Tensor:
        """[A] what the entries of a selection compete by."""
        if self.norms is None:
            return self.values
        assert self.selection is not None
        return self.values * self.norms.index_select(0, self.selection.latents)


_WORKSPACE = Workspace()
"""Of every encoder that is given no other."""


class Encoder(nn.Module):
    """W_enc [F, D], b_enc [F], a firing rule and the count of tokens since each latent fired."""

    def __init__(self, spec: DictionarySpec, deployed: bool = False) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(spec.n_latents, spec.d_in))
        self.b_enc = nn.Parameter(torch.zeros(spec.n_latents))
        self.rule = rule(spec, deployed)
        self.register_buffer("tokens_since_fired", torch.zeros(spec.n_latents, dtype=torch.int64))
        self.tokens_since_fired: Tensor
        self.dead_after = spec.dead_after
        self.aux_k = spec.resolved_aux_k if spec.aux > 0 and not deployed else 0
        self.aux_width = spec.d_out if spec.aux_scope == "own" else 0  # 0: a list of codes, and no block
        self.multi = spec.multi_topk > 0 and not deployed
        self.forecast = None if deployed else Forecast(spec.dead_after)
        self.asks = False
        """Whether the dead are counted where they lie even if the host has to wait: ranks that share latents do."""
        self.register_load_state_dict_post_hook(_look_once)
        self.matmul_dtype: torch.dtype | None = None
        self.register_buffer("low", None, persistent=False)
        self.low: Tensor | None
        self._low_of: tuple[int, int] | None = None
        self.workspace = _WORKSPACE
        self.kernels = Kernels()
        self.register_buffer("norms", torch.ones(spec.n_latents) if deployed and spec.rank_by == "norm" else None)
        self.norms: Tensor | None  # what a deployed dictionary ranks with: decoder norms in training space
        self.sink: Sink | None = None  # where W_enc's gradient goes; None: to autograd

    def preactivations(self, x_ND: Tensor, bias_F: Tensor, out: Tensor | None = None) -> Tensor:
        """a [N, F] in the parameters' dtype or that of `out`, which receives it; without gradient."""
        with torch.no_grad():
            if self.matmul_dtype is None:
                return torch.addmm(bias_F, x_ND, self.W_enc.T, out=out)
            low_x, low_W = x_ND.to(self.matmul_dtype), self.low_weight()
            if out is not None and out.dtype == self.matmul_dtype:
                return torch.addmm(bias_F.to(out.dtype), low_x, low_W.T, out=out)
            return torch.add(low_x @ low_W.T, bias_F, out=out)

    @torch.no_grad()
    def low_weight(self) -> Tensor:
        """[F, D] W_enc in `matmul_dtype`: the copy, brought up to date if W_enc has changed."""
        assert self.matmul_dtype is not None
        state = (self.W_enc.data_ptr(), self.W_enc._version)
        if self.low is None or self.low.dtype != self.matmul_dtype or self.low.shape != self.W_enc.shape:
            self.low = self.W_enc.to(self.matmul_dtype, copy=True)
        elif self._low_of != state:
            self.low.copy_(self.W_enc)
        self._low_of = state
        return self.low

    def changed(self) -> None:
        """Take note of a change of W_enc that torch does not see: by a compiled loop, or a kernel without a copy."""
        self._low_of = None

    @torch.no_grad()
    def choose(self, x_ND: Tensor, bias_F: Tensor, whole: int | None = None, norms_F: Tensor | None = None) -> Chosen:
        """The product and the selection of a batch; a block that would be large is made and forgotten in tiles.

        `whole`: these rows are some of a batch of so many; where its tokens compete, as many entries come as it may
        keep in all. `norms_F`: rank latents by a times these.
        """
        tokens = x_ND.shape[0] if whole is None else whole
        rows = tile_rows(self.W_enc.shape[0], self._block_dtype().itemsize, x_ND.device)
        dead = self._wanted(tokens)
        if x_ND.shape[0] <= rows:
            return self._chosen(x_ND, bias_F, tokens, dead, norms_F)
        parts = [self._chosen(x_nD, bias_F, tokens, dead, norms_F) for x_nD in x_ND.split(rows)]
        silent = [part.silent for part in parts if part.silent is not None]
        merged = joined_silent(silent) if silent else None
        counts = [part.woken for part in parts if part.woken is not None]
        woken = torch.stack(counts).sum() if counts else None
        pairs = [(part.selection, part.values) for part in parts if part.selection is not None]
        if len(pairs) < len(parts):  # one tile wants all entries: then all do
            return Chosen(None, self.preactivations(x_ND, bias_F), merged, woken, norms_F)
        return Chosen(*joined(pairs, self.rule.budget(tokens), norms_F), merged, woken, norms_F)

    def _block_dtype(self) -> torch.dtype:
        """A CPU's own loops know no bf16, and its block fits the caches or is large anyway."""
        low = self.matmul_dtype if padded.must_not_ask(self.W_enc) else None
        return low or self.W_enc.dtype

    def _chosen(self, x_nD: Tensor, bias_F: Tensor, tokens: int, dead: Dead | None, norms_F: Tensor | None) -> Chosen:
        """What is chosen of some rows of a batch of `tokens`; where those compete, as many as it may be in all."""
        with stage("encode"):
            block = self.workspace.block(x_nD.shape[0], self.W_enc, self._block_dtype())
            a_nF = self.preactivations(x_nD, bias_F, block)
        with stage("select"):
            budget, scores_nF = self.rule.budget(tokens), a_nF if norms_F is None else a_nF * norms_F
            selection = None
            if self.multi:
                selection = firing.select_topk(scores_nF, min(MULTI * self.count(), a_nF.shape[1]), self.kernels)
            elif budget is None:
                selection = self.rule.select(scores_nF)
            else:
                selection = firing.select_batch_topk(scores_nF, min(budget, scores_nF.numel()), self.kernels)
            if selection is None:
                values = a_nF.to(bias_F.dtype, copy=True)
            else:
                values = selection.take(a_nF).to(bias_F.dtype)
        woken = self._woken(a_nF, tokens)
        if dead is None:
            return Chosen(selection, values, None, woken, norms_F)
        with stage("auxk"):
            silent = choose_silent(a_nF, dead, self.aux_k, self.kernels, self.aux_width)
            if isinstance(silent, Silent):
                silent = silent._replace(values=silent.values.to(bias_F.dtype))
            return Chosen(selection, values, silent, woken, norms_F)

    def wakes(self, tokens: int) -> bool:
        """Whether the rule is told of dead latents that woke, in a batch of so many tokens."""
        return self.aux_k > 0 and self.rule.aux_floor() is not None and self.asleep(tokens) is not None

    def _woken(self, a_nF: Tensor, tokens: int) -> Tensor | None:
        """Entries of dead latents above the rule's own floor for AuxK; None: it has none, or none is dead."""
        floor = self.rule.aux_floor() if self.aux_k else None
        dead = None if floor is None else self.asleep(tokens)
        if dead is None or floor is None:
            return None
        return ((a_nF.index_select(1, dead.latents) > floor) & dead.real()).sum()

    @torch.no_grad()
    def _wake(self, x_ND: Tensor, bias_F: Tensor) -> Silent | SilentBlock | None:
        """Codes of dead latents for rows whose block is gone: a product with their rows."""
        dead = self._wanted(x_ND.shape[0])
        if dead is None:
            return None
        with stage("auxk"):
            latents = dead.latents
            a_Nn = torch.nn.functional.linear(x_ND, self.W_enc[latents], bias_F[latents])
            every = dead._replace(latents=torch.arange(latents.shape[0], device=latents.device))
            return choose_silent(a_Nn, every, self.aux_k, self.kernels, self.aux_width)._replace(latents=latents)

    def count(self) -> int:
        """k of a rule that counts per token."""
        assert isinstance(self.rule, TopK)
        return self.rule.k

    def _wanted(self, tokens: int) -> Dead | None:
        """Dead latents whose codes AuxK's fast form takes from here; None: none."""
        fast = self.aux_k and (self.kernels.forced != "plain" or self.asks) and self.rule.aux_floor() is None
        return self.asleep(tokens) if fast else None

    def forward(
        self, x_ND: Tensor, bias_F: Tensor, chosen: Chosen | None = None, norms_F: Tensor | None = None
    ) -> Fired:
        """Training codes; `bias_F` is b_enc with any pre-bias folded in, with gradient; `norms_F` as in `choose`.

        `chosen`: what was chosen of these rows before with the same weights, so that no product is done twice.
        """
        if chosen is None:
            chosen = self.choose(x_ND, bias_F, norms_F=norms_F)
        elif chosen.silent is None:
            chosen = chosen._replace(silent=self._wake(x_ND, bias_F))
        selection, values, silent, woken, norms_F, main = chosen
        a = gathered_linear(x_ND, self.W_enc, bias_F, values, selection, self.kernels, self.sink)
        wide = None
        if self.multi and selection is not None:
            wide = Wide(selection, self.rule.fire(a, selection, self.b_enc)[0])
            selection, entries = narrowed(selection, chosen.scores(), self.count() if main is None else main)
            a = a.index_select(0, entries)
        fired = self.rule.fire(a, selection, self.b_enc)
        return Fired(selection, a, *fired, x_ND.shape[0], silent, wide, norms_F, woken)

    @torch.no_grad()
    def encode(self, x_ND: Tensor, bias_F: Tensor, norms_F: Tensor | None = None) -> Codes:
        """Codes under the frozen rule: each token alone decides; `norms_F` as in `choose`."""
        line = self.rule.line(self.b_enc)
        rows = served_rows(self.W_enc.shape[0], bias_F.itemsize, x_ND.device)
        parts = []
        for x_nD in x_ND.split(max(1, min(rows, x_ND.shape[0]))):
            a_nF = self.preactivations(x_nD, bias_F, self.workspace.block(x_nD.shape[0], self.W_enc))
            selection, values = self.rule.fire_frozen(a_nF if norms_F is None else a_nF * norms_F)
            if norms_F is not None:
                values = selection.take(a_nF).relu_()
            if line is not None:
                values = torch.relu(line.slope[selection.latents] * values + line.lift[selection.latents])
            parts.append((selection, values))
        selection, values = parts[0] if len(parts) == 1 else joined(parts)
        return Codes(values, selection.latents, selection.offsets, selection.width)

    @torch.no_grad()
    def tally(self, fired: Fired) -> Tally:
        """What a step's batch, or a part of it, has to say to `advance`; changes nothing."""
        active = torch.gt(fired.z, 0, out=torch.empty_like(fired.z))
        if fired.selection is None:
            count_F = active.sum(0)
        else:
            count_F = torch.zeros_like(self.b_enc).index_add_(0, fired.selection.latents, active)
        if not self.rule.follows:
            return Tally(count_F, fired.tokens)
        scores = fired.z.detach()
        if fired.norms is not None and fired.selection is not None:
            scores = scores * fired.norms.index_select(0, fired.selection.latents)
        return Tally(count_F, fired.tokens, seen(scores, fired.tokens, fired.woken))

    @torch.no_grad()
    def advance(self, parts: Sequence[Tally], left_out: Tensor | None = None, of_all: Seen | None = None) -> Tensor:
        """Move the running threshold and the dead counters on by one optimiser step.

        `left_out`: bool scalar, whether its update was; the counters then stay, for they count tokens trained on, and
        codes that were cut off say nothing of who fired. `of_all`: what the rule is told, where other ranks hold
        further latents. Returns the number of active entries, a scalar on the device.
        """
        count_F, tokens, told = whole_of(parts)
        if told is not None:
            self.rule.observe(told if of_all is None else of_all)
        fired_F = count_F > 0
        if left_out is None:
            self.tokens_since_fired.add_(tokens).masked_fill_(fired_F, 0)
        else:
            self.tokens_since_fired.add_((~left_out) * tokens).masked_fill_(fired_F & ~left_out, 0)
        if self.forecast is not None and not self.asks:
            self.forecast.advance(self.tokens_since_fired, tokens)
        return count_F.sum(dtype=torch.float64)

    def observe(self, fired: Fired) -> Tensor:
        """`advance` by a batch in one piece: once per optimiser step, never by an evaluation."""
        return self.advance([self.tally(fired)])

    def dead(self, dead_after: int) -> Tensor:
        """[F] bool: silent for `dead_after` training tokens or more; what AuxK revives is what the log counts."""
        return self.tokens_since_fired >= dead_after

    def dead_latents(self) -> Tensor | None:
        """[n] int64, ascending: latents that count as dead; None when there are none. Reads back."""
        latents = torch.nonzero(self.dead(self.dead_after)).view(-1)
        return latents if latents.shape[0] else None

    def asleep(self, tokens: int) -> Dead | None:
        """Latents that count as dead in a batch of so many tokens, found without asking a device; None: none."""
        if self.forecast is None or self.asks or not padded.must_not_ask(self.tokens_since_fired):
            latents = self.dead_latents()
            return None if latents is None else Dead(latents)
        length = self.forecast.capacity(self.tokens_since_fired, tokens)
        return dead_first(self.dead(self.dead_after), length) if length else None


def _look_once(encoder: nn.Module, _: object) -> None:
    """After a load, which may wait: count what may be dead, so that no step has to do without a bound."""
    assert isinstance(encoder, Encoder)
    counters = encoder.tokens_since_fired
    waits = not padded.must_not_ask(counters) or encoder.asks
    if encoder.forecast is not None and not waits and not encoder.forecast.known:
        encoder.forecast.recount(counters)
